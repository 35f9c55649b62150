"""How a training went, from the records of its log."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ...measure import Measure
from .. import style
from ..arrays import to_fractions, to_matrix, to_names
from ..tables import Table
from .axis import value_formatter

LOSSES = ("loss", "task", "explore", "exploit")
NOT_LOSSES = ("step", "grad_norm", "entropy", "entropy_fraction", "best")
SHARES = {"load": "load: share of rows", "mean_weight": "mean weight"}
SHOWN_EXPERTS = 12  # experts in a stack; the smaller ones are drawn as one


@style.styled
def training_curves(
    history: Iterable[Mapping[str, Any]], expert_names: Sequence[str], measure: Measure
) -> Figure:
    """Losses, the metric, the routing's entropy, and each expert's load and mean weight over steps.

    history: records as in ``log.jsonl``: ``step``; scalars named by loss; mappings named by split
    (``validation``, ``train``) with metrics; ``load`` and ``mean_weight`` [M]; and
    ``entropy_fraction`` (of log M). None leaves a gap (in shares: nothing). A panel whose keys no
    record has is left out. measure: what the splits are judged by.
    """
    records = [record for record in history if record.get("step") is not None]
    if not records:
        raise ValueError("history has no record with a step; give the records of a log.jsonl")
    metric = measure.name
    lines = {
        "losses": _losses(records),
        measure.title: {name: _series(records, name, metric) for name in _splits(records, metric)},
        "entropy of the routing": {"entropy": _series(records, "entropy_fraction")},
    }
    lines = {title: known for title, curves in lines.items() if (known := _known(curves))}
    shares = {key: found for key in SHARES if (found := _shares(records, key)) is not None}
    if not lines and not shares:
        raise ValueError(
            "history has nothing to draw; its records need a loss, a split with metrics, load, "
            "mean_weight or entropy_fraction"
        )
    figure = style.new_figure(style.WIDTH, 2.7 * bool(lines) + 3.0 * bool(shares))
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
    parts = iter(np.atleast_1d(figure.subfigures(bool(lines) + bool(shares), 1)))
    if lines:
        panels = next(parts).subplots(1, len(lines), squeeze=False)[0]
        for axes, (title, curves) in zip(panels, lines.items(), strict=True):
            _draw_lines(axes, title, curves, measure)
            axes.set_xlim(*_span([record["step"] for record in records]))
    if shares:
        _draw_shares(next(parts), shares, expert_names)
    return figure


def history_table(history: Iterable[Mapping[str, Any]]) -> Table:
    """All numbers of the records, a line each; nested keys as ``key/name``."""
    flat = [dict(_flatten("", record)) for record in history]
    columns = list(dict.fromkeys(key for record in flat for key in record))
    return Table(columns, [[record.get(key) for key in columns] for record in flat])


def _flatten(prefix: str, value: Any) -> Iterable[tuple[str, Any]]:
    if isinstance(value, Mapping):
        pairs = value.items()
    elif isinstance(value, (list, tuple)):
        pairs = enumerate(value)
    else:
        yield prefix, value
        return
    for key, item in pairs:
        yield from _flatten(f"{prefix}/{key}" if prefix else str(key), item)


Curve = tuple[list[float], list[float]]


def _series(records: Sequence[Mapping[str, Any]], key: str, inner: str | None = None) -> Curve:
    """Steps and values of the records that have the key."""
    found = [(r["step"], r[key]) for r in records if key in r]
    if inner is not None:
        found = [(s, v[inner]) for s, v in found if isinstance(v, Mapping) and inner in v]
    return [s for s, _ in found], [np.nan if v is None else float(v) for _, v in found]


def _known(curves: Mapping[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if np.isfinite(curve[1]).any()}


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _losses(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    keys = dict.fromkeys(key for r in records for key, value in r.items() if _is_scalar(value))
    names = [key for key in LOSSES if key in keys]
    names += [key for key in keys if key not in LOSSES and key not in NOT_LOSSES]
    curves = {{"loss": "total"}.get(key, key): _series(records, key) for key in names}
    return curves | {
        f"{split}, total" if split != "validation" else "validation": _series(
            records, split, "loss"
        )
        for split in _splits(records, "loss")
    }


def _splits(records: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    """The keys whose value is a mapping with this metric."""
    found = (k for r in records for k, v in r.items() if isinstance(v, Mapping) and metric in v)
    return list(dict.fromkeys(found))


def _shares(records: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray] | None:
    """Steps [T] and shares [T, M]; None where no record has them."""
    found = [(r["step"], r[key]) for r in records if r.get(key) is not None]
    if not found:
        return None
    values = to_fractions(f"history's {key}", to_matrix(f"history's {key}", [v for _, v in found]))
    return np.array([s for s, _ in found], float), np.nan_to_num(values)


def _span(steps: Sequence[float]) -> tuple[float, float]:
    """Where the axis of steps begins and ends, the same for all panels of lines."""
    room = 0.03 * (max(steps) - min(steps)) or 1
    return min(steps) - room, max(steps) + room


def _draw_lines(axes: Axes, title: str, curves: Mapping[str, Curve], measure: Measure) -> None:
    for i, (name, (steps, values)) in enumerate(curves.items()):
        look = style.look(i)
        dash = "--" if title == "losses" and name.startswith("validation") else look.dash
        marker = "o" if len(steps) < 30 else ""
        axes.plot(
            steps, values, color=look.color, linestyle=dash, marker=marker, markersize=3, label=name
        )
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if "entropy" in curves:
        axes.set(ylim=(0, 1.05), ylabel="fraction of log M")
        axes.axhline(1, color=style.FAINT, linewidth=0.8, linestyle=":")
    elif title == "losses":
        axes.set_ylabel("loss")
    else:
        axes.set_ylabel(measure.label)
        axes.yaxis.set_major_formatter(value_formatter(measure))
    if "entropy" not in curves:
        low, high = axes.get_ylim()  # the legend's lines get room of their own above the curves
        axes.set_ylim(low, high + 0.13 * -(-len(curves) // 2) * (high - low))
        axes.legend(
            loc="upper right", ncols=2, handlelength=1.6, columnspacing=1.0, borderaxespad=0.0,
            labelspacing=0.25,
        )  # fmt: skip


def _draw_shares(part: Any, shares: Mapping[str, Any], expert_names: Sequence[str]) -> None:
    counts = {values.shape[1] for _, values in shares.values()}
    if len(counts) > 1:
        raise ValueError(
            f"history's load and mean_weight are of {sorted(counts)} experts; they must agree"
        )
    count = counts.pop()
    names = to_names("expert_names", expert_names, count, "experts in history")
    total = sum(values.mean(0) for _, values in shares.values())
    kept = sorted(np.argsort(-total, kind="stable")[:SHOWN_EXPERTS].tolist())
    shown = style.fit_all([names[i] for i in kept], 2.0)
    rest = [i for i in range(count) if i not in kept]
    panels = part.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    for axes, (key, (steps, values)) in zip(panels, shares.items(), strict=True):
        if len(steps) == 1:  # an area needs a width
            steps, values = steps[0] + np.array([-0.5, 0.5]), np.repeat(values, 2, 0)
        stack = [values[:, i] for i in kept] + [values[:, rest].sum(1)] * bool(rest)
        areas = axes.stackplot(steps, stack, edgecolor="white", linewidth=0.6)
        for i, area in enumerate(areas):
            look = style.look(kept[i]) if i < len(kept) else style.Look(style.RULE, "", "-")
            area.set(facecolor=look.color, hatch=look.hatch)
        axes.set(title=SHARES[key], xlabel="step", xlim=(steps[0], steps[-1]), ylim=(0, 1))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    panels[0].set_ylabel("fraction, stacked")
    idle = ["load" in shares and not shares["load"][1][:, i].any() for i in kept]
    labels = [f"{n} (no rows)" if i else n for n, i in zip(shown, idle, strict=True)]
    labels += [f"{len(rest)} others"] * bool(rest)
    # From the top as in the stack.
    part.legend(areas[::-1], labels[::-1], loc="outside right center", labelspacing=0.4)
