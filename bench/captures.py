"""What captured graphs make of traces of routings: captures, hits and padding.

    python -m bench.captures [--steps 500] [--seeds 3] [--n 48] [--k 2] [--m 5] [--trace FILE ...]

Replays ``bench.routing_traces``, or recorded ones, through the rule by which the executor chooses
sizes, and through the one for experts that must not be padded. Nothing is run or captured. A hit is
a group for which a graph was there when its step began, hits late those after step 50; late
captures likewise. Padding is its share of the rows that graphs were replayed with. Groups of one
row, which always run eagerly in training, count for nothing.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hubpath_fast.executors.graphs.capacities import CapacitySizes, SeenSizes, Sizes

from .routing_traces import KINDS, Trace, draw

LATE = 50  # steps, after which nothing should stall any more
RULES = {"padded": CapacitySizes, "exact": lambda: SeenSizes(buckets=False)}


@dataclass
class Outcome:
    """Of one trace. late: the step from which on groups and hits are counted. graphs: by expert,
    the sizes in the order of their captures."""

    late: int
    graphs: list[list[int]]
    captured_at: list[int] = field(default_factory=list)  # steps
    late_groups: int = 0
    late_hits: int = 0
    rows: int = 0  # valid ones, of all replays
    padded: int = 0

    @property
    def captures(self) -> int:
        return sum(map(len, self.graphs))

    @property
    def late_captures(self) -> int:
        return sum(step >= self.late for step in self.captured_at)

    @property
    def hit_rate(self) -> float:
        return self.late_hits / self.late_groups if self.late_groups else math.nan

    @property
    def padding(self) -> float:
        return self.padded / (self.rows + self.padded) if self.rows else math.nan


def replay(trace: Trace, rule: Callable[[], Sizes], late: int = LATE) -> Outcome:
    """What the executor does with such steps."""
    experts = [rule() for _ in trace.counts[0]]
    found = Outcome(late, [[] for _ in experts])
    for step, (samples, counts) in enumerate(zip(trace.samples, trace.counts, strict=True)):
        for sizes, count in zip(experts, counts, strict=True):
            sizes.step(count, samples)
        for sizes, graphs, count in zip(experts, found.graphs, counts, strict=True):
            if count < 2:
                continue
            hit = sizes.place(count, graphs) is not None
            for size in sizes.wanted(count, graphs):
                graphs.append(size)
                sizes.captured(size)
                found.captured_at.append(step)
            place = sizes.place(count, graphs)
            if place is not None:
                found.rows += count
                found.padded += place - count
            if step >= late:
                found.late_groups += 1
                found.late_hits += hit
    return found


def _line(name: str, seed: str, rule: str, found: Outcome) -> str:
    return (
        f"{name:20} {seed:>4} {rule:7} {found.captures:8} {found.late_captures:13} "
        f"{found.hit_rate:9.2%} {found.padding:8.1%}"
    )


def summary(found: dict[tuple[str, str], list[Outcome]]) -> str:
    """A table of medians over the seeds, with their ranges, by trace and rule."""
    lines = [
        "| routings | sizes | captures | late captures | hits late | padding |",
        "|---|---|---|---|---|---|",
    ]
    for (trace, rule), outcomes in found.items():
        cells = [
            _spread([getattr(outcome, name) for outcome in outcomes], form)
            for name, form in (
                ("captures", "{:g}"),
                ("late_captures", "{:g}"),
                ("hit_rate", "{:.2%}"),
                ("padding", "{:.1%}"),
            )
        ]
        lines.append(f"| {trace} | {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _spread(values: list[float], form: str) -> str:
    low, middle, high = (form.format(of(values)) for of in (min, statistics.median, max))
    return middle if low == high else f"{middle} ({low} to {high})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.captures", description="Captures on traces.")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n", type=int, default=48, help="samples of a step")
    parser.add_argument("--k", type=int, default=2, help="experts asked by a sample")
    parser.add_argument("--m", type=int, default=5, help="experts")
    parser.add_argument("--trace", type=Path, nargs="*", default=[], help="recorded ones, as JSON")
    given = parser.parse_args(arguments)
    size = {"steps": given.steps, "n": given.n, "k": given.k, "m": given.m}
    traces = [
        (str(seed), draw(kind, seed, **size)) for kind in KINDS for seed in range(given.seeds)
    ]
    traces = [("-", Trace.load(path)) for path in given.trace] or traces
    print(f"{'trace':20} seed {'sizes':7} captures late captures hits late  padding")
    found: dict[tuple[str, str], list[Outcome]] = {}
    for seed, trace in traces:
        for rule, make in RULES.items():
            outcome = replay(trace, make)
            print(_line(trace.name, seed, rule, outcome))
            found.setdefault((trace.name, rule), []).append(outcome)
    print(summary(found))


if __name__ == "__main__":
    main()
