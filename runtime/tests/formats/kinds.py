"""Writes kinds.bin: what transformers says with tiny models whose weights are GGUF blocks, read by the package `gguf`, and
how far a runtime may be off that rounds what it multiplies them with.

    pip install gguf==0.19.0 transformers==5.23.0 numpy torch==2.15.0
    python kinds.py

The blocks are made from the names of their tensors, here and in tests/runtime/kinds.rs alike. For each kind and each of
`POSITIONS`: 256 log-probabilities, then the bound (f32, little endian).

The bound. A runtime that multiplies blocks in integers rounds its inputs to 8 bits, 32 or 256 of them with one scale
s = largest / 127: every input of every matrix is off by at most s/2, evenly spread and independent. The twin itself is run with
such noise on the inputs of all its matrices. Over the draws, the root mean square error of a position's log-probabilities has
a mean and a deviation; the bound is the mean and six deviations. Plain numbers are not rounded: there the bound is 1e-5, for sums in f32.
"""

import pathlib

import numpy as np
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type
from transformers import Qwen3Config, Qwen3ForCausalLM

HIDDEN, INNER, HEADS, KV_HEADS, DIM, LAYERS, VOCAB = 256, 512, 4, 2, 64, 2, 256
IDS = list(b"Blocks of numbers, end to end: 0123456789")
POSITIONS = [0, 7, 19, 39]
DRAWS = 128
# Where each kind keeps f16 scales, and with which exponent; the others of their bits, and all other bytes, are random.
SCALES = {
    Type.F32: [], Type.F16: [], Type.Q8_0: [(0, 4)], Type.Q4_0: [(0, 8)], Type.Q4_K: [(0, 2), (2, 5)], Type.Q5_K: [(0, 1), (2, 5)],
    Type.Q6_K: [(208, 0)],
}
# Inputs that share a scale.
TOGETHER = {Type.Q8_0: 32, Type.Q4_0: 32, Type.Q4_K: 256, Type.Q5_K: 256, Type.Q6_K: 256}


def stream(name, count):
    """So many bytes: splitmix64 from the name's FNV-1a hash."""
    state = 0xCBF29CE484222325
    for byte in name.encode():
        state = (state ^ byte) * 0x100000001B3 % 2**64
    with np.errstate(over="ignore"):
        x = np.uint64(state) + np.arange(1, -(-count // 8) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return x.view(np.uint8)[:count].copy()


def matrix(kind, name, rows, columns):
    size, length = GGML_QUANT_SIZES[kind]
    count = rows * columns // size
    blocks = stream(f"{kind.name} {name}", count * length).reshape(count, length)
    if kind == Type.F32:  # sign, 2^-5, 23 random bits
        numbers = blocks.view("<u4") & 0x807FFFFF | (127 - 5 << 23)
        return numbers.view("<f4").reshape(rows, columns)
    if kind == Type.F16:
        return (blocks.view("<u2") & 0x83FF | (15 - 5 << 10)).view("<f2").astype(np.float32).reshape(rows, columns)
    for at, exponent in SCALES[kind]:
        blocks[:, at + 1] = blocks[:, at + 1] & 3 | exponent << 2
    return quants.dequantize(blocks.reshape(rows, -1), kind)


def norm(name, count):
    return (stream(name, 4 * count).view("<u4") & 0x1FFFFF | 0x3F800000).view("<f4")  # from 1 to 1.25


def model(kind):
    config = Qwen3Config(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=DIM, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        max_position_embeddings=128, tie_word_embeddings=False,
    )
    made = Qwen3ForCausalLM(config).double().eval()
    for name, parameter in made.named_parameters():
        numbers = norm(name, len(parameter)) if parameter.dim() == 1 else matrix(kind, name, *parameter.shape)
        parameter.data = torch.from_numpy(numbers.astype(np.float64))
    return made


def log_probabilities(made):
    with torch.no_grad():
        return made(torch.tensor([IDS])).logits[0].log_softmax(-1)[POSITIONS].numpy()


def noise(together):
    def onto(_, inputs):
        x = inputs[0].unflatten(-1, (-1, together))
        scale = x.abs().amax(-1, keepdim=True) / 127
        return ((x + (torch.rand_like(x) - 0.5) * scale).flatten(-2),)
    return onto


def main():
    torch.manual_seed(1)
    out = []
    for kind in SCALES:
        made = model(kind)
        exact = log_probabilities(made)
        bound = np.full(len(POSITIONS), 1e-5)
        if kind in TOGETHER:
            for module in made.modules():
                if isinstance(module, torch.nn.Linear):
                    module.register_forward_pre_hook(noise(TOGETHER[kind]))
            errors = [np.sqrt(((log_probabilities(made) - exact) ** 2).mean(-1)) for _ in range(DRAWS)]
            bound = np.mean(errors, 0) + 6 * np.std(errors, 0)
        weights = made.model.layers[0].mlp.up_proj.weight
        print(kind.name, "weights", weights.std().item(), "spread", exact.std(-1), "bound", bound)
        out += [np.concatenate([exact, bound[:, None]], -1).astype("<f4").tobytes()]
    pathlib.Path(__file__).with_name("kinds.bin").write_bytes(b"".join(out))


main()
