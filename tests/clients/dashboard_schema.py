"""Grafana's own schema reads the dashboards and writes them back: what it does not know would be missing then."""

import json
import sys

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard


def lost(ours, theirs, at):
    """Paths that are in ours and not in theirs."""
    if isinstance(ours, dict):
        for name, value in ours.items():
            if not isinstance(theirs, dict) or name not in theirs:
                yield f"{at}.{name}"
            else:
                yield from lost(value, theirs[name], f"{at}.{name}")
    elif isinstance(ours, list):
        if len(ours) != len(theirs):
            yield f"{at}: {len(ours)} became {len(theirs)}"
        for number, pair in enumerate(zip(ours, theirs)):
            yield from lost(*pair, f"{at}[{number}]")


for path in sys.argv[1:]:
    with open(path, encoding="utf-8") as file:
        ours = json.load(file)
    theirs = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(ours)))
    missing = list(lost(ours, theirs, path))
    assert not missing, "\n".join(missing)
    print(f"{path}: {len(ours['panels'])} panels")
