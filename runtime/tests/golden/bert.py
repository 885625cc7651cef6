"""Makes the tiny encoders below `bert/`, and what sentence-transformers says of them.

    python runtime/tests/golden/bert.py

needs torch, transformers and sentence-transformers (tests/bench/peers/embeddings.txt).
"""

import json
import shutil
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, RobertaConfig, RobertaModel

HERE = Path(__file__).parent / "bert"
LIMIT = 24
TEXTS = [
    "hello world",
    "Hello, World!",
    "",
    "   \t\n ",
    "a",
    "the quick brown fox jumps over the lazy dog, and then it sleeps",
    "안녕하세요 세계",
    "naïve café — déjà vu",
    "🙂🙃 emoji",
    "x" * 200,
    "word " * 100,
    "[CLS] is not [SEP] what it seems [MASK]",
    "1234567890 3.14 -7",
]


def tokenizer(cls, sep, pad, unk, mask):
    """WordPiece over letters: every word can be spelled, some are one piece."""
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)] + list("0123456789,.!-")
    words = ["hello", "world", "the", "quick", "brown", "fox", "dog", "word", "is", "not"]
    pieces = [pad, unk, cls, sep, mask, *letters, *(f"##{letter}" for letter in letters[:36]), *words]
    inner = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token=unk))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {piece: i for i, piece in enumerate(pieces)}
    inner.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}", special_tokens=[(cls, ids[cls]), (sep, ids[sep])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, cls_token=cls, sep_token=sep, pad_token=pad, unk_token=unk, mask_token=mask, model_max_length=LIMIT
    )


def shake(model):
    """Weights of an ordinary size, norms and biases that matter."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.15)
            if "LayerNorm.weight" in name:
                parameter.add_(1)


def make(name, model, words, pooling, normalize):
    folder, base = HERE / name, HERE / f".{name}"
    for path in (folder, base):
        shutil.rmtree(path, ignore_errors=True)
    shake(model)
    model.save_pretrained(base)
    words.save_pretrained(base)
    transformer = Transformer(str(base), max_seq_length=LIMIT)
    parts = [transformer, Pooling(transformer.get_embedding_dimension(), pooling_mode=pooling)]
    whole = SentenceTransformer(modules=parts + ([Normalize()] if normalize else []), device="cpu")
    whole.save(str(folder), create_model_card=False)
    shutil.rmtree(base)
    whole = SentenceTransformer(str(folder), device="cpu")
    vectors = whole.encode(TEXTS, batch_size=4, convert_to_numpy=True)
    cases = [{"text": text, "embedding": [float(f"{x:.8g}") for x in vector]} for text, vector in zip(TEXTS, vectors)]
    with open(folder / "embeddings.json", "w") as out:
        out.write("[\n" + ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases) + "\n]\n")


def main():
    torch.manual_seed(7)
    words = tokenizer("[CLS]", "[SEP]", "[PAD]", "[UNK]", "[MASK]")
    shape = dict(vocab_size=len(words), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    make("mean", BertModel(BertConfig(**shape, max_position_embeddings=40)), words, "mean", True)
    shape["num_hidden_layers"] = 1
    make("cls", BertModel(BertConfig(**shape, max_position_embeddings=40, hidden_act="gelu_new")), words, "cls", False)
    words = tokenizer("<s>", "</s>", "<pad>", "<unk>", "<mask>")
    config = RobertaConfig(**shape, max_position_embeddings=42, pad_token_id=0, type_vocab_size=1)
    make("roberta", RobertaModel(config), words, "lasttoken", True)


main()
