"""What was aimed at on a GPU, and what was reached: each goal met, missed, or not measured.

Beside what was found stands what was predicted by counts, of bytes, launches and instructions, for
the code as it is, before that ran on a device (``results/predictions.json``): a goal that is met by
another way than one thought, or missed for another reason, is no better known than before.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass

from .records import RESULTS

Rows = dict[tuple[str, str, str], dict]  # by part, group and name
MET, MISSED, NOT_MEASURED = "met", "**missed**", "not measured"
PAPER, AGGREGATE = "48,5,2,100", "aggregate 4096,64,2,1000 bfloat16"  # N, M, K, C


@dataclass(frozen=True)
class Found:
    """A figure, and what it is of, where that is not said by the goal."""

    value: float
    of: str = ""


@dataclass(frozen=True)
class Goal:
    """value: of a run's rows; None where it was not measured. text: the figure's form. why: what is
    known of a miss: a reason, or a floor that lies beyond the goal."""

    figure: str
    value: Callable[[Rows], Found | None]
    least: float | None = None
    most: float | None = None
    text: str = "{:.2f}"
    why: str = ""

    @property
    def wanted(self) -> str:
        sign, limit = ("at least", self.least) if self.most is None else ("at most", self.most)
        return f"{sign} {self.text.format(limit)}"

    @property
    def predicted(self) -> str:
        """A range, for the code of the predictions; "-" where there is none."""
        found = predictions()["goals"].get(self.figure)
        if found is None:
            return "-"
        low, high = (self.text.format(found[key]) for key in ("low", "high"))
        return low if low == high else f"{low} to {high}"

    def line(self, rows: Rows) -> list[str]:
        """Cells: the figure, what is wanted, what was found, and how that is."""
        found = self.value(rows)
        if found is None:
            return [self.figure, self.wanted, "-", NOT_MEASURED]
        above = self.least is None or found.value >= self.least
        met = above and (self.most is None or found.value <= self.most)
        said = self.text.format(found.value) + (f" ({found.of})" if found.of else "")
        return [self.figure, self.wanted, said, MET if met else MISSED]


@functools.cache
def predictions() -> dict:
    """commit, date; and by a goal's figure "low", "high" and "by", what they come of."""
    return json.loads((RESULTS / "predictions.json").read_text())


def row(rows: Rows, group: str, name: str) -> dict | None:
    """A row that was timed."""
    found = rows.get(("speed", group, name))
    return found if found is not None and found["ok"] else None


def over(numerator: dict | None, denominator: dict | None, key: str = "p50") -> float | None:
    """A ratio of two rows' values; None where one is missing."""
    values = [part.get(key) for part in (numerator, denominator) if part is not None]
    return values[0] / values[1] if len(values) == 2 and all(values) else None


def ratio(group: str, numerator: str, denominator: str, key: str = "p50"):
    def value(rows: Rows) -> Found | None:
        found = over(row(rows, group, numerator), row(rows, group, denominator), key)
        return None if found is None else Found(found)

    return value


def copy_of(rows: Rows) -> float | None:
    """Bytes per second of the newest measured copy."""
    found = row(rows, "ceilings", "copy")
    return found and found["bytes_per_second"]


def share(rows: Rows, timed: dict) -> float | None:
    """Of the bandwidth of the newest copy; None where the row moves no bytes that are counted."""
    copy = copy_of(rows)
    if copy is None or "fewest_bytes" not in timed:
        return timed.get("share_of_copy")
    return timed["fewest_bytes"] / timed["p50"] / copy


def roof(name: str):
    """The lowest share of forward and backward, of the sizes that start with this name."""

    def value(rows: Rows) -> Found | None:
        shares = {
            key[2]: share(rows, found)
            for key, found in rows.items()
            if key[:2] == ("speed", "roof") and key[2].startswith(name)
            and key[2].endswith(" graph") and not {"reference", "repeat"} & set(key[2].split())
            and "p50" in found and found["ok"]
        }  # fmt: skip
        if not shares:
            return None
        lowest = min(shares, key=shares.__getitem__)
        of = lowest.split()[-2]
        if len({key.split()[1] for key in shares}) > 1:
            of += f" of {lowest.split()[1]}"
        told = [of, *_beside(rows, lowest, shares[lowest])]
        return Found(shares[lowest], ", ".join(told))

    return value


