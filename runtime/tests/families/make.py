"""Tiny seeded models of every family and rotary variant, and their logits by transformers in float32.

    python runtime/tests/families/make.py            compare with the committed files
    python runtime/tests/families/make.py --write    write them anew

Weights come from a generator that the tests implement too, so only configurations, ids and logits are committed:
`cases.json` and `logits.safetensors` in this folder. Needs torch, transformers, safetensors, numpy.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

HERE = Path(__file__).parent
VOCAB = 64
# More than one block of 32, and more than every window and short original length below.
TOKENS = 40

LONG = dict(
    short_factor=[1.0, 1.1, 1.2, 1.3, 1.5, 1.8], long_factor=[1.0, 2.0, 3.0, 4.5, 6.0, 8.0],
    original_max_position_embeddings=16,
)
LLAMA3 = dict(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
NESTED = dict(
    full_attention=dict(rope_type="linear", rope_theta=1000000.0, factor=8.0),
    sliding_attention=dict(rope_type="default", rope_theta=10000.0),
)

# Name: configuration as a file of that family would have it; what is left out is the family's default.
CASES = {
    "llama": dict(model_type="llama"),
    "llama-tied-biased": dict(model_type="llama", tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "llama-linear-old-form": dict(model_type="llama", rope_theta=500.0, rope_scaling=dict(type="linear", factor=4.0)),
    "llama-llama3": dict(model_type="llama", rope_parameters=dict(LLAMA3, rope_theta=500000.0)),
    "llama-yarn": dict(model_type="llama", rope_parameters=dict(YARN, rope_theta=10000.0)),
    "llama-yarn-untruncated": dict(
        model_type="llama",
        rope_parameters=dict(YARN, rope_theta=100.0, truncate=False, beta_fast=4.0, mscale=1.3, mscale_all_dim=0.7),
    ),
    "llama-dynamic": dict(
        model_type="llama", max_position_embeddings=20, rope_parameters=dict(rope_type="dynamic", factor=2.0),
    ),
    "mistral": dict(model_type="mistral", sliding_window=8, head_dim=32),
    "mistral-no-window": dict(model_type="mistral", sliding_window=None),
    "qwen2": dict(model_type="qwen2", tie_word_embeddings=True, rope_theta=1000000.0),
    "qwen2-window": dict(model_type="qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3": dict(model_type="qwen3", head_dim=32, tie_word_embeddings=True),
    "qwen3-yarn": dict(model_type="qwen3", head_dim=16, rope_parameters=YARN),
    "gemma": dict(model_type="gemma", head_dim=32, hidden_act="gelu"),
    "gemma2": dict(model_type="gemma2", head_dim=32, sliding_window=8, query_pre_attn_scalar=24,
                   attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gemma3": dict(model_type="gemma3_text", head_dim=32, sliding_window=8, query_pre_attn_scalar=24,
                   num_hidden_layers=4, sliding_window_pattern=2, rope_scaling=dict(rope_type="linear", factor=8.0)),
    "gemma3-new-form": dict(model_type="gemma3_text", head_dim=32, sliding_window=8, num_hidden_layers=2,
                            layer_types=["full_attention", "sliding_attention"], rope_parameters=NESTED,
                            final_logit_softcapping=2.0),
    "phi3": dict(model_type="phi3", sliding_window=9),
    "phi3-longrope-short": dict(model_type="phi3", partial_rotary_factor=0.75, tokens=16,
                                original_max_position_embeddings=16,
                                rope_parameters=dict(LONG, rope_type="longrope", rope_theta=10000.0)),
    "phi3-longrope-long": dict(model_type="phi3", partial_rotary_factor=0.75,
                               original_max_position_embeddings=16,
                               rope_parameters=dict(LONG, rope_type="longrope", rope_theta=10000.0)),
    "granite": dict(model_type="granite", embedding_multiplier=6.0, attention_multiplier=0.3,
                    residual_multiplier=0.4, logits_scaling=1.7),
    "olmo2": dict(model_type="olmo2"),
    "smollm2": dict(model_type="llama", tie_word_embeddings=True, hidden_size=96, num_attention_heads=6,
                    num_key_value_heads=2, rope_theta=100000.0),
    "smollm3": dict(model_type="smollm3", num_hidden_layers=4, no_rope_layer_interval=2),
    "smollm3-window": dict(model_type="smollm3", no_rope_layers=[1, 0], use_sliding_window=True, sliding_window=8),
}

SMALL = dict(
    vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=None, eos_token_id=1, pad_token_id=0,
)


def fnv1a(name: str) -> int:
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    return state


def uniform(name: str, count: int) -> np.ndarray:
    """splitmix64 from the name's hash; the upper 24 bits of each number, as a number in [-1, 1)."""
    with np.errstate(over="ignore"):
        x = np.uint64(fnv1a(name)) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return (x >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - np.float32(1)


def fill(model: torch.nn.Module) -> None:
    """Matrices keep the variance of what they multiply; norms lie around 1, so do those stored as a distance from 1."""
    for name, weight in model.named_parameters():
        numbers = uniform(name, weight.numel())
        if weight.dim() == 2:
            numbers = numbers * np.float32((3 / weight.shape[1]) ** 0.5)
        elif name.endswith("norm.weight"):
            numbers = np.float32(1) + numbers * np.float32(0.25)
        else:
            numbers = numbers * np.float32(0.25)
        weight.data = torch.from_numpy(numbers.reshape(tuple(weight.shape)))


def ids(name: str, count: int) -> list[int]:
    return [int(x) for x in ((uniform(name + ".ids", count) + 1) * VOCAB / 2)]


def compute(name: str, case: dict) -> tuple[dict, torch.Tensor]:
    case = dict(case)
    tokens = case.pop("tokens", TOKENS)
    config = SMALL | case
    if "no_rope_layers" not in config and config["model_type"] == "smollm3":
        config["use_sliding_window"] = False
    # Through a copy: transformers rewrites what it is given.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**json.loads(json.dumps(config))))
    model = model.float().eval()
    # Eager attention is the only one that knows softcaps.
    model.set_attn_implementation("eager")
    fill(model)
    sequence = torch.tensor([ids(name, tokens)])
    with torch.no_grad():
        if "dynamic" not in name:
            logits = model(sequence, use_cache=False).logits[0]
        else:
            # Token by token, as it is served: a prompt at once would turn early positions by the last one's base.
            cache, rows = None, []
            for at in range(tokens):
                out = model(sequence[:, at : at + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                rows.append(out.logits[0, 0])
            logits = torch.stack(rows)
    spread = logits.std(-1).min().item()
    assert torch.isfinite(logits).all() and spread > 0.2, f"{name}: logits are flat ({spread})"
    return {"config": config, "ids": sequence[0].tolist()}, logits.contiguous()


def main() -> None:
    torch.manual_seed(0)
    cases, logits = {}, {}
    for name, case in CASES.items():
        cases[name], logits[name] = compute(name, case)
        print(f"{name}: max|logit| {logits[name].abs().max():.2f}, std {logits[name].std():.2f}")
    if "--write" in sys.argv:
        lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
        (HERE / "cases.json").write_text("{\n" + lines + "\n}\n")
        save_file(logits, HERE / "logits.safetensors")
        return
    assert cases == json.loads((HERE / "cases.json").read_text()), "cases.json is not of this script: write it anew"
    committed = load_file(HERE / "logits.safetensors")
    assert committed.keys() == logits.keys()
    for name, want in logits.items():
        error = (committed[name] - want).abs().max() / want.abs().max()
        assert error < 1e-5, f"{name}: {error:.1e} from what is committed"
    print(f"{len(cases)} models give the committed logits")


if __name__ == "__main__":
    main()
