"""The same model in transformers: `python generate.py MODEL_FOLDER PROMPT`.

Each line of stdin is {"clients": n, "tokens": t}; the answer is {"seconds": s} for n answers of t tokens each, as one
batch without HTTP, which is the best case for a library. Per batch size it keeps the fastest of its ways: 1 or 2
threads, float32 or bfloat16.
"""

import itertools
import json
import sys
import time
from functools import cache

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER, PROMPT = sys.argv[1:]
TOKENIZER = AutoTokenizer.from_pretrained(FOLDER)
MODELS = {dtype: AutoModelForCausalLM.from_pretrained(FOLDER, dtype=dtype).eval() for dtype in (torch.float32, torch.bfloat16)}
TRIAL_TOKENS = 64


@torch.inference_mode()
def seconds(clients: int, tokens: int, threads: int, dtype: torch.dtype) -> float:
    torch.set_num_threads(threads)
    chat = TOKENIZER.apply_chat_template([{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False)
    ids = torch.tensor([chat] * clients)
    began = time.perf_counter()
    out = MODELS[dtype].generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                                 min_new_tokens=tokens, max_new_tokens=tokens)
    taken = time.perf_counter() - began
    assert out.shape[1] - ids.shape[1] == tokens
    return taken


@cache
def fastest(clients: int) -> tuple[int, torch.dtype]:
    ways = list(itertools.product((1, 2), MODELS))
    for way in ways:  # the first call of each is slower
        seconds(clients, 4, *way)
    return min(ways, key=lambda way: min(seconds(clients, TRIAL_TOKENS, *way) for _ in range(2)))


for line in sys.stdin:
    asked = json.loads(line)
    threads, dtype = fastest(asked["clients"])
    taken = seconds(asked["clients"], asked["tokens"], threads, dtype)
    print(json.dumps({"seconds": taken, "way": f"{threads} threads, {dtype}"}), flush=True)