# Operations that do not write as much as they read, and the copies of their mix.
MIXES = {
    ("gather", "forward"): "1:2",
    ("gather", "backward"): "2:1",
    ("combine", "backward"): "2:1",
}
TWO_SPEEDS = 1.05  # a median so many times the fastest fifth is of a row that has two speeds


def _beside(rows: Rows, name: str, share: float) -> list[str]:
    """What else a share is to be read with: that of a copy of the same mix of reads and writes, and
    of the fastest fifth of the samples, where the row has two speeds. The goal goes by neither."""
    timed, words = rows["speed", "roof", name], name.split()
    told = ["above the copy"] * (share > 1)
    mix = MIXES.get((words[0], words[-2]))
    ceiling, copy = row(rows, "ceilings", f"copy {mix}"), copy_of(rows)
    same_rounds = row(rows, "roof", " ".join([*words[:-2], "repeat", *words[-2:]]))
    if same_rounds is not None:
        told.append(f"{same_rounds['p50'] / timed['p50']:.0%} of a copy of its mix")
    elif ceiling is not None and copy is not None:
        told.append(f"{share * copy / ceiling['bytes_per_second']:.0%} of a copy of its mix")
    if timed["p50"] > TWO_SPEEDS * timed["p20"]:
        told.append(f"{share * timed['p50'] / timed['p20']:.0%} in the fastest fifth")
    return told


def larger_batches(rows: Rows) -> Found | None:
    """Graphs on 256 samples against one expert after another, which is what ``auto`` runs where the
    graphs do not fit into their share of the memory."""
    graphs = rows.get(("speed", "large", "graphs, 8 lanes"))
    if graphs is not None and "graphs would need some" in graphs.get("note", ""):
        return Found(1.0, "they do not fit: auto runs sequential")
    return ratio("large", "sequential", "graphs, 8 lanes")(rows)


def graphs(rows: Rows) -> list[dict]:
    """The paper's step as captured graphs on so many lanes, the fastest first."""
    found = [
        timed
        for key, timed in rows.items()
        if key[0] == "speed" and key[1] == "graphs" and key[2].startswith("graphs, ")
        and timed["ok"] and "p50" in timed
    ]  # fmt: skip
    return sorted(found, key=lambda timed: timed["p50"])


def fastest(key: str):
    """A value of the fastest of these rows."""

    def value(rows: Rows) -> Found | None:
        for best in graphs(rows)[:1]:
            if key in best:
                return Found(best[key], best["name"])
        return None

    return value


def against_fastest(name: str, key: str = "p50", inverse: bool = False):
    """Another way to run the paper's step, over the fastest of these rows; or the inverse."""

    def value(rows: Rows) -> Found | None:
        for best in graphs(rows)[:1]:
            pair = (best, row(rows, "step", name))
            found = over(*(pair if inverse else pair[::-1]), key)
            return None if found is None else Found(found, best["name"])
        return None

    return value


LEAST_STEPS = 200  # that a p95 is of


def stalls(rows: Rows) -> Found | None:
    """p95 of single steps over their median, of the worse of the streams of routings."""
    found = [
        Found(timed["p95"] / timed["p50"], key[2])
        for key, timed in rows.items()
        if key[:2] == ("speed", "stream") and timed["ok"] and timed.get("rounds", 0) >= LEAST_STEPS
    ]
    return max(found, key=lambda one: one.value, default=None)


def beyond(rows: Rows) -> Found | None:
    """The worse of the executors."""
    found = [
        Found(timed["growth_beyond_smaller_groups"], key[2].partition(",")[0])
        for key, timed in rows.items()
        if key[:2] == ("speed", "growth")
        and timed["ok"]
        and "growth_beyond_smaller_groups" in timed
    ]
    return max(found, key=lambda one: one.value, default=None)


def captured_agent(rows: Rows) -> Found | None:
    """How many times as fast captured steps of an agent are, of the method with the least gain."""
    found = {
        method: over(
            row(rows, "agent", f"{method} eager"), row(rows, "agent", f"{method} captured")
        )
        for method in ("scratch", "hub")
    }
    if not all(found.values()):
        return None
    least = min(found, key=found.__getitem__)
    return Found(found[least], least)


