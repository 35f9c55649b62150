"""The tables of ``hubpath atari demo`` over seeds, as they stand in docs/atari.md: trains nothing.

    for seed in 0 1 2; do hubpath atari demo --seed $seed --out demo-$seed; done
    python -m bench.atari_demo_table demo-0 demo-1 demo-2

Prints, in Markdown: points by method and game, mean and standard deviation over the seeds; by how
much each hub is ahead, seed by seed, with the word that its interval allows; and whom each hub
asks, by game.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Summary = Mapping[str, Any]


def read_summaries(folders: Sequence[Path]) -> list[Summary]:
    """Raises SystemExit where one is no finished demo, or they are of other steps or one seed."""
    found = []
    for folder in folders:
        path = folder / "summary.json"
        if not path.is_file():
            raise SystemExit(f"{path} is missing: {folder} holds no finished demo")
        found.append(json.loads(path.read_text(encoding="utf-8")))
    if len({(s["steps"], s["episodes"]) for s in found}) > 1:
        raise SystemExit("the demos are of different steps or episodes and make no table")
    if len({s["seed"] for s in found}) < len(found):
        raise SystemExit("two of the demos are of the same seed")
    return found


def tables(summaries: Sequence[Summary]) -> str:
    return "\n\n".join((_points(summaries), _leads(summaries), _weights(summaries)))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *rows))


def _spread(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def _points(summaries: Sequence[Summary]) -> str:
    games = list(summaries[0]["sources"])
    lines = [("actions at random", [s["random"] for s in summaries])]
    for name, row in summaries[0]["methods"].items():
        lines.append((row["title"], [s["methods"][name] for s in summaries]))
    rows = [
        [title, _spread([own["score"] for own in found])]
        + [_spread([own["by_game"][game] for own in found]) for game in games]
        for title, found in lines
    ]
    return _table(["", "medley", *games], rows)


def _leads(summaries: Sequence[Summary]) -> str:
    pairs = {}
    for summary in summaries:
        titles = {name: row["title"] for name, row in summary["methods"].items()}
        for d in summary["differences"]:
            rival = "from scratch" if d["rival"] == "scratch" else "the best fine-tuned source"
            text = f"{d['value']:+.2f} ({d['low']:+.2f} to {d['high']:+.2f}): {d['said']}"
            pairs.setdefault(f"{titles[d['method']]} against {rival}", []).append(text)
    head = ["", *(f"seed {summary['seed']}" for summary in summaries)]
    return _table(head, [[name, *texts] for name, texts in pairs.items()])


def _weights(summaries: Sequence[Summary]) -> str:
    experts = list(summaries[0]["sources"])
    rows = []
    for hub in summaries[0]["weights"]:
        title = summaries[0]["methods"][hub]["title"]
        for game in experts:
            own = [[s["weights"][hub][game][expert] for expert in experts] for s in summaries]
            cells = [
                " / ".join(f"{value:.2f}" for value in column) for column in zip(*own, strict=True)
            ]
            rows.append([f"{title}, episodes of {game}", *cells])
    return _table(["", *(f"policy of {expert}" for expert in experts)], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("folders", nargs="+", type=Path, help="of finished demos, one a seed")
    print(tables(read_summaries(parser.parse_args(arguments).folders)))


if __name__ == "__main__":
    main()
