"""Conversations for training and evaluation, drawn from the task families.

Training batches are a pure function of (seed, step), so a resumed run sees exactly the data an uninterrupted one would.
"""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from .families import FAMILIES, SYSTEM_PROMPTS
from .tokenizer import END_OF_TEXT, IM_END, IM_START, render

HELD_OUT_PERCENT = 8
EVAL_PER_FAMILY = 100
EVAL_SEED = 20_000

# A batch holds BATCH_TOKENS tokens, as rows of one of these lengths: mostly short, but every distance is trained.
BATCH_TOKENS = 4096
ROW_LENGTHS, ROW_WEIGHTS = [256, 512, 1024, 2048], [70, 20, 7, 3]

# Prompts are random, so predicting them teaches little. An answer of n tokens weighs ANSWER_WEIGHT·√n, shared by its
# tokens: weighed by tokens, a long count would drown out a sum, which is the harder lesson.
PROMPT_WEIGHT = 0.05
ANSWER_WEIGHT = 2.0


@dataclass(frozen=True)
class Task:
    family: str
    lang: str
    prompt: str
    answer: str


def is_held_out(family: str, slots: tuple) -> bool:
    """Whether a slot combination belongs to evaluation. Depends on nothing but the slots, so it can never drift."""
    digest = hashlib.blake2b(json.dumps([family, *slots], ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def draw(rng: Random, family: str, lang: str, held_out: bool) -> Task:
    """A task of the wanted side of the split."""
    make, _ = FAMILIES[family]
    while True:
        slots, prompt, answer = make(rng, lang)
        if is_held_out(family, slots) == held_out:
            return Task(family, lang, prompt, answer)


def draw_training(rng: Random) -> Task:
    family = rng.choices(list(FAMILIES), [share for _, share in FAMILIES.values()])[0]
    return draw(rng, family, rng.choice(["en", "ko"]), held_out=False)


def system(rng: Random, lang: str) -> list[dict]:
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS[lang])}] if rng.random() < 0.2 else []


def turn(task: Task) -> list[dict]:
    return [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]


def conversation(rng: Random, max_turns: int) -> list[dict]:
    """One chat: half have a single turn, the others up to `max_turns`."""
    turns = 1 if rng.random() < 0.5 else rng.randint(2, max_turns)
    tasks = [draw_training(rng) for _ in range(turns)]
    return system(rng, tasks[0].lang) + [message for task in tasks for message in turn(task)]


def loss_weights(ids: list[int], start: int, end: int, assistant: int) -> list[float]:
    """A weight for each token: answers are what the assistant writes, the closing `<|im_end|>` included."""
    weights = [PROMPT_WEIGHT] * len(ids)
    for i, token in enumerate(ids):
        if token == start and ids[i + 1] == assistant:
            first = i + 3  # after `<|im_start|>`, the role and the line break
            last = ids.index(end, first)
            size = last + 1 - first
            weights[first : last + 1] = [ANSWER_WEIGHT / math.sqrt(size)] * size
    return weights


class Batches:
    """Packed rows: several chats a row, each attending only to itself, the last one cut at the row's end."""

    def __init__(self, tokenizer: Tokenizer, seed: int):
        self.tokenizer, self.seed = tokenizer, seed
        self.start, self.end = tokenizer.token_to_id(IM_START), tokenizer.token_to_id(IM_END)
        self.assistant = tokenizer.token_to_id("assistant")

    def row(self, rng: Random, length: int):
        ids, weights, chats = [], [], []
        chat = 0
        while len(ids) <= length:
            # About 25 tokens a turn: the longest chats of a row fill it.
            text = render(conversation(rng, max(4, length // 25))) + END_OF_TEXT
            piece = self.tokenizer.encode(text, add_special_tokens=False).ids
            ids += piece
            weights += loss_weights(piece, self.start, self.end, self.assistant)
            chats += [chat] * len(piece)
            chat += 1
        # The first token of a chat cannot be predicted from the chat before it.
        targets = [w if a == b else 0.0 for w, a, b in zip(weights[1:], chats[1:], chats)]
        return ids[: length + 1], targets[:length], chats[:length]

    def __call__(self, step: int):
        """inputs, targets, loss weights [B, T] and the chat each token belongs to."""
        rng = Random(f"{self.seed}:{step}")
        length = rng.choices(ROW_LENGTHS, ROW_WEIGHTS)[0]
        rows = [self.row(rng, length) for _ in range(BATCH_TOKENS // length)]
        ids = torch.tensor([r[0] for r in rows])
        return ids[:, :-1], ids[:, 1:], torch.tensor([r[1] for r in rows]), torch.tensor([r[2] for r in rows])


def evaluation() -> list[dict]:
    """The held-out set: half Korean, distinct prompts, some behind a system prompt or earlier (trained-on) turns."""
    rng, cases = Random(EVAL_SEED), []
    for family in FAMILIES:
        seen = set()
        for lang, filled in (("en", EVAL_PER_FAMILY // 2), ("ko", EVAL_PER_FAMILY)):
            while len(seen) < filled:
                task = draw(rng, family, lang, held_out=True)
                if task.prompt in seen:
                    continue
                seen.add(task.prompt)
                before = [turn(draw_training(rng)) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
                messages = system(rng, lang) + [m for t in before for m in t] + turn(task)[:1]
                cases.append({"family": family, "lang": lang, "messages": messages, "answer": task.answer})
    return cases


def write_evaluation(path: Path) -> None:
    path.write_text("".join(json.dumps(case, ensure_ascii=False) + "\n" for case in evaluation()), encoding="utf-8")
