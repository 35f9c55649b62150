"""Draw result files: reads them, measures nothing.

    python -m bench.plot bench/results/DEVICE.jsonl [--out FOLDER]
    python -m bench.plot GROWTH.json [--out FOLDER]

Writes ``NAME-glue.png`` (how many times faster than the eager reference each row of the whole glue
is) and ``NAME-ops.png`` (the same for each operation, forward and backward together), those that
the file has rows for. Where a row was measured more than once, the last one counts. Bars run from
p80 to p20 of the time; a bar below 1 is slower than the reference. Of a file that ``bench.step
--growth`` wrote: ``NAME-M.png``, ``NAME-K.png`` and ``NAME-N.png``, the time of a step over each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

from . import jsonl, step_growth

# Okabe-Ito: told apart without colour vision too.
COLOURS = {
    ("torch", "eager"): "#0072B2",
    ("triton", "eager"): "#D55E00",
    ("torch", "graph"): "#56B4E9",
    ("triton", "graph"): "#E69F00",
    ("compiled", "eager"): "#999999",
}


def latest(rows: list[dict], benchmark: str) -> dict[tuple, dict]:
    """The last timed row of each (operation, size, row, mode), forward and backward together."""
    found = {}
    for row in rows:
        if row["benchmark"] == benchmark and row.get("direction") == "both" and "p50" in row:
            found[row.get("operation"), label(row), row["row"], row["mode"]] = row
    return found


def label(row: dict) -> str:
    text = f"{row['N']}, {row['M']}, {row['K']}, {row['C']}"
    if "maps" in row:
        text += f" {row['maps']}"
    if row.get("routing", "balanced") != "balanced":
        text += f" {row['routing']}"
    if row.get("dtype", "float32") != "float32":
        text += f" {row['dtype']}"
    return text


def panel(axes, found: dict[tuple, dict], operation: str | None) -> None:
    """Bars of the speed-ups of one operation: a group a size, a bar a row."""
    here = {key[1:]: row for key, row in found.items() if key[0] == operation}
    sizes = list(dict.fromkeys(size for size, _, _ in here))
    kinds = [kind for kind in COLOURS if any((size, *kind) in here for size in sizes)]
    width = 0.8 / max(len(kinds), 1)
    for i, kind in enumerate(kinds):
        for j, size in enumerate(sizes):
            row, base = here.get((size, *kind)), here.get((size, "reference", "eager"))
            if row is None or base is None:
                continue
            x, speedup = j + (i - (len(kinds) - 1) / 2) * width, base["p50"] / row["p50"]
            span = [
                [speedup - base["p50"] / max(row["p80"], row["p50"])],
                [base["p50"] / min(row["p20"], row["p50"]) - speedup],
            ]
            name = " ".join(kind) if j == 0 else None
            axes.bar(x, speedup, width * 0.92, color=COLOURS[kind], label=name)
            axes.errorbar(x, speedup, yerr=span, color="#333333", linewidth=0.8, capsize=2)
            high = base["p50"] / min(row["p20"], row["p50"])
            axes.text(x, high * 1.04, f"{speedup:.1f}", ha="center", va="bottom", fontsize=7)
    axes.axhline(1, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_yscale("log", base=2)
    low, high = axes.get_ylim()
    axes.set_ylim(min(low, 0.45), high * 1.25)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.set_xticks(range(len(sizes)), sizes, rotation=30, ha="right", fontsize=7)
    axes.spines[["top", "right"]].set_visible(False)


def figure(rows: list[dict], benchmark: str) -> plt.Figure | None:
    """One panel an operation, or None where the file has no such rows."""
    found = latest(rows, benchmark)
    if not found:
        return None
    operations = list(dict.fromkeys(key[0] for key in found))
    columns = min(len(operations), 3)
    lines = -(-len(operations) // columns)
    size = (7 if columns == 1 else 4.2 * columns, 3.6 * lines + 0.6)
    drawn, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for i, panel_axes in enumerate(axes.flat):
        if i >= len(operations):
            panel_axes.set_visible(False)
            continue
        panel(panel_axes, found, operations[i])
        panel_axes.set_title(operations[i] or "whole glue", fontsize=9, loc="left")
        panel_axes.set_xlabel("N, M, K, C", fontsize=8)
    axes[0, 0].set_ylabel("times faster than the eager reference", fontsize=8)
    axes[0, 0].legend(fontsize=7, frameon=False)
    last = next(reversed(found.values()))
    commits = ", ".join(dict.fromkeys(row["commit"] for row in found.values()))
    drawn.suptitle(
        f"forward and backward, {last['device']}, {last['threads']} host thread(s), "
        f"torch {last['torch']}, {commits}",
        fontsize=8,
    )
    return drawn


def main(argv: list[str] | None = None) -> list[Path]:
    parser = argparse.ArgumentParser(prog="bench.plot", description=__doc__.split("\n")[0])
    parser.add_argument(
        "file", type=Path, help="JSON lines of bench.ops and bench.glue, or JSON of bench.step"
    )
    parser.add_argument("--out", type=Path, help="folder of the PNGs; default beside the file")
    args = parser.parse_args(argv)
    folder = args.out or args.file.parent
    if args.file.suffix == ".json":
        found = json.loads(args.file.read_text())
        if "growth" not in found:
            parser.error(f"{args.file} has no growth to draw: write it by bench.step --growth")
        written = step_growth.draw(found["growth"], folder, args.file.stem)
        print("\n".join(map(str, written)))
        return written
    rows, written = jsonl.read(args.file), []
    folder.mkdir(parents=True, exist_ok=True)
    for benchmark in ("glue", "ops"):
        drawn = figure(rows, benchmark)
        if drawn is not None:
            written.append(folder / f"{args.file.stem}-{benchmark}.png")
            drawn.savefig(written[-1], dpi=130)
            plt.close(drawn)
    print("\n".join(map(str, written)) or "no rows to draw")
    return written


if __name__ == "__main__":
    main()
