"""Writes a checkpoint as a Hugging Face model folder in bf16."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from . import tokenizer as tok
from .model import Shape


def config(shape: Shape, ids: dict[str, int]) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": shape.eps,
        "rope_theta": shape.theta,
        "max_position_embeddings": tok.CONTEXT,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        **ids,
    }


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def export(checkpoint: Path, tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    ids = {
        "bos_token_id": tokenizer.token_to_id(tok.END_OF_TEXT),
        "eos_token_id": tokenizer.token_to_id(tok.IM_END),
        "pad_token_id": tokenizer.token_to_id(tok.END_OF_TEXT),
    }
    write_json(folder / "config.json", config(Shape(vocab=tokenizer.get_vocab_size()), ids))
    # Sampling blurs exact answers, and a tiny model has no others: greedy unless the request asks otherwise.
    write_json(folder / "generation_config.json", {**ids, "do_sample": False, "max_new_tokens": 256})
    tok.save(tokenizer, folder)
    weights = torch.load(checkpoint)["model"]
    partial = folder / "model.safetensors.partial"
    save_file({name: w.to(torch.bfloat16).contiguous() for name, w in weights.items()}, partial, metadata={"format": "pt"})
    partial.replace(folder / "model.safetensors")
