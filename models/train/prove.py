"""Proves that nothing that was trained on is evaluated: makes the whole training stream again and looks for it.

It does not trust the hash that holds slots out: what counts is what the tokenizer and every step of every version were
given, turn by turn.
"""

from collections import Counter
from collections.abc import Set
from pathlib import Path

from tokenizers import Tokenizer

from . import data
from .data import FAMILIES, Batches, Case, Combination
from .train import Recipe

PROGRESS_EVERY = 400


def trained(recipes: dict[str, Recipe], tokenizer: Tokenizer) -> set[Combination]:
    """Every combination that the vocabulary or a version has learned from."""
    seen = {task.combination for chat in data.vocabulary_chats() for task in chat.tasks}
    for name, recipe in recipes.items():
        batches = Batches(tokenizer, recipe.seed)
        for step in range(recipe.steps):
            _, rows = batches.drawn(step)
            seen |= {task.combination for row in rows for chat, _ in row for task in chat.tasks}
            if (step + 1) % PROGRESS_EVERY == 0 or step + 1 == recipe.steps:
                print(f"{name} step {step + 1}/{recipe.steps}: {len(seen):,} combinations so far", flush=True)
    return seen


def combinations(cases: list[Case]) -> set[Combination]:
    return {case.task.combination for case in cases}


def require_disjoint(sets: dict[str, Set[Combination]]) -> None:
    """Raises with an example for the first two sets that share a combination."""
    names = list(sets)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            if shared := sets[one] & sets[other]:
                raise SystemExit(f"{one} and {other} share {len(shared)} combinations, as {sorted(shared, key=repr)[0]}")


def require_alert(sets: dict[str, Set[Combination]]) -> None:
    """A check that cannot fail proves nothing: one combination too many in any set must be noticed."""
    for one in sets:
        for other in sets.keys() - {one}:
            try:
                require_disjoint({**sets, one: sets[one] | {next(iter(sets[other]))}})
            except SystemExit:
                continue
            raise SystemExit(f"a combination of {other} among those of {one} was not noticed")


def prove(recipes: dict[str, Recipe], tokenizer: Tokenizer, eval_path: Path) -> None:
    evaluation = data.evaluation()
    if eval_path.read_text(encoding="utf-8") != "".join(case.line() for case in evaluation):
        raise SystemExit(f"{eval_path.name} is not what `data` writes: its slots are unknown")
    sets = {
        "training": trained(recipes, tokenizer),
        "development": combinations(data.development()),
        "evaluation": combinations(evaluation),
    }
    require_disjoint(sets)
    require_alert(sets)

    print("No combination is in two of these sets:\n")
    print("| combinations | " + " | ".join(sets) + " |")
    print("| --- |" + " ---: |" * len(sets))
    counts = {name: Counter(family for family, *_ in found) for name, found in sets.items()}
    for family in FAMILIES:
        print(f"| {family} | " + " | ".join(f"{count[family]:,}" for count in counts.values()) + " |")
