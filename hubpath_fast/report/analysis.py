"""The analysis of a run, as in the paper's section 4: one page, its figures and their numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..files import printable
from ..measure import Measure
from . import sections
from .arrays import FRACTION, to_array, to_limits, to_names, to_points
from .figures.over_k import checked_runs
from .folder import FigureFolder
from .page import Section, write_page
from .rows import checked_rows

NO_SUBSET = "none of these"
FIRST = (
    sections.summary,
    sections.mean_weight,
    sections.quality,
    sections.routing,
    sections.over_k,
    sections.samples,
    sections.training,
)
LAST = (sections.cost, sections.missed)
FIGURES = (
    "mean_weight",
    "mean_weight_by_group",
    "weight_quality",
    "routing",
    "{measure}_over_k",
    "samples",
    "training",
    "{measure}_against_cost",
    "missed",
)
OF_TASKS = ("error_by_group", "faces", "faces_points", "maps")  # which have them or not


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a report is made of: T samples of a split, M experts, judged by a measure.

    Arrays may be tensors (any device), numpy arrays or lists; they are kept as numpy arrays. What
    is None or empty has no section. Raises ValueError where fields do not fit each other.

    outputs: samples' indices [n] -> (each expert's outputs [n, M, C, ...], whether it was asked or
    not, and the hub's [n, C, ...]); it is or gives None where no model is at hand.
    """

    title: str
    subtitle: str
    data_name: str
    measure: Measure
    expert_names: Sequence[str]  # [M], short: they stand in every table and figure
    scores: Any  # float [T]: Hub-Pathway's measure of each sample
    scores_alone: Any  # float [M, T], of each expert by itself
    alone_title: str  # which experts: "each expert fine-tuned alone"
    weights: Any  # float [T, M] in 0..1, 0 where an expert is not asked
    k: int  # experts that the run asks about each sample
    split: str = "test"  # what the samples are called: "validation" where there is no test split
    expert_sources: Sequence[str] = ()  # [M] each in full: a model's name, a file, a folder
    routes: Mapping[str, Any] | None = None  # of these samples, as evaluations have them
    routing: Mapping[str, Any] | None = None  # whether routing pays, as a run's result has it
    history: Sequence[Mapping[str, Any]] | None = None  # the training's log records
    groups: Any = None  # int [T]; None: all are one group
    group_names: Sequence[str] | None = None
    group_label: str | None = None  # what a group is: "rendering of the digit"
    subsets: Mapping[str, Any] | None = None  # in place of groups, may overlap: samples' indices
    values_by_k: Mapping[int, Sequence[float]] | None = None  # the measure for each seed
    rows: Sequence[Mapping[str, Any]] = ()  # methods, see rows.Row; kept as those
    images: Callable[[np.ndarray], Any] | None = None  # int64 [n] -> uint8 [n, 3, H, W]
    heads: Sequence[str | Sequence[str]] | None = None  # [T] above an image; None: its score
    marked: Any = None  # bool [T]: samples that stand out, such as wrong ones
    marks: Any = None  # float [T, 2, P, 2]: P true and P predicted points, in pixels of the image
    details: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # [T] each, for the CSVs
    scores_of: Callable[[], Mapping[str, Any]] | None = None  # of compared methods, [T] each
    outputs: Callable[[np.ndarray], tuple[Any, Any] | None] | None = None  # see below
    own: Sequence[Callable[[Analysis, FigureFolder], Section | None]] = ()  # the task's sections
    notes: Sequence[str] = ()  # paragraphs at the top

    def __post_init__(self) -> None:
        if isinstance(self.notes, str):
            raise ValueError("notes is a str; give a list of paragraphs")
        names = [printable(str(name)) for name in self.expert_names]
        sources = [printable(str(source)) for source in self.expert_sources]
        if sources:
            to_names("expert_sources", sources, len(names), "expert_names")
        scores = to_array("scores", self.scores)
        total = len(scores) if scores.ndim == 1 else 0
        weights = self._numbers("weights", (total, len(names)), FRACTION)
        if not 1 <= self.k <= len(names):
            raise ValueError(f"k: expected an integer in 1..{len(names)}, got {self.k}")
        marked = np.zeros(total, bool) if self.marked is None else to_array("marked", self.marked)
        lists = {"heads": self.heads, "marked": marked, "marks": self.marks, **self.details}
        for argument, value in lists.items():
            if value is not None and len(value) != total:
                raise ValueError(f"{argument} has {len(value)} entries for {total} samples")
        heads = self.heads or [self.measure.text(score) for score in scores]
        runs = checked_runs(self.values_by_k, self.measure) if self.values_by_k else {}
        checked = {
            **{name: printable(getattr(self, name)) for name in ("title", "subtitle", "data_name")},
            "expert_names": names,
            "expert_sources": sources,
            "scores": self._numbers("scores", (total,), self.measure),
            "scores_alone": self._numbers("scores_alone", (len(names), total), self.measure),
            "weights": weights,
            "history": list(self.history or ()),
            "values_by_k": runs,
            "rows": checked_rows(self.rows or (), self.measure),
            "heads": heads,
            "marked": marked,
            "marks": None if self.marks is None else to_points("marks", self.marks),
            **self._grouping(total),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def _numbers(self, argument: str, shape: tuple[int, ...], measure: Measure) -> np.ndarray:
        array = to_array(argument, getattr(self, argument)).astype(np.float64)
        if array.shape != shape or not array.size or np.isnan(array).any():
            raise ValueError(
                f"{argument} has shape {list(array.shape)} ({int(np.isnan(array).sum())} of its "
                f"numbers NaN); give numbers {list(shape)}, of at least one sample, as many as "
                f"scores has, and of the {len(self.expert_names)} experts of expert_names"
            )
        return to_limits(argument, array, measure)

    def _grouping(self, total: int) -> dict[str, Any]:
        if self.subsets:
            return self._overlapping(total)
        if (self.groups is None) != (self.group_names is None):
            given, lacking = ("groups", "group_names")[:: 1 if self.group_names is None else -1]
            raise ValueError(f"{given} is given without {lacking}; give both or neither")
        if self.groups is None:
            alone = {"groups": np.zeros(total, np.int64), "group_names": ["all"]}
            return alone | {"group_label": "", "subsets": {}}
        names, groups = [str(name) for name in self.group_names], to_array("groups", self.groups)
        if groups.shape != (total,) or not np.issubdtype(groups.dtype, np.integer):
            raise ValueError(
                f"groups is {groups.dtype} {list(groups.shape)}; give integers [{total}]"
            )
        wrong = groups[(groups < 0) | (groups >= len(names))]
        if wrong.size:
            raise ValueError(f"groups holds {wrong[0]}, but there are {len(names)} group_names")
        return {
            "groups": groups.astype(np.int64),
            "group_names": to_names("group_names", names, len(names), "groups"),
            "group_label": self.group_label or "group",
            "subsets": {},
        }

    def _overlapping(self, total: int) -> dict[str, Any]:
        """Subsets as bool [T], and as the one group of a sample the smallest subset that it is in:
        figures of samples go by it."""
        if self.groups is not None or self.group_names is not None:
            raise ValueError("groups is given with subsets; give one of them")
        found = {}
        for name, given in self.subsets.items():
            indices = to_array(f"subsets[{name!r}]", given)
            indices = indices.astype(np.int64) if not indices.size else indices
            whole = indices.ndim == 1 and np.issubdtype(indices.dtype, np.integer)
            if not whole or ((indices < 0) | (indices >= total)).any():
                raise ValueError(f"subsets[{name!r}]: expected integers in 0..{total - 1}")
            found[printable(str(name))] = np.bincount(indices, minlength=total) > 0
        groups, masks = np.full(total, len(found)), list(found.values())
        for i in sorted(range(len(masks)), key=lambda i: -masks[i].sum()):
            groups[masks[i]] = i
        label = self.group_label or "subset"
        names = [*found, NO_SUBSET]
        return {"groups": groups, "group_names": names, "group_label": label, "subsets": found}

    @property
    def oracle(self) -> np.ndarray:
        """[T]: the score of the best expert alone."""
        return self.measure.sign * (self.measure.sign * self.scores_alone).max(axis=0)

    @property
    def better(self) -> np.ndarray:
        """bool [M, T]: the expert alone is better than Hub-Pathway."""
        return self.measure.sign * self.scores_alone > self.measure.sign * self.scores

    @property
    def missed(self) -> np.ndarray:
        """bool [T]: some expert alone is better than Hub-Pathway."""
        return self.better.any(axis=0)

    @property
    def shows_groups(self) -> bool:
        """Whether a sample's group says something that its details do not."""
        return bool(self.group_label) and self.group_label not in self.details

    @property
    def kinds(self) -> list[str]:
        """[T]: the name of each sample's group, or the names of all subsets that it is in."""
        if not self.subsets:
            return [self.group_names[i] for i in self.groups]
        names, masks = list(self.subsets), np.stack(list(self.subsets.values()), axis=1)
        found = [[names[i] for i in np.flatnonzero(row)] for row in masks]
        return [", ".join(kinds) or NO_SUBSET for kinds in found]

    def members(self) -> dict[str, np.ndarray]:
        """Name and samples (bool [T]) of each group, or subset and the rest, that has any."""
        if self.subsets:
            rest = ~np.any(list(self.subsets.values()), axis=0)
            masks = {**self.subsets, NO_SUBSET: rest}
            return {name: mask for name, mask in masks.items() if mask.any()}
        masks = [self.groups == i for i in range(len(self.group_names))]
        short = zip(_distinct(self.group_names), masks, strict=True)
        return {name: mask for name, mask in short if mask.any()}


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with their position where two are equal."""
    return [f"{n} ({i})" if names.count(n) > 1 else n for i, n in enumerate(names)]


def write_analysis(analysis: Analysis, out_dir: str | Path, scale: float = 2.0) -> Path:
    """Writes ``report.html`` and ``figures/NAME.png`` with ``figures/NAME.csv``; returns the page.

    Figures of these names that an earlier report left and this one has not are removed. scale:
    pixels of a figure for one of the page.
    """
    out_dir = Path(out_dir)
    figures = FigureFolder(out_dir / "figures", scale)
    made = [make(analysis, figures) for make in FIRST]
    made += [make(analysis, figures) for make in analysis.own]
    made += [make(analysis, figures) for make in LAST]
    for form in (*FIGURES, *OF_TASKS):
        name = sections.file_name(form.format(measure=analysis.measure.name))
        for path in (figures.folder / f"{name}.png", figures.folder / f"{name}.csv"):
            if path not in figures.written:
                path.unlink(missing_ok=True)
    shown = [section for section in made if section is not None]
    footer = "The figures and their numbers lie as PNG and CSV in the folder figures."
    return write_page(
        out_dir / "report.html", analysis.title, shown, subtitle=analysis.subtitle, footer=footer
    )
