"""What a comparison does: one budget for all methods, on one data set and one hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..data.digits import RENDERINGS
from ..data.named import DIGITS, FACES, FOLDER, find_dataset, plain_name
from ..fields import Settings, differences, setting
from ..files import write_json
from ..hub import expert_names
from ..hub.labels import numbered
from ..hub.spec import split_names
from ..runs.config import CLASSIFICATION, LANDMARKS, FitConfig
from ..runs.presets import DEFAULTS
from ..runs.presets import preset as read_preset
from ..runs.resolve import settings as fit_settings
from ..training import TrainerConfig
from ..training.config import with_steps
from ..written import COMPARISON, described

STEPS, PASSES = "steps", "passes"  # budgets
COMPARE_FILE, PROBLEM = "compare.json", "problem.json"

# Of the settings of a run, what changes no result of a comparison: each seed is a run of its own,
# and the weights of the last step are kept.
FREE = ("trainer.eval_every", "trainer.metric", "trainer.metric_mode", "trainer.seed")

# The digits' own budget: 250 steps of 48 on 200 digits.
DIGITS_TRAINER = TrainerConfig(
    steps=250,
    batch_size=48,
    lr_expert=5e-4,
    lr_head=3e-3,
    lr_router=1e-2,  # a router as small as these experts leave it learns slowly
    eval_every=25,
    save_every=100,
    log_every=10,
)
DIGITS_FIT: Mapping[str, Any] = {
    "dataset": DIGITS,
    "image_size": 32,
    "flip": False,
    "explore": 1.0,
    "head_init": None,  # heads of networks this small are best as they are drawn
    "workers": 0,
}
# And that of their landmarks: 150 steps of 48 on 200 digits, heads an eighth as wide as published,
# which begin at almost nothing and learn slowly.
LANDMARK_DIGITS_TRAINER = DIGITS_TRAINER.replace(
    steps=150, lr_expert=3e-3, lr_head=1e-2, lr_router=1e-2, eval_every=15, save_every=75
)
LANDMARK_DIGITS_FIT: Mapping[str, Any] = {
    "dataset": DIGITS,
    "image_size": 64,
    "flip": False,
    "explore": 0.5,
    "workers": 0,
    LANDMARKS: {"head_width": 32},
}
# Defaults that are others in folders of earlier versions.
CHANGED_DEFAULTS = ("generator_width", "generator_stride", "head_init", "router_supervision")
DIGITS_RATES = (5e-4, 2e-3)
LANDMARK_DIGITS_RATES = (1e-3, 3e-3)
DIGITS_PRETRAIN_EPOCHS, LANDMARK_DIGITS_PRETRAIN_EPOCHS = 40, 15
QUICK_STEPS, QUICK_PRETRAIN_EPOCHS = 60, 7


@dataclass(frozen=True)
class CompareSettings(Settings):
    """Settings of a comparison.

    fit: data, hub and budget, as of a run of ``hubpath fit``: the same for all methods. rates:
    every tuned method is trained with each, and the one that is best on validation data is kept,
    seed by seed (ties: the lower validation loss). Heads and router keep their rates from ``fit``,
    but never learn slower than the bodies.

    budget: what every method may spend in training. "steps": the updates of ``fit``, whatever an
    update costs. "passes": as many expert forwards as the experts take when each is trained alone
    for those updates, M * steps * batch_size in all.
    """

    fit: FitConfig = setting()
    rates: tuple[float, ...] = setting(help="peak rates of the pre-trained bodies", above=0)
    temperature: float = setting(2.0, "of the ensemble's soft targets in distill", above=0)
    distill_weight: float = setting(0.5, "share of the soft targets in distill", low=0, high=1)
    digits_pretrain_epochs: int = setting(
        DIGITS_PRETRAIN_EPOCHS, "passes over an expert's digits", low=1
    )
    digits_rendering: str | None = setting(
        None,
        "pre-train every expert of the digits on this one rendering; None: each on one of its own",
        choices=tuple(RENDERINGS),
        added=True,
    )
    digits_validation: int = setting(100, "digits held out of 300, to choose on", low=1, high=299)

    budget: str = setting(
        STEPS,
        "the same for all methods: updates, or expert forwards in training",
        choices=(STEPS, PASSES),
        added=True,
    )

    def check(self) -> None:
        if not self.rates or len(set(self.rates)) < len(self.rates):
            raise ValueError(f"rates: expected different numbers above 0, got {list(self.rates)}")
        if self.fit.fallback != "none":
            raise ValueError(
                f"fallback: expected none in a comparison, got {self.fit.fallback}; its table has "
                "Hub-Pathway with its router, and a sentence on the fixed experts"
            )
        if self.fit.start is not None:
            raise ValueError(
                f"start: expected None in a comparison, got {self.fit.start}; all of its methods "
                "start with new heads"
            )

    def length(self, forwards: int) -> Fraction:
        """Of a training whose every sample runs ``forwards`` experts, and which has the whole
        budget to itself: its updates as a multiple of ``steps``."""
        same = self.budget == STEPS
        return Fraction(1) if same else Fraction(len(self.fit.hub), forwards)

    def steps(self, length: Fraction = Fraction(1)) -> int:
        """Updates of a training of that length; see ``length``."""
        return max(1, round(self.fit.trainer.steps * length))

    def trainer(self, seed: int, rate: float, length: Fraction = Fraction(1)) -> TrainerConfig:
        """The trainer's settings of one run; see ``rates`` and ``length``."""
        base = self.fit.trainer
        if length != 1:
            base = with_steps(base, self.steps(length))
        head = base.lr_expert if base.lr_head is None else base.lr_head
        return base.replace(
            seed=seed, lr_expert=rate, lr_head=max(rate, head), lr_router=max(rate, base.lr_router)
        )

    def identity(self) -> dict[str, Any]:
        """Whatever changes a result, flat: {"hub": ..., "trainer.steps": ...}."""
        own = {k: v for k, v in super().identity().items() if not k.startswith("fit.")}
        fit = {k: v for k, v in self.fit.identity().items() if k not in FREE}
        if self.fit.dataset == FOLDER:
            fit["data"] = self.fit.placed().data
        return fit | own


