"""Clients of mistral.rs: `python clients.py MODEL_FOLDER`.

Each line of stdin lists the clients, each a list of [prompt tokens, output tokens] that it asks for one after the other;
the answer is {"seconds": s} until the last of them was answered. The engine chooses its number format itself. (A GGUF
file or in-situ quantisation would be the other way, but on a CPU version 0.9.5 cannot prefill several prompts at once
with either: "input tensor is not contiguous".)
"""

import json
import os
import sys
import time
from itertools import count
from threading import Lock, Thread

from mistralrs import ChatCompletionRequest, Runner, Which

FOLDER = sys.argv[1]
CLIENTS = 8
LETTERS = "abcdefghijklmnopqrstuvwxyz"
# The engine logs to standard output, where only answers belong.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
runner = Runner(which=Which.Plain(model_id=FOLDER), max_seqs=CLIENTS, prefix_cache_n=0)
# Only the answers may be awaited by several threads.
asking = Lock()
prompts = count()


def prompt(tokens: int) -> str:
    """Words of four letters, a token each as the blank between them is; no two prompts begin alike."""
    number = next(prompts)
    first = "a" + "".join(LETTERS[number // 26**place % 26] for place in range(3))
    return " ".join([first] + ["abcd"] * (tokens // 2 - 1))


def ask(prompt_tokens: int, tokens: int) -> None:
    messages = [{"role": "user", "content": prompt(prompt_tokens)}]
    with asking:
        chunks = runner.send_chat_completion_request(
            ChatCompletionRequest(messages, "default", max_tokens=tokens, temperature=0.0, ignore_eos=True, stream=True)
        )
    seen = [chunk for chunk in chunks]
    usage = next(chunk.usage for chunk in reversed(seen) if chunk.usage)
    assert usage.completion_tokens == tokens and abs(usage.prompt_tokens - prompt_tokens) <= 8, usage


def client(requests: list[list[int]], failures: list[Exception]) -> None:
    try:
        for request in requests:
            ask(*request)
    except Exception as failure:  # a thread's own would only be printed
        failures.append(failure)


for line in sys.stdin:
    failures: list[Exception] = []
    threads = [Thread(target=client, args=(requests, failures)) for requests in json.loads(line)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    print(json.dumps({"seconds": time.perf_counter() - began}), file=answers, flush=True)
