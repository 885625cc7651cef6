"""Writes cases.json: small tokenizers that split as those of well-known families do, and the ids that transformers reads with
them in the texts of ../formats/texts.json. None has more than 320 tokens, so that the weights of ../formats/twin.safetensors fit.

    pip install transformers==5.23.0 tokenizers==0.23.3
    python make.py
"""

import json
import pathlib

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

HERE = pathlib.Path(__file__).parent
TEXTS = json.loads((HERE / "../formats/texts.json").read_text())["texts"] + ["<|user|> \n Hi<|end|>\n\n<|user|>", "  <|end|>  x"]
CORPUS = [json.loads(line)["messages"][-1]["content"] for line in (HERE / "../../../models/eval.jsonl").read_text().splitlines()]
CORPUS += ["It's the user's 1234 cats; they'll've 56 of 7890.", "def f(x):\n    return x  # half\n\n\n\tdone\r\n"] * 20
# So that there are merges to tell the rules apart.
CORPUS += ["12345 67890 1 22 333 4444 55555\n\n\n...!!??--//\n\n  two  spaces   three"] * 200
VOCAB = 320
MARKS = ["<|user|>", "<|end|>"]

LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN_2 = LLAMA_3.replace("{1,3}", "")


def of_bytes(before=None, normalizer=None, regex=False, ignore_merges=False):
    """`before`: what splits texts ahead of the byte level, which splits with a rule of its own if `regex`."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([before, level]) if before else level
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB - len(MARKS), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(MARKS)
    return tokenizer


def of_pieces(normalizer, before, strips, rstrip=False):
    """Pieces with ▁ for a space, and bytes for all that has none. `strips`: the first space of a text is not its own."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    named = ["<unk>", "<s>", "</s>"]
    pieces = VOCAB - len(named) - 256 - len(MARKS)
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=pieces, limit_alphabet=pieces // 2, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = named + [f"<0x{byte:02X}>" for byte in range(256)] + sorted(model["vocab"], key=model["vocab"].get)
    vocab = {token: id for id, token in enumerate(tokens)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if normalizer:
        tokenizer.normalizer = normalizer
    if before:
        tokenizer.pre_tokenizer = before
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps + ([decoders.Strip(" ", 1, 0)] if strips else []))
    tokenizer.add_special_tokens(named)
    tokenizer.add_special_tokens([AddedToken(mark, rstrip=rstrip, normalized=False) for mark in MARKS])
    return tokenizer


def main():
    split = lambda rule: pre_tokenizers.Split(Regex(rule), "isolated")
    space, prefix = normalizers.Replace(" ", "▁"), normalizers.Prepend("▁")
    tokenizers = {
        "gpt-2": of_bytes(regex=True),
        "smollm": of_bytes(pre_tokenizers.Digits(individual_digits=True), regex=True),
        "qwen-2": of_bytes(split(QWEN_2), normalizers.NFC()),
        "llama-3": of_bytes(split(LLAMA_3), ignore_merges=True),
        "llama-2": of_pieces(normalizers.Sequence([prefix, space]), None, True),
        "mistral": of_pieces(None, pre_tokenizers.Metaspace("▁", "first", split=False), True),
        "phi-3": of_pieces(normalizers.Sequence([prefix, space]), None, True, rstrip=True),
        "gemma": of_pieces(space, pre_tokenizers.Split(" ", "merged_with_previous"), False),
    }
    cases = {}
    for name, tokenizer in tokenizers.items():
        assert tokenizer.get_vocab_size() <= VOCAB
        whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
        ids = [whole.encode(text, add_special_tokens=False) for text in TEXTS]
        cases[name] = {"tokenizer": json.loads(tokenizer.to_str()), "ids": ids}
    (HERE / "cases.json").write_text(json.dumps({"texts": TEXTS, "cases": cases}, ensure_ascii=False) + "\n")


main()
