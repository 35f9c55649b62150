"""Cells of the tables that ``bench.gpu_table`` writes: values of results, as a reader sees them."""

from __future__ import annotations

import re


def markdown(head: list[str], body: list[list[str]]) -> list[str]:
    if not body:
        return []
    rule = ["---", *["---:"] * (len(head) - 1)]
    rows = [[text.replace("|", "\\|") for text in cells] for cells in [head, rule, *body]]
    return ["\n".join("| " + " | ".join(cells) + " |" for cells in rows)]


def notes_of(found: list[dict]) -> list[str]:
    """Of rows that have no time, why."""
    lines = [f"- {row['name']}: {row.get('note', '-')}" for row in found if not row["ok"]]
    return ["\n".join(lines)] if lines else []


def memory(row: dict, dense: dict) -> str:
    """A step's peak memory, and how much that is of dense's."""
    peak, most = row.get("peak_memory"), dense.get("peak_memory")
    # What torch's own captured networks hold was there before the step: it is not known.
    if peak is None or row["name"].startswith("captured single"):
        return "-"
    return f"{peak / 2**30:.1f}" + (f" ({peak / most:.2f})" if most else "")


def kernel_name(name: str) -> str:
    """A kernel's own name: without its namespaces, templates and arguments, and not too long."""
    name = re.split(r"[<(]", name.removeprefix("void "))[0]
    return name.rpartition("::")[2][:50]


def milliseconds(row: dict, spread: bool = False) -> str:
    """A row's median, and its spread; or the mean of one cycle, where time did not do for more."""
    median = ms(row.get("p50"))
    if row.get("rounds") == 1:
        return f"{median} (one cycle)"
    return f"{median} ({ms(row['p20'])}-{ms(row['p80'])})" if spread else median


def ms(seconds: float | None) -> str:
    return cell(seconds, unit=1e3)


def cell(value: float | None, text: str = "{:.2f}", unit: float = 1.0) -> str:
    """unit: how many of the text's make one of the value's."""
    return "-" if value is None else text.format(value * unit)
