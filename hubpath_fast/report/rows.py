"""Methods that are compared: what they reach and what they cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..measure import Measure
from .arrays import to_limits


class Row(NamedTuple):
    """A method. value: of the measure, None where it has none (note says why). spread: its
    standard deviation. forwards, gflops, milliseconds: for a sample at inference, of experts'
    forwards. updates, train_forwards: in training, of experts' forwards. router_share: of a hub,
    its router's FLOPs over those of the experts that a sample is sent to. bound: an upper bound
    such as the oracle, which does not compete."""

    name: str
    value: float | None = None
    spread: float | None = None
    forwards: float | None = None
    gflops: float | None = None
    milliseconds: float | None = None
    updates: float | None = None
    train_forwards: float | None = None
    router_share: float | None = None
    bound: bool = False
    note: str = ""


NUMBERS = (
    "value", "spread", "forwards", "gflops", "milliseconds", "updates", "train_forwards",
    "router_share",
)  # fmt: skip


def checked_rows(rows: Sequence[Mapping[str, Any]], measure: Measure) -> list[Row]:
    """Mappings with a ``name`` and other fields of ``Row``, as rows; or a ValueError that says
    which is wrong. NaN is as None."""
    found = []
    for i, row in enumerate(rows):
        unknown = sorted(set(row) - set(Row._fields))
        if unknown or "name" not in row:
            wrong = f"the unknown key {unknown[0]!r}" if unknown else "no name"
            raise ValueError(f"rows[{i}] has {wrong}; its keys can be {', '.join(Row._fields)}")
        numbers = {key: _number(i, key, row.get(key)) for key in NUMBERS}
        if numbers["value"] is not None:
            to_limits(f"rows[{i}]", numbers["value"], measure)
        note = str(row.get("note") or "")
        found.append(Row(str(row["name"]), **numbers, bound=bool(row.get("bound")), note=note))
    return found


def _number(i: int, key: str, value: Any) -> float | None:
    if value is None or value != value:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"rows[{i}] has {key} {value!r}; give a number or None") from error
    cost = key in ("forwards", "gflops")
    if not math.isfinite(number) or (key != "value" and (number < 0 or (cost and not number))):
        least = "" if key == "value" else " above 0" if cost else " of at least 0"
        raise ValueError(f"rows[{i}] has {key} {value}; give a finite number{least} or None")
    return number


def best_rows(rows: Sequence[Row], measure: Measure) -> list[bool]:
    """Which rows have the best value, ties as printed included; bounds do not compete."""
    return measure.best_shown([None if row.bound else row.value for row in rows])


def text_of(row: Row, measure: Measure) -> str:
    """The value with its spread, without the unit; a dash where there is none."""
    if row.value is None:
        return "–"
    spread = "" if row.spread is None else f" ± {measure.number(row.spread)}"
    return measure.number(row.value) + spread
