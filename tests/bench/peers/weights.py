"""Random weights in the shapes of two real models, for every engine alike: `python weights.py FOLDER GGUF_PY`.

Writes FOLDER/NAME/ (Hugging Face layout, bfloat16) and FOLDER/NAME.gguf (the same numbers) for each of them; GGUF_PY is
the folder of llama.cpp's Python package. Speed does not depend on what weights say, so a seed will do for a training.
"""

import json
import os
import sys
from itertools import product
from string import ascii_lowercase as LETTERS

import torch
from safetensors.torch import save_file

FOLDER, GGUF_PY = sys.argv[1:]
sys.path.insert(0, GGUF_PY)
import gguf  # noqa: E402

SEED = 20_261_121
COMMON = dict(hidden_act="silu", initializer_range=0.02, tie_word_embeddings=True, torch_dtype="bfloat16", use_cache=True)
SHAPES = {
    "qwen2.5-0.5b": dict(
        architectures=["Qwen2ForCausalLM"], model_type="qwen2", hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2, vocab_size=151_936,
        max_position_embeddings=32_768, rms_norm_eps=1e-6, rope_theta=1e6, **COMMON,
    ),
    "llama3.2-1b": dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=2048, intermediate_size=8192,
        num_hidden_layers=16, num_attention_heads=32, num_key_value_heads=8, head_dim=64, vocab_size=128_256,
        max_position_embeddings=8192, rms_norm_eps=1e-5, rope_theta=5e5, **COMMON,
    ),
}  # fmt: skip
# How llama.cpp names the rule that cuts text into words.
RULES = {"qwen2": "qwen2", "llama": "llama-bpe"}
TEMPLATE = "{% for m in messages %}{{ m.content }}\n{% endfor %}"


def bytes_alphabet() -> list[str]:
    """The 256 characters that byte-level vocabularies write bytes as."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    spelled = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [spelled[byte] for byte in range(256)]


def vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Tokens and merges: bytes, then pairs, threes and fours of letters, then the end token."""
    pairs = ["".join(pair) for pair in product(LETTERS, repeat=2)]
    merges = [(a, b) for a, b in product(LETTERS, repeat=2)]
    merges += [(pair, letter) for pair, letter in product(pairs, LETTERS)]
    merges += [(a, b) for a, b in product(pairs, repeat=2)]
    merges = merges[: size - 257]
    return bytes_alphabet() + [a + b for a, b in merges] + ["<|end|>"], [f"{a} {b}" for a, b in merges]


def tokenizer(tokens: list[str], merges: list[str]) -> dict:
    end = len(tokens) - 1
    special = dict(id=end, content=tokens[-1], single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    cut = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [special], "normalizer": None,
        "pre_tokenizer": cut, "post_processor": None, "decoder": cut,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": {token: id for id, token in enumerate(tokens[:-1])}, "merges": merges,
        },
    }  # fmt: skip


def weights(config: dict):
    """(name, tensor) in Hugging Face's names."""
    random = torch.Generator().manual_seed(SEED)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim", hidden // config["num_attention_heads"])
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head

    def matrix(rows: int, columns: int) -> torch.Tensor:
        return torch.empty(rows, columns, dtype=torch.bfloat16).normal_(0, config["initializer_range"], generator=random)

    def ones() -> torch.Tensor:
        return torch.ones(hidden, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", matrix(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        yield at + "input_layernorm.weight", ones()
        for name, rows in ("q", queries), ("k", keys), ("v", keys):
            yield at + f"self_attn.{name}_proj.weight", matrix(rows, hidden)
            if config["model_type"] == "qwen2":
                yield at + f"self_attn.{name}_proj.bias", matrix(1, rows)[0]
        yield at + "self_attn.o_proj.weight", matrix(hidden, queries)
        yield at + "post_attention_layernorm.weight", ones()
        yield at + "mlp.gate_proj.weight", matrix(inner, hidden)
        yield at + "mlp.up_proj.weight", matrix(inner, hidden)
        yield at + "mlp.down_proj.weight", matrix(hidden, inner)
    yield "model.norm.weight", ones()


def gguf_tensor(name: str, tensor: torch.Tensor, config: dict) -> tuple[str, torch.Tensor]:
    for theirs, ours in {
        "model.layers.": "blk.", "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.o_proj": "attn_output",
        "self_attn.": "attn_", "mlp.": "ffn_", "_proj": "",
    }.items():  # fmt: skip
        name = name.replace(theirs, ours)
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    part = name.split(".")[-2]
    if config["model_type"] == "llama" and part in heads:
        # There, the two numbers that are rotated together lie side by side.
        rows, columns = tensor.shape
        tensor = tensor.view(heads[part], 2, -1, columns).transpose(1, 2).reshape(rows, columns)
    return name, tensor


def write_gguf(path: str, config: dict, tensors: dict, tokens: list[str], merges: list[str]) -> None:
    out = gguf.GGUFWriter(path, config["model_type"])
    out.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(config["num_attention_heads"])
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_rope_freq_base(config["rope_theta"])
    out.add_rope_dimension_count(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_vocab_size(config["vocab_size"])
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre(RULES[config["model_type"]])
    out.add_token_list(tokens)
    kinds = [gguf.TokenType.NORMAL] * (len(tokens) - 1) + [gguf.TokenType.CONTROL]
    out.add_token_types(kinds)
    out.add_token_merges(merges)
    out.add_eos_token_id(len(tokens) - 1)
    out.add_bos_token_id(len(tokens) - 1)
    out.add_add_bos_token(False)
    out.add_chat_template(TEMPLATE)
    for name, tensor in tensors.items():
        name, tensor = gguf_tensor(name, tensor, config)
        if tensor.dim() == 1:
            out.add_tensor(name, tensor.float().numpy())
        else:
            bits = tensor.contiguous().view(torch.uint8).numpy()
            out.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


for shape, config in SHAPES.items():
    folder = os.path.join(FOLDER, shape)
    if os.path.exists(folder + ".gguf"):
        continue
    os.makedirs(folder, exist_ok=True)
    tokens, merges = vocabulary(config["vocab_size"])
    config |= dict(bos_token_id=len(tokens) - 1, eos_token_id=len(tokens) - 1)
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": config["eos_token_id"]},
        "tokenizer.json": tokenizer(tokens, merges),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokens[-1], "bos_token": tokens[-1],
            "add_bos_token": False, "chat_template": TEMPLATE,
        },
    }  # fmt: skip
    for name, content in files.items():
        with open(os.path.join(folder, name), "w") as file:
            json.dump(content, file)
    tensors = dict(weights(config))
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    # Under its name only when it is whole: what exists is not made again.
    write_gguf(folder + ".part", config, tensors, tokens, merges)
    os.rename(folder + ".part", folder + ".gguf")
    print(f"{shape}: {sum(t.numel() for t in tensors.values()) / 1e6:.0f} M weights", flush=True)
