"""What bench.infer wants, as ratios of one run's rows: met, missed or not measured.

They were set for the hub ``tiny`` at 96 pixels with M = 5 and K = 2 on two threads of a CPU; of
other hubs the ratios are told all the same.
"""

from __future__ import annotations

from collections.abc import Sequence

ROUTED = ("cond", "parts")  # of one image, the forms that run its K experts and no others
ALONE, TWICE, LIKE_MODEL = 1.1, 2.0, 1.1


def judge(rows: Sequence[dict]) -> list[dict]:
    """One record a goal: "wanted" in words, "found" the ratio, or None, and "met"."""
    known = {row["row"]: row for row in rows if "note" not in row}
    routed = [known[name] for name in ROUTED if "tensor" in known.get(name, {})]
    best = min(routed, key=lambda row: row["tensor"]["p50"], default=None)
    form = "cond or parts" if best is None else best["row"]
    to_alone = None if best is None else best.get("to_alone")
    dense = known.get("dense", {}).get("tensor")
    to_dense = None if best is None or dense is None else dense["p50"] / best["tensor"]["p50"]
    rates = [known.get(name, {}).get("images_per_second_64") for name in ("model", "parts")]
    to_model = None if None in rates else rates[0] / rates[1]
    return [
        goal(f"one image: {form}, over its K experts alone and the generator", to_alone, ALONE),
        goal(f"one image: dense, over {form}", to_dense, TWICE, at_least=True),
        goal("64 images: seconds of parts, over the model's", to_model, LIKE_MODEL),
    ]


def goal(name: str, found: float | None, limit: float, at_least: bool = False) -> dict:
    met = None if found is None else found >= limit if at_least else found <= limit
    wanted = f"at {'least' if at_least else 'most'} {limit:.2f}"
    return {"goal": name, "wanted": wanted, "found": found, "met": met}


def text(goals: Sequence[dict]) -> str:
    lines = []
    for each in goals:
        verdict = {None: "not measured", True: "met", False: "missed"}[each["met"]]
        found = "" if each["found"] is None else f"{each['found']:.2f}, "
        lines.append(f"{each['goal']}: {found}wanted {each['wanted']}: {verdict}")
    return "\n".join(lines)
