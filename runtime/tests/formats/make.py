"""Writes the fixtures of this folder: tiny seeded models as GGUF, the safetensors twin of one of them, and what
transformers makes of their tokenizers.

    pip install gguf==0.19.0 transformers==5.23.0 sentencepiece==0.2.3 safetensors numpy torch==2.15.0
    python make.py

bytes.gguf     byte-level vocabulary, llama, F16 (rows of Q and K in pairs, as every such file has them)
scored.gguf    SentencePiece vocabulary, llama, F16
twin.json      config.json and tokenizer of the Hugging Face twin of bytes.gguf; its weights are twin.safetensors
texts.json     texts and their ids: of bytes.gguf by pre-tokenizer, and of scored.gguf
"""

import io
import json
import pathlib
import tempfile
import unicodedata

import gguf
import numpy as np
import sentencepiece
from safetensors.numpy import save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = pathlib.Path(__file__).parent
CORPUS = [
    json.loads(line)["messages"][-1]["content"]
    for line in (HERE / "../../../models/eval.jsonl").read_text().splitlines()
] + ["It's the user's 1234 cats; they'll've 56 of 7890.", "def f(x):\n    return x  # half\n\n\n\tdone\r\n"] * 20
TEXTS = [
    "", " ", "  two  spaces ", "Hello, world!", "It's WE'LL they'Ve I'm", "x = 12345 + 67.890\n\n\tif y:\r\n  z",
    "naïve café Ångström e\u0301 é", "한국어와 日本語 кириллица ελληνικά", "😀👩‍👩‍👧🏳️‍🌈", "\u00a0nbsp\u2003em\u200bzero", "CamelCaseWord ABCdef iOS",
    "...!!??--__//", "1 22 333 4444 55555", "a\u0000b\u0007c", "\n\n\n", " leading", "trailing ", "\u2581literal\u2581", "<s>not</s>", "a <tool> call",
    "The hotel is quite bad! My sister said the same.", "٣٤٥ ⅷ ² ½", "ǅ ʰ ª", "ﬁ ﷺ", "don\u2019t",
]
PRES = ["gpt-2", "llama-bpe", "smaug-bpe", "dbrx", "qwen2", "tekken", "gpt-4o"]
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, CONTEXT = 32, 48, 2, 1, 1, 128
DIM = HIDDEN // HEADS
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, _, BYTE = range(1, 7)


def byte_vocabulary():
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=317, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["<|start|>", "<|end|>"])
    tokenizer.add_tokens(["<tool>"])
    model = json.loads(tokenizer.to_str())["model"]
    tokens = [tokenizer.id_to_token(id) for id in range(tokenizer.get_vocab_size())]
    kinds = [NORMAL] * 317 + [CONTROL, CONTROL, USER_DEFINED]
    return tokenizer, tokens, kinds, [" ".join(pair) for pair in model["merges"]]


def scored_vocabulary():
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(text for text in CORPUS if text.isascii()), model_writer=out, model_type="bpe", vocab_size=480, byte_fallback=True,
        character_coverage=1.0, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        user_defined_symbols=["<tool>"],
    )
    model = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    ids = range(model.vocab_size())
    kind = lambda id: (
        UNKNOWN if model.is_unknown(id) else CONTROL if model.is_control(id)
        else BYTE if model.is_byte(id) else USER_DEFINED if model.id_to_piece(id) == "<tool>" else NORMAL
    )
    return model, [model.id_to_piece(id) for id in ids], [kind(id) for id in ids], [model.get_score(id) for id in ids]


def weights(vocab, seed):
    """Hugging Face names and order."""
    rng = np.random.default_rng(seed)
    matrix = lambda *shape: rng.normal(0, 0.3, shape).astype(np.float16)
    norm = lambda: (1 + rng.normal(0, 0.1, HIDDEN)).astype(np.float32)
    tensors = {"model.embed_tokens.weight": matrix(vocab, HIDDEN), "model.norm.weight": norm()}
    for i in range(LAYERS):
        at = f"model.layers.{i}."
        tensors |= {
            at + "input_layernorm.weight": norm(), at + "post_attention_layernorm.weight": norm(),
            at + "self_attn.q_proj.weight": matrix(HIDDEN, HIDDEN), at + "self_attn.k_proj.weight": matrix(KV_HEADS * DIM, HIDDEN),
            at + "self_attn.v_proj.weight": matrix(KV_HEADS * DIM, HIDDEN), at + "self_attn.o_proj.weight": matrix(HIDDEN, HIDDEN),
            at + "mlp.gate_proj.weight": matrix(INNER, HIDDEN), at + "mlp.up_proj.weight": matrix(INNER, HIDDEN),
            at + "mlp.down_proj.weight": matrix(HIDDEN, INNER),
        }
    return tensors


def in_pairs(matrix, heads):
    """Row j of a head's first half, then row j of its second half."""
    rows = matrix.shape[0]
    return matrix.reshape(heads, 2, rows // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def write(path, tensors, tokens, kinds, model, pre=None, merges=None, scores=None, ends=(1, 2)):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(DIM)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(model)
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
        writer.add_unk_token_id(0)
    writer.add_bos_token_id(ends[0])
    writer.add_eos_token_id(ends[1])
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for name, tensor in tensors.items():
        if "q_proj" in name:
            tensor = in_pairs(tensor, HEADS)
        if "k_proj" in name:
            tensor = in_pairs(tensor, KV_HEADS)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def ids_of(path, form):
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [unicodedata.normalize(form, text) if form else text for text in TEXTS]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


def main():
    tokenizer, tokens, kinds, merges = byte_vocabulary()
    tensors = weights(len(tokens), 1)
    save_file(tensors, HERE / "twin.safetensors")
    write(HERE / "bytes.gguf", tensors, tokens, kinds, "gpt2", "llama-bpe", merges, ends=(317, 318))
    config = {
        "model_type": "llama", "vocab_size": len(tokens), "hidden_size": HIDDEN, "intermediate_size": INNER,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": DIM,
        "rms_norm_eps": 1e-5, "max_position_embeddings": CONTEXT, "tie_word_embeddings": True, "rope_theta": 10000.0,
        "eos_token_id": 318,
    }
    template = {"eos_token": "<|end|>", "chat_template": TEMPLATE}
    twin = {"config": config, "tokenizer": json.loads(tokenizer.to_str()), "tokenizer_config": template}
    (HERE / "twin.json").write_text(json.dumps(twin, ensure_ascii=False))

    texts = {"texts": TEXTS, "bytes": {}, "tokens": tokens, "merges": merges}
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model.gguf"
        for pre in PRES:
            write(path, tensors, tokens, kinds, "gpt2", pre, merges, ends=(317, 318))
            # Qwen's own tokenizer composes text first; transformers leaves that out when it reads GGUF.
            texts["bytes"][pre] = ids_of(path, "NFC" if pre == "qwen2" else None)
    model, tokens, kinds, scores = scored_vocabulary()
    write(HERE / "scored.gguf", weights(len(tokens), 2), tokens, kinds, "llama", None, None, scores)
    # SentencePiece is the reference, but neither reads control tokens in text nor begins anew after an added one, as
    # llama.cpp and transformers' legacy tokenizers do.
    whole = {
        "<s>not</s>": [model.bos_id(), *model.encode("not"), model.eos_id()],
        "a <tool> call": [*model.encode("a "), model.piece_to_id("<tool>"), *model.encode(" call")],
    }
    texts["scored"] = [whole.get(text) or model.encode(text) for text in TEXTS]
    (HERE / "texts.json").write_text(json.dumps(texts, ensure_ascii=False))


main()
