"""Greedy accuracy of the exported folders on the held-out set, measured with transformers."""

import json
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import draw_training, turn

BATCH = 10

# A second look at every fifth case, deep in a chat of about 1,500 tokens: is the model sane at late positions?
DEEP_EVERY, DEEP_TURNS = 5, 45


def load(folder: Path, attention: str = "sdpa"):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    return AutoTokenizer.from_pretrained(folder), model.eval()


@torch.inference_mode()
def answers(folder: Path, chats: list[list[dict]]) -> list[str]:
    """The greedy answer to each chat, in order. Chats of like length share a batch, so that little is padding."""
    tokenizer, model = load(folder)
    tokenizer.padding_side = "left"
    prompts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    replies = {}
    for at in range(0, len(order), BATCH):
        group = order[at : at + BATCH]
        batch = tokenizer([prompts[i] for i in group], return_tensors="pt", padding=True,
                          add_special_tokens=False, return_token_type_ids=False)
        out = model.generate(**batch, do_sample=False, max_new_tokens=64)
        texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        replies.update(zip(group, texts))
    return [replies[i] for i in range(len(chats))]


def accuracy(folder: Path, cases: list[dict]) -> dict[tuple[str, str], float]:
    """Share of exactly right answers by (family, language), with "all" for either."""
    right = defaultdict(list)
    for case, reply in zip(cases, answers(folder, [case["messages"] for case in cases])):
        for family in (case["family"], "all"):
            for lang in (case["lang"], "all"):
                right[family, lang].append(reply == case["answer"])
    return {key: sum(marks) / len(marks) for key, marks in right.items()}


def deep(cases: list[dict]) -> list[dict]:
    rng = Random(0)
    return [
        {**case, "messages": [m for _ in range(DEEP_TURNS) for m in turn(draw_training(rng))] + case["messages"][-1:]}
        for case in cases[::DEEP_EVERY]
    ]


def report(folders: dict[str, Path], cases_path: Path) -> None:
    """Prints the table of the model card."""
    cases = [json.loads(line) for line in cases_path.read_text(encoding="utf-8").splitlines()]
    langs, rows = ("en", "ko", "all"), [*dict.fromkeys(case["family"] for case in cases), "all"]
    columns = [(name, lang) for name in folders for lang in langs]
    near = {name: accuracy(folder, cases) for name, folder in folders.items()}
    far = {name: accuracy(folder, deep(cases)) for name, folder in folders.items()}

    def line(title: str, scores: dict, family: str) -> str:
        return f"| {title} | " + " | ".join(f"{100 * scores[name][family, lang]:.1f} %" for name, lang in columns) + " |"

    print("| family | " + " | ".join(f"{name} {lang}" for name, lang in columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    for family in rows:
        print(line(family, near, family))
    print(line(f"all, after {DEEP_TURNS} turns", far, "all"))
