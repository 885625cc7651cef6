"""Command line: one subcommand a stage, in the order in which they are run. `all` runs them in turn."""

import argparse
from pathlib import Path

import torch
from tokenizers import Tokenizer

from . import choose, data, evaluate, export, goldens, prove, tokenizer, train

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
EVALUATION = MODELS / "eval.jsonl"
FOLDERS = {name: MODELS / name for name in train.RECIPES}
GOLDENS = ROOT / "runtime" / "tests" / "golden"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m models.train", description="Makes the Glimmer models.")
    parser.add_argument("--work", type=Path, default=ROOT / "target" / "glimmer", help="folder for the tokenizer and checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    stages.add_parser("data", help="write models/eval.jsonl, the evaluation set")
    stages.add_parser("tokenizer", help="train the tokenizer that both versions share")
    stages.add_parser("choose", help=f"compare lengths of {choose.NAME}'s training on the development set (not part of `all`)")
    for stage, text in (("train", "train a version, or continue it"), ("export", "write models/VERSION")):
        stages.add_parser(stage, help=text).add_argument("version", choices=FOLDERS)
    stages.add_parser("prove", help="make the training data again and show that nothing held out is in it")
    stages.add_parser("evaluate", help="accuracy of the exported folders, as a table")
    stages.add_parser("goldens", help="write the reference outputs that the runtime and the gateway are tested against")
    stages.add_parser("all", help="everything but `choose`, in this order, for both versions")
    return parser.parse_args()


def run(stage: str, version: str | None, work: Path) -> None:
    def vocabulary() -> Tokenizer:
        return Tokenizer.from_file(str(work / "tokenizer.json"))

    match stage:
        case "data":
            data.write_evaluation(EVALUATION)
        case "tokenizer":
            tokenizer.train(tokenizer.render(chat.messages) for chat in data.vocabulary_chats()).save(str(work / "tokenizer.json"))
        case "choose":
            choose.choose(vocabulary(), work)
        case "train":
            train.train(version, train.RECIPES[version], vocabulary(), work)
        case "export":
            export.export(train.RECIPES[version].checkpoint(work, version), vocabulary(), FOLDERS[version])
        case "prove":
            # With the committed tokenizer: needs no training.
            prove.prove(train.RECIPES, Tokenizer.from_file(str(MODELS / "glimmer-1" / "tokenizer.json")), EVALUATION)
        case "evaluate":
            evaluate.report(FOLDERS)
        case "goldens":
            goldens.write(FOLDERS, GOLDENS)
        case "all":
            for stage in ("data", "tokenizer"):
                run(stage, None, work)
            for name in FOLDERS:
                run("train", name, work)
                run("export", name, work)
            for stage in ("prove", "evaluate", "goldens"):
                run(stage, None, work)


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    run(args.stage, getattr(args, "version", None), args.work)


if __name__ == "__main__":
    main()