def make_settings(
    data: str | None,
    hub: str | None,
    data_root: str | None = None,
    rates: Sequence[float] | None = None,
    quick: bool = False,
    preset: str | None = None,
    top: Mapping[str, Any] | None = None,
    trainer: Mapping[str, Any] | None = None,
    distill: Mapping[str, Any] | None = None,
    nulls: Sequence[str] = (),
    task: str | None = None,
) -> CompareSettings:
    """Settings from what a user gives: ``data`` is a folder of images (of landmarks a list) or the
    name of a data set, whose folder is ``data_root``; ``hub`` names apart by commas. preset: of
    ``hubpath fit``, which brings a hub and its steps, and may bring the data set's name. ``top``
    and ``trainer``: further settings of ``hubpath fit``, and ``distill`` of CompareSettings,
    ``budget`` among them; None: not given. nulls: names of settings of ``hubpath fit`` that are to
    be None. quick: a few steps, whose figures say little. task: what is learned; None: what the
    preset or the data set can only mean, or else classes.

    Raises ValueError for whatever is unknown or impossible.
    """
    given = {name: value for name, value in (top or {}).items() if value is not None}
    inner = {name: value for name, value in (trainer or {}).items() if value is not None}
    of_preset = {} if preset is None else read_preset(preset)
    task = _task(task, preset, of_preset, data)
    if data is None and task == LANDMARKS:
        data = of_preset.get("dataset")
    if data is None:
        raise ValueError("data: nothing given; use --data FOLDER, or --data NAME --data-root DIR")
    own = Path(data).is_dir() or (task == LANDMARKS and Path(data).is_file())
    dataset = FOLDER if own else _dataset(data)
    if dataset == FOLDER:
        given["data"] = data
    else:
        given |= {"dataset": dataset} | ({"data_root": data_root} if data_root else {})
    if hub is not None:
        given["hub"] = split_names(hub)
    if inner.get("device", "cpu") == "cpu":
        # Concurrent runs keep the cores busy; starting decoders costs more than a short run.
        given.setdefault("workers", 0)
    extra = {name: value for name, value in (distill or {}).items() if value is not None}
    if quick:
        inner = {"steps": QUICK_STEPS} | inner
    fixed = {"image_size", "validation"} & set(given) if dataset == DIGITS else ()
    if fixed:
        raise ValueError(
            f"{min(fixed)}: the digits have images and splits of their own; leave it out, or write "
            "them to a folder (hubpath_fast.data.write_image_folder)"
        )
    begin: Mapping[str, Any] = {}
    if dataset == DIGITS and preset is None:
        begin, trainer_of_digits, rates_of_digits, epochs = _digits(task, quick)
        budget = trainer_of_digits.to_dict()
        if "steps" in inner:
            budget["eval_every"] = max(1, inner["steps"] // 10)
        inner = budget | inner
        rates = rates or (rates_of_digits[-1:] if quick else rates_of_digits)
        extra = {"digits_pretrain_epochs": epochs} | extra
    last = [f"{name}=null" for name in nulls]
    fit = fit_settings("", False, None, given, inner, preset, last, begin, task)
    return CompareSettings(fit, tuple(rates or (fit.trainer.lr_expert,)), **extra)


def _task(
    asked: str | None, preset: str | None, of_preset: Mapping[str, Any], data: str | None
) -> str:
    """What is learned: what was asked for, or else what preset or data set can only mean."""
    if preset is not None:
        found = of_preset.get("task", CLASSIFICATION)
        if asked not in (None, found):
            raise ValueError(
                f"task: the preset {preset} is of {found}, got {asked}; leave out one of them"
            )
        return found
    of_faces = data is not None and plain_name(data) in FACES
    return asked or (LANDMARKS if of_faces else CLASSIFICATION)


def _digits(
    task: str, quick: bool
) -> tuple[Mapping[str, Any], TrainerConfig, tuple[float, ...], int]:
    """What a comparison of digits begins with: settings, budget, rates, epochs of pre-training."""
    if task == LANDMARKS:
        epochs = QUICK_PRETRAIN_EPOCHS if quick else LANDMARK_DIGITS_PRETRAIN_EPOCHS
        return LANDMARK_DIGITS_FIT, LANDMARK_DIGITS_TRAINER, LANDMARK_DIGITS_RATES, epochs
    epochs = QUICK_PRETRAIN_EPOCHS if quick else DIGITS_PRETRAIN_EPOCHS
    return DIGITS_FIT, DIGITS_TRAINER, DIGITS_RATES, epochs


def pretrained_on(count: int, rendering: str | None) -> list[str]:
    """Which rendering each of ``count`` experts of the digits knows: all the one that is given, or
    each one of its own (a sixth the first again)."""
    own = list(RENDERINGS)
    return [rendering or own[i % len(own)] for i in range(count)]


def names_of_experts(settings: CompareSettings) -> tuple[str, ...]:
    """Of the digits' experts the renderings they know; of all others their short names."""
    hub = settings.fit.hub
    if settings.fit.dataset == DIGITS and settings.fit.pretrained:
        return numbered(pretrained_on(len(hub), settings.digits_rendering))
    return expert_names(hub)


def parse_rates(text: str) -> tuple[float, ...]:
    """ "5e-4,2e-3" -> (0.0005, 0.002); ValueError unless it is a list of numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"rates: expected numbers such as 5e-4,2e-3, got {text!r}") from None


def _dataset(name: str) -> str:
    try:
        found = find_dataset(name)
    except ValueError as error:
        raise ValueError(f"data: {name!r} is no folder, and as a name: {error}") from None
    if found == FOLDER:
        raise ValueError("data: give the folder itself")
    return found


def read_compare(out_dir: Path) -> dict[str, Any] | None:
    """What ``compare.json`` of a folder says; None where there is none.

    Raises ValueError if it is damaged, or of another kind of comparison.
    """
    path = out_dir / COMPARE_FILE
    if not path.is_file():
        return None
    if (other := described(out_dir, COMPARISON)) is not None:
        raise ValueError(other)
    try:
        return {"settings": dict(json.loads(path.read_text(encoding="utf-8"))["settings"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it to start again") from error


def as_begun(settings: CompareSettings, out_dir: Path) -> tuple[CompareSettings, str | None]:
    """The settings with what a comparison of an earlier version in the folder began with, where
    they have a default that was another then; and what to say of that."""
    held = read_compare(out_dir)
    if held is None or not any(out_dir.glob(f"runs/*/{PROBLEM}")):
        return settings, None
    if "router_supervision" in held["settings"].get("fit", {}):  # as all have since the change
        return settings, None
    old, fit = CompareSettings.from_dict(held["settings"]).fit, settings.fit
    own = DIGITS_FIT if fit.dataset == DIGITS else {}
    today = {**dict.fromkeys(CHANGED_DEFAULTS), **DEFAULTS[fit.task], **own}
    changes = {
        name: getattr(old, name)
        for name in CHANGED_DEFAULTS
        if getattr(fit, name) == today[name] != getattr(old, name)
    }
    if fit.dataset == DIGITS and fit.trainer.lr_router == DIGITS_TRAINER.lr_router:
        changes["trainer"] = fit.trainer.replace(lr_router=old.trainer.lr_router)
    begun = fit.replace(**changes)
    words = differences(begun.identity(), fit.identity())
    if not words:
        return settings, None
    note = (
        f"{out_dir} was begun by an earlier version, and goes on with its defaults "
        f"({'; '.join(words)})"
    )
    return settings.replace(fit=begun), note


def open_folder(out_dir: Path, settings: CompareSettings, take: bool = True) -> None:
    """Takes a folder for a comparison; ValueError if it holds one of other data, hub or budget, or
    something else. take: False only looks."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file; give a folder")
    held = read_compare(out_dir)
    begun = any(out_dir.glob(f"runs/*/{PROBLEM}"))
    if held is None or not begun:
        foreign = out_dir.is_dir() and any(not p.name.startswith(".") for p in out_dir.iterdir())
        if held is None and foreign:
            raise ValueError(
                f"out: {out_dir} holds something that is no comparison; choose another folder"
            )
        if take:
            placed = settings.replace(fit=settings.fit.placed())
            write_json(out_dir / COMPARE_FILE, {"settings": placed.to_dict()})
        return
    old = CompareSettings.from_dict(held["settings"]).identity()
    new = settings.identity()
    changed = differences(old, new)
    if changed:
        raise ValueError(
            f"out: {out_dir} holds runs of another comparison, which cannot stand in one table "
            f"({'; '.join(changed)}); use the same settings or another folder"
        )
