"""What was aimed at on a GPU, and what was reached: each goal met, missed, or not measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    """value: of a run's rows; None where it was not measured. text: the figure's form."""

    figure: str
    value: Callable[[Rows], Found | None]
    least: float | None = None
    most: float | None = None
    text: str = "{:.2f}"

    @property
    def wanted(self) -> str:
        sign, limit = ("at least", self.least) if self.most is None else ("at most", self.most)
        return f"{sign} {self.text.format(limit)}"

    def line(self, rows: Rows) -> list[str]:
        """Cells: the figure, what is wanted, what was found, and how that is."""
        found = self.value(rows)
        if found is None:
            return [self.figure, self.wanted, "-", NOT_MEASURED]
        above = self.least is None or found.value >= self.least
        met = above and (self.most is None or found.value <= self.most)
        said = self.text.format(found.value) + (f" ({found.of})" if found.of else "")
        return [self.figure, self.wanted, said, MET if met else MISSED]


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
            and key[2].endswith(" graph") and " reference " not in key[2]
            and "p50" in found and found["ok"]
        }  # fmt: skip
        if not shares:
            return None
        lowest = min(shares, key=shares.__getitem__)
        of = lowest.split()[-2]
        if len({key.split()[1] for key in shares}) > 1:
            of += f" of {lowest.split()[1]}"
        return Found(shares[lowest], of + ", above the copy" * (shares[lowest] > 1))

    return value


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
         ratio("glue", f"{PAPER} reference eager", f"{PAPER} triton eager"), 4.0, text=TIMES),
    Goal("glue of the paper's step, times as fast as the compiled reference",
         ratio("compiled", f"{PAPER} compiled eager", f"{PAPER} triton eager"), 1.5, text=TIMES),
    Goal("router (262144, 64, 2), share of a copy", roof("noisy_topk "), 0.6, text=SHARE),
    Goal("gather of 4 GB, share of a copy", roof("gather "), 0.85, text=SHARE),
    Goal("combine of 4 GB, share of a copy", roof("combine "), 0.8, text=SHARE),
    Goal("exploit loss, share of a copy", roof("exploit_loss "), 0.8, text=SHARE),
    Goal("BatchNorm of 56 x 56 x 256 in bf16, share of a copy",
         roof("masked_batch_norm 20/24,256,56x56,"), 0.8, text=SHARE),
    Goal("aggregate (4096, 64, 2, 1000) bf16, times as fast as its dense form",
         ratio("aggregate", f"{AGGREGATE} dense graph", f"{AGGREGATE} triton graph"), 5.0,
         text=TIMES),
    Goal("aggregate (4096, 64, 2, 1000) bf16, peak memory over its dense form's",
         ratio("aggregate", f"{AGGREGATE} triton eager", f"{AGGREGATE} dense eager",
               "peak_memory"), most=0.1),
    Goal("the paper's step, time over K eager singles", fastest("to_k_single"), most=0.9),
    Goal("the paper's step, time over K captured singles", fastest("to_k_captured"), most=1.1),
    Goal("the paper's step, times as fast as dense", against_fastest("dense"), 2.2, text=TIMES),
    Goal("the paper's step, times as fast as the reference", against_fastest("reference"), 1.6,
         text=TIMES),
    Goal("the paper's step, peak memory over dense",
         against_fastest("dense", "peak_memory", inverse=True), most=0.6),
    Goal("the paper's step, p95 of single steps over their median", stalls, most=1.1),
    Goal("N = 256: graphs, times as fast as sequential",
         ratio("large", "sequential", "graphs, 8 lanes"), 1.0, text=TIMES),
    Goal("an Atari agent's step: captured, times as fast as eager", captured_agent, 5.0,
         text=TIMES),
    Goal("growth of a step from M = 4 to 64 beyond smaller groups", beyond, most=1.3),
)  # fmt: skip


def lines(rows: Rows) -> list[list[str]]:
    """Cells of each goal, in order."""
    return [goal.line(rows) for goal in GOALS]


def lanes(rows: Rows) -> str:
    """Which number of lanes is fastest, and how many times longer the others take."""
    best, *others = graphs(rows) or [None]
    if not others:
        return ""
    told = ", ".join(
        f"{o['name'].partition(', ')[2]} {o['p50'] / best['p50']:.2f}x" for o in others
    )
    return f"Fastest: {best['name']}; {told} as long."
