"""Writes blocks.bin: for each block type two blocks of random bits and what the package `gguf` reads in them (f32).

    pip install gguf==0.19.0 && python3 blocks.py
"""

from pathlib import Path

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType as Type

# Where each type keeps its f16 scales.
SCALES = {Type.Q8_0: [0], Type.Q4_0: [0], Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208]}

rng = np.random.default_rng(5)
parts = []
for kind, places in SCALES.items():
    blocks = rng.integers(0, 256, (2, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for place in places:
        scales = rng.standard_normal((2, 1)).astype(np.float16)
        blocks[:, place : place + 2] = scales.view(np.uint8)
    parts += [blocks.tobytes(), quants.dequantize(blocks, kind).astype("<f4").tobytes()]
Path(__file__).with_name("blocks.bin").write_bytes(b"".join(parts))