TIMES, SHARE = "{:.2f}x", "{:.0%}"
GOALS = (
    Goal("glue of the paper's step, times as fast as the eager reference",
         ratio("glue", f"{PAPER} reference eager", f"{PAPER} triton eager"), 4.0, text=TIMES,
         why="the host: 30 launches, and the device is busy for 58 of 2,000 us"),
    Goal("glue of the paper's step, times as fast as the compiled reference",
         ratio("compiled", f"{PAPER} compiled eager", f"{PAPER} triton eager"), 1.5, text=TIMES),
    Goal("router (262144, 64, 2), share of a copy", roof("noisy_topk "), 0.6, text=SHARE,
         why="instructions, not bytes: as long on a card with 1.4 times the bandwidth"),
    Goal("gather of 4 GB, share of a copy", roof("gather "), 0.85, text=SHARE,
         why="the device has two speeds for it, of which the median is the slower"),
    Goal("combine of 4 GB, share of a copy", roof("combine "), 0.8, text=SHARE),
    Goal("exploit loss, share of a copy", roof("exploit_loss "), 0.8, text=SHARE),
    Goal("BatchNorm of 56 x 56 x 256 in bf16, share of a copy",
         roof("masked_batch_norm 20/24,256,56x56,"), 0.8, text=SHARE),
    Goal("aggregate (4096, 64, 2, 1000) bf16, times as fast as its dense form",
         ratio("aggregate", f"{AGGREGATE} dense graph", f"{AGGREGATE} triton graph"), 5.0,
         text=TIMES),
    Goal("aggregate (4096, 64, 2, 1000) bf16, peak memory over its dense form's",
         ratio("aggregate", f"{AGGREGATE} triton eager", f"{AGGREGATE} dense eager",
               "peak_memory"), most=0.1, text="{:.3f}",
         why="a floor: what every form returns, gradients and y, is 0.125; ours is 1.007 of that"),
    Goal("the paper's step, time over K eager singles", fastest("to_k_single"), most=0.9),
    Goal("the paper's step, time over K captured singles", fastest("to_k_captured"), most=1.1,
         why="torch's BatchNorm is two fifths of the kernels' time; the masked one came later"),
    Goal("the paper's step, times as fast as dense", against_fastest("dense"), 2.2, text=TIMES),
    Goal("the paper's step, times as fast as the reference", against_fastest("reference"), 1.6,
         text=TIMES),
    Goal("the paper's step, peak memory over dense",
         against_fastest("dense", "peak_memory", inverse=True), most=0.6,
         why="each expert's graphs hold the memory of their largest size, whatever its rows are"),
    Goal("the paper's step, p95 of single steps over their median", stalls, most=1.1),
    Goal("N = 256: graphs, times as fast as sequential", larger_batches, 1.0, text=TIMES),
    Goal("an Atari agent's step: captured, times as fast as eager", captured_agent, 5.0,
         text=TIMES),
    Goal("growth of a step from M = 4 to 64 beyond smaller groups", beyond, most=1.3),
)  # fmt: skip


def lines(rows: Rows) -> list[list[str]]:
    """Cells of each goal, in order."""
    return [goal.line(rows) for goal in GOALS]


def whys(devices: list[Rows]) -> list[str]:
    """What is known of each goal that a device missed, as lines of a list."""
    missed = {line[0] for rows in devices for line in lines(rows) if line[3] == MISSED}
    return [f"- {goal.figure}: {goal.why}" for goal in GOALS if goal.figure in missed and goal.why]


def foretold() -> list[str]:
    """Of what code the predictions are, and what they come of, as lines."""
    found = predictions()
    head = f"Predicted on {found['date']} for commit {found['commit']}, which had run on no device:"
    return [head, *(f"- {figure}: {of['by']}" for figure, of in found["goals"].items())]


def lanes(rows: Rows) -> str:
    """Which number of lanes is fastest, and how many times longer the others take."""
    best, *others = graphs(rows) or [None]
    if not others:
        return ""
    told = ", ".join(
        f"{o['name'].partition(', ')[2]} {o['p50'] / best['p50']:.2f}x" for o in others
    )
    return f"Fastest: {best['name']}; {told} as long."
