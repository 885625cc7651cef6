"""The same model in transformers: `python generate.py MODEL_FOLDER PROMPT`.

Each line of stdin is {"clients": n, "tokens": t}; the answer is {"seconds": s} for n answers of t tokens each: one batch
of equal lengths without HTTP, `generate` as it comes (eager, its default cache). Per batch size it keeps the fastest of
its ways: one thread, one core left free, or all; float32 or bfloat16.
"""

import itertools
import json
import os
import sys
import time
from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, PROMPT = sys.argv[1:]
TRIAL_TOKENS = 64
CORES = len(os.sched_getaffinity(0))
THREADS = sorted({1, max(1, CORES - 1), CORES})
DTYPES = [torch.float32, torch.bfloat16]
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)


def load(dtype: torch.dtype):
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval()
    # Every answer goes on to its bound.
    model.generation_config.eos_token_id = None
    return model


MODELS = {dtype: load(dtype) for dtype in DTYPES}


@torch.inference_mode()
def seconds(clients: int, tokens: int, threads: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    chat = TOKENIZER.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([chat] * clients)
    began = time.perf_counter()
    out = MODELS[dtype].generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens)
    taken = time.perf_counter() - began
    assert out.shape[1] - ids.shape[1] == tokens
    return taken


@cache
def fastest(clients: int) -> tuple[int, torch.dtype]:
    ways = list(itertools.product(THREADS, DTYPES))
    for way in ways:  # the first call of each is slower
        seconds(clients, 4, *way)
    return min(ways, key=lambda way: min(seconds(clients, TRIAL_TOKENS, *way) for _ in range(2)))


for line in sys.stdin:
    asked = json.loads(line)
    threads, dtype = fastest(asked["clients"])
    taken = seconds(asked["clients"], asked["tokens"], threads, dtype)
    print(json.dumps({"seconds": taken, "way": f"{threads} threads, {dtype}"}), flush=True)
