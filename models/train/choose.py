"""Chooses how long glimmer-1 learns: enough to be useful, and clearly the weaker version.

The fewest steps that are good enough win, on the development set alone. Whoever chose by the evaluation set would
publish the choice as a result. The card tells what was known of it when STEPS and ENOUGH were set.
"""

from dataclasses import replace
from pathlib import Path

from tokenizers import Tokenizer

from . import data, evaluate, export
from .train import RECIPES, train

NAME = "glimmer-1"
STEPS = (600, 640, 680)
ENOUGH = 0.66


def choose(tokenizer: Tokenizer, work: Path) -> None:
    """Trains candidates until one is good enough, and prints their accuracy on the development set."""
    cases = data.development()
    scores = {}
    for steps in STEPS:
        recipe = replace(RECIPES[NAME], steps=steps)
        train(NAME, recipe, tokenizer, work)
        folder = work / f"{NAME}-{steps}"
        export.export(recipe.checkpoint(work, NAME), tokenizer, folder)
        scores[f"{steps} steps"] = evaluate.accuracy(folder, cases)
        if scores[f"{steps} steps"]["all", "all"] >= ENOUGH:
            break
    evaluate.print_table(scores)
