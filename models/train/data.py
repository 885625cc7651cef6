"""Conversations for training, development and evaluation, drawn from the task families.

Training batches are a pure function of (seed, step), so a resumed run sees exactly the data an uninterrupted one would.
Slots are held out of training by a hash; of the held-out ones, development has those that evaluation did not take:
recipes are chosen on the former, so that the latter is looked at afterwards.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Set
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer

from .families import FAMILIES, SYSTEM_PROMPTS
from .tokenizer import END_OF_TEXT, IM_END, IM_START, render

HELD_OUT_PERCENT = 8
CASES_PER_FAMILY = 100
EVAL_SEED, DEV_SEED = 20_000, 30_000
VOCABULARY_CHATS, VOCABULARY_SEED = 20_000, 7

# A batch holds BATCH_TOKENS tokens, as rows of one of these lengths: mostly short, but every distance is trained.
BATCH_TOKENS = 4096
ROW_LENGTHS, ROW_WEIGHTS = [256, 512, 1024, 2048], [70, 20, 7, 3]

# Prompts are random, so predicting them teaches little. An answer of n tokens weighs ANSWER_WEIGHT·√n, shared by its
# tokens: weighed by tokens, a long count would drown out a sum, which is the harder lesson.
PROMPT_WEIGHT = 0.05
ANSWER_WEIGHT = 2.0


# A family and its slots: what makes two tasks the same task, whatever the wording or language.
Combination = tuple


@dataclass(frozen=True)
class Task:
    family: str
    lang: str
    slots: tuple
    prompt: str
    answer: str

    @property
    def combination(self) -> Combination:
        return (self.family, *self.slots)


@dataclass(frozen=True)
class Chat:
    tasks: list[Task]
    messages: list[dict]


@dataclass(frozen=True)
class Case:
    """A held-out task, behind a system prompt or earlier (trained-on) turns or neither."""
    task: Task
    messages: list[dict]

    def line(self) -> str:
        fields = {"family": self.task.family, "lang": self.task.lang, "messages": self.messages, "answer": self.task.answer}
        return json.dumps(fields, ensure_ascii=False) + "\n"


def is_held_out(family: str, slots: tuple) -> bool:
    """Whether a slot combination is kept from training. Depends on nothing but the slots, so it can never drift."""
    digest = hashlib.blake2b(json.dumps([family, *slots], ensure_ascii=False).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % 100 < HELD_OUT_PERCENT


def draw(rng: Random, family: str, lang: str, held_out: bool) -> Task:
    """A task of the wanted side of the split."""
    make, _ = FAMILIES[family]
    while True:
        slots, prompt, answer = make(rng, lang)
        if is_held_out(family, slots) == held_out:
            return Task(family, lang, slots, prompt, answer)


def draw_training(rng: Random) -> Task:
    family = rng.choices(list(FAMILIES), [share for _, share in FAMILIES.values()])[0]
    return draw(rng, family, rng.choice(["en", "ko"]), held_out=False)


def system(rng: Random, lang: str) -> list[dict]:
    return [{"role": "system", "content": rng.choice(SYSTEM_PROMPTS[lang])}] if rng.random() < 0.2 else []


def turn(task: Task) -> list[dict]:
    return [{"role": "user", "content": task.prompt}, {"role": "assistant", "content": task.answer}]


def draw_chat(rng: Random, max_turns: int) -> Chat:
    """Half have a single turn, the others up to `max_turns`."""
    turns = 1 if rng.random() < 0.5 else rng.randint(2, max_turns)
    tasks = [draw_training(rng) for _ in range(turns)]
    return Chat(tasks, system(rng, tasks[0].lang) + [message for task in tasks for message in turn(task)])


def vocabulary_chats() -> Iterator[Chat]:
    """What the tokenizer learns its vocabulary from."""
    rng = Random(VOCABULARY_SEED)
    return (draw_chat(rng, 4) for _ in range(VOCABULARY_CHATS))


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

    def drawn(self, step: int) -> tuple[int, list[list[tuple[Chat, list[int]]]]]:
        """The length of a step's rows, and for each row the chats that fill it, with their tokens."""
        rng = Random(f"{self.seed}:{step}")
        length = rng.choices(ROW_LENGTHS, ROW_WEIGHTS)[0]
        return length, [list(self.fill(rng, length)) for _ in range(BATCH_TOKENS // length)]

    def fill(self, rng: Random, length: int) -> Iterator[tuple[Chat, list[int]]]:
        filled = 0
        while filled <= length:
            # About 25 tokens a turn: the longest chats of a row fill it.
            chat = draw_chat(rng, max(4, length // 25))
            ids = self.tokenizer.encode(render(chat.messages) + END_OF_TEXT, add_special_tokens=False).ids
            filled += len(ids)
            yield chat, ids

    def pack(self, row: list[list[int]], length: int) -> tuple[list[int], list[float], list[int]]:
        ids = [token for piece in row for token in piece]
        weights = [w for piece in row for w in loss_weights(piece, self.start, self.end, self.assistant)]
        chats = [chat for chat, piece in enumerate(row) for _ in piece]
        # The first token of a chat cannot be predicted from the chat before it.
        targets = [w if a == b else 0.0 for w, a, b in zip(weights[1:], chats[1:], chats)]
        return ids[: length + 1], targets[:length], chats[:length]

    def __call__(self, step: int):
        """inputs, targets, loss weights [B, T] and the chat each token belongs to."""
        length, rows = self.drawn(step)
        packed = [self.pack([ids for _, ids in row], length) for row in rows]
        ids, weights, chats = (torch.tensor(column) for column in zip(*packed))
        return ids[:, :-1], ids[:, 1:], weights, chats


def held_out_cases(seed: int, taken: Set[Combination]) -> list[Case]:
    """Half Korean, distinct prompts, no task that is taken."""
    rng, cases = Random(seed), []
    for family in FAMILIES:
        seen = set()
        for lang, filled in (("en", CASES_PER_FAMILY // 2), ("ko", CASES_PER_FAMILY)):
            while len(seen) < filled:
                task = draw(rng, family, lang, held_out=True)
                if task.prompt in seen or task.combination in taken:
                    continue
                seen.add(task.prompt)
                before = [turn(draw_training(rng)) for _ in range(rng.choice([0, 0, 0, 0, 1, 2]))]
                cases.append(Case(task, system(rng, lang) + [m for t in before for m in t] + turn(task)[:1]))
    return cases


def evaluation() -> list[Case]:
    return held_out_cases(EVAL_SEED, taken=frozenset())


def development() -> list[Case]:
    return held_out_cases(DEV_SEED, taken={case.task.combination for case in evaluation()})


def write_evaluation(path: Path) -> None:
    path.write_text("".join(case.line() for case in evaluation()), encoding="utf-8")
