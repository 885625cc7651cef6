"""Trains one version from scratch. Stop it at any time: run again, it continues from its last checkpoint."""

import hashlib
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F

from .data import BATCH_TOKENS, PROMPT_WEIGHT, Batches
from .model import Llama, Shape


@dataclass(frozen=True)
class Recipe:
    seed: int
    steps: int
    matrix_rate: float = 0.005
    embedding_rate: float = 2e-3

    def checkpoint(self, work: Path, name: str) -> Path:
        """One for each length: they are compared side by side."""
        return work / f"{name}-{self.steps}.pt"

    def origin(self, tokenizer: Tokenizer) -> dict:
        """What a run must share with a checkpoint to go on from it."""
        return asdict(self) | {"tokenizer": hashlib.sha256(tokenizer.to_str().encode()).hexdigest()}


# The two versions differ in seed (weights and data) and in how long they learned. `choose` tells how the first came by
# its steps.
RECIPES = {
    "glimmer-1": Recipe(seed=1, steps=640),
    "glimmer-2": Recipe(seed=2, steps=2400),
}

WARMUP_STEPS = 40
CHECKPOINT_EVERY = 100


def schedule(step: int, steps: int) -> float:
    """Linear warm-up, flat, then a linear fall to zero over the last half: the fall is where accuracy is gained."""
    return min((step + 1) / WARMUP_STEPS, 1.0, 2 * (steps - step) / steps)


def optimizers(model: Llama, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (it needs far fewer tokens here), Adam for the embedding and the norms."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_rate, momentum=0.95, weight_decay=0.01),
        torch.optim.AdamW(others, lr=recipe.embedding_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(name: str, recipe: Recipe, tokenizer: Tokenizer, work: Path) -> None:
    checkpoint, origin = recipe.checkpoint(work, name), recipe.origin(tokenizer)
    torch.manual_seed(recipe.seed)
    model = Llama(Shape(vocab=tokenizer.get_vocab_size()))
    optims = optimizers(model, recipe)
    batches = Batches(tokenizer, recipe.seed)
    first, seconds = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        if state.get("origin") != origin:
            raise SystemExit(f"{checkpoint} was trained otherwise ({state.get('origin')}, now {origin}): "
                             "move it away to train from the start")
        model.load_state_dict(state["model"])
        for optim, saved in zip(optims, state["optims"]):
            optim.load_state_dict(saved)
        first, seconds = state["step"], state["seconds"]

    began = time.monotonic()
    for step in range(first, recipe.steps):
        factor = schedule(step, recipe.steps)
        for optim, rate in zip(optims, (recipe.matrix_rate, recipe.embedding_rate)):
            optim.param_groups[0]["lr"] = rate * factor
        inputs, targets, weights, chats = batches(step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(inputs, chats)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"{name}: the loss at step {step} is {loss.item()}")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optim in optims:
            optim.step()
            optim.zero_grad()

        done = step + 1
        if done % CHECKPOINT_EVERY == 0 or done == recipe.steps:
            elapsed = seconds + time.monotonic() - began
            answers = losses.detach()[weights.flatten() > PROMPT_WEIGHT].mean().item()
            print(f"{name} step {done}/{recipe.steps} answer-loss {answers:.4f} "
                  f"tokens {done * BATCH_TOKENS:,} seconds {elapsed:.0f}", flush=True)
            partial = checkpoint.with_suffix(".partial")
            torch.save({"origin": origin, "model": model.state_dict(), "optims": [o.state_dict() for o in optims],
                        "step": done, "seconds": elapsed}, partial)
            partial.replace(checkpoint)
