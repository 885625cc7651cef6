"""Greedy accuracy of exported folders on held-out tasks, measured with transformers."""

from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from .data import FAMILIES, Case, draw_training, evaluation, turn

BATCH = 10
LANGS = ("en", "ko", "all")

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


# Share of exactly right answers by (family, language), with "all" for either.
Scores = dict[tuple[str, str], float]


def accuracy(folder: Path, cases: list[Case]) -> Scores:
    right = defaultdict(list)
    for case, reply in zip(cases, answers(folder, [case.messages for case in cases])):
        for family in (case.task.family, "all"):
            for lang in (case.task.lang, "all"):
                right[family, lang].append(reply == case.task.answer)
    return {key: sum(marks) / len(marks) for key, marks in right.items()}


def deep(cases: list[Case]) -> list[Case]:
    rng = Random(0)
    return [
        Case(case.task, [m for _ in range(DEEP_TURNS) for m in turn(draw_training(rng))] + case.messages[-1:])
        for case in cases[::DEEP_EVERY]
    ]


def print_rows(scores: dict[str, Scores], titles: dict[str, str]) -> None:
    """One row for each family of `titles`, under its title."""
    for family, title in titles.items():
        cells = [f"{100 * score[family, lang]:.1f} %" for score in scores.values() for lang in LANGS]
        print(f"| {title} | " + " | ".join(cells) + " |")


def print_table(scores: dict[str, Scores]) -> None:
    columns = [f"{name} {lang}" for name in scores for lang in LANGS]
    print("| family | " + " | ".join(columns) + " |")
    print("| --- |" + " ---: |" * len(columns))
    print_rows(scores, {family: family for family in (*FAMILIES, "all")})


def report(folders: dict[str, Path]) -> None:
    """Prints the table of the model card."""
    cases = evaluation()
    print_table({name: accuracy(folder, cases) for name, folder in folders.items()})
    far = deep(cases)
    print_rows({name: accuracy(folder, far) for name, folder in folders.items()}, {"all": f"all, after {DEEP_TURNS} turns"})
