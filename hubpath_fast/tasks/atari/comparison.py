"""A comparison of methods on games: what it runs, where that lies in its folder, what is finished.

A folder holds ``compare.json``, the sources in ``sources/GAME`` and the runs in
``runs/GAME/METHOD/seed-S``, each a folder as ``hubpath atari fit`` makes it. Beside a run's folder
lie ``seed-S.log``, what its process printed, and ``seed-S.failed.json``, why it failed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...fields import Settings, differences, setting, there_are
from ...files import write_json
from ...written import GAMES, described
from .settings import (
    FINETUNE,
    HUB,
    KNOWLEDGE_FLOW,
    LEAST_HUB,
    SCRATCH,
    ZOO_TUNING,
    AtariSettings,
)

COMPARE_FILE, RESULT = "compare.json", "result.json"
SOURCES, RUNS = "sources", "runs"
HUB_K1 = "hub-k1"
PAPER_K = 2
PAPER_STEPS = 100_000
TITLES = {
    SCRATCH: "from scratch", HUB: "Hub-Pathway", KNOWLEDGE_FLOW: "Knowledge Flow",
    ZOO_TUNING: "Zoo-Tuning",
}  # fmt: skip
# Of a run's settings, what the comparison itself decides.
OWN = ("game", "method", "hub", "seed", "steps", "final_episodes", "device")


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings(Settings):
    """What all runs of a comparison share, so that they can stand in one table."""

    sources: tuple[str, ...] = setting(help="games that the hub's policies are trained on")
    steps: int = setting(help="of every run", low=1)
    source_steps: int = setting(help="of every source", low=1)
    episodes: int = setting(30, "games of the evaluation after the last step", low=1)
    set: tuple[str, ...] = setting((), "KEY=JSON: other settings of all runs", added=True)

    def check(self) -> None:
        if len(self.sources) < LEAST_HUB or len(set(self.sources)) < len(self.sources):
            raise ValueError(
                f"sources: expected at least {LEAST_HUB} different games, got "
                f"{', '.join(self.sources) or 'none'}"
            )
        if self.k > len(self.sources):
            raise ValueError(
                f"k: expected at most the {len(self.sources)} sources, got {self.k}; --set k=..."
            )

    @property
    def extra(self) -> dict[str, Any]:
        """The other settings, by name."""
        pairs = (text.split("=", 1) for text in self.set)
        return {name: json.loads(value) for name, value in pairs}

    @property
    def k(self) -> int:
        """Of the hub."""
        return self.extra.get("k", PAPER_K)


def other_settings(given: Mapping[str, Any]) -> tuple[str, ...]:
    """Settings by name as ``ComparisonSettings.set`` keeps them.

    Raises ValueError for one that the comparison itself decides, and for values not allowed.
    """
    known = {one.name: one for one in AtariSettings.settings()}
    for name in given:
        if name in OWN:
            raise ValueError(
                f"--set {name}: a comparison decides it; it is set by --sources, --targets, "
                "--methods, --seeds, --steps, --episodes and --device"
            )
    values = {name: known[name].checked(given[name]) for name in sorted(given)}
    return tuple(f"{name}={json.dumps(value)}" for name, value in values.items())


@dataclass(frozen=True)
class Method:
    """name: as ``--methods`` takes it. title: as tables show it. method, sources, k: of its runs'
    settings; sources are games, k None where there is none."""

    name: str
    title: str
    method: str
    sources: tuple[str, ...] = ()
    k: int | None = None


def title_of(method: str, sources: Sequence[str] = (), k: int | None = None) -> str:
    """What tables call a run. method, k: of its settings; sources: names."""
    if method == FINETUNE:
        return f"fine-tuned from {', '.join(sources)}"
    if method == HUB and k != PAPER_K:
        return f"{TITLES[HUB]}, K = {k}"
    return TITLES[method]


def method_of(
    name: str, method: str, sources: tuple[str, ...] = (), k: int | None = None
) -> Method:
    return Method(name, title_of(method, sources, k), method, sources, k)


FROM_SCRATCH = method_of(SCRATCH, SCRATCH)


def methods_of(sources: Sequence[str], k: int = PAPER_K) -> list[Method]:
    """All methods of a comparison, in the order of its tables. k: of the hub."""
    sources = tuple(sources)
    return [
        FROM_SCRATCH,
        *(method_of(f"{FINETUNE}-{source}", FINETUNE, (source,)) for source in sources),
        method_of(KNOWLEDGE_FLOW, KNOWLEDGE_FLOW, sources),
        method_of(ZOO_TUNING, ZOO_TUNING, sources),
        *([method_of(HUB_K1, HUB, sources, 1)] if k > 1 else []),
        method_of(HUB, HUB, sources, k),
    ]


def choose_methods(text: str, known: Sequence[Method]) -> list[Method]:
    """The methods that a list of names means, in the table's order: "all", or names apart by
    commas, of which "finetune" is fine-tuning from each source.

    Raises ValueError, with the closest names, for one that is unknown.
    """
    names = [part.strip().lower().replace("_", "-") for part in text.split(",") if part.strip()]
    if not names:
        raise ValueError("methods: expected names, comma-separated, or all; got none")
    wanted: set[str] = set()
    for name in names:
        found = [m.name for m in known if name in ("all", m.name) or (name == FINETUNE == m.method)]
        if not found:
            allowed = ["all", FINETUNE, *(method.name for method in known)]
            raise ValueError(f"methods: {name!r} is unknown; {there_are(allowed, name)}")
        wanted.update(found)
    return [method for method in known if method.name in wanted]


def source_place(game: str) -> str:
    return f"{SOURCES}/{game}"


def run_place(game: str, method: str, seed: int) -> str:
    return f"{RUNS}/{game}/{method}/seed-{seed}"


def log_of(out_dir: Path, place: str) -> Path:
    return out_dir / f"{place}.log"


def failed_of(out_dir: Path, place: str) -> Path:
    return out_dir / f"{place}.failed.json"


@dataclass(frozen=True)
class Asked:
    """What a folder's comparison is of: all that its commands asked for."""

    settings: ComparisonSettings
    targets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]

    def chosen(self) -> list[Method]:
        return [m for m in methods_of(self.settings.sources, self.settings.k) if self.has(m)]

    def has(self, method: Method) -> bool:
        return method.name in self.methods

    def places(self) -> list[tuple[str, Method, int]]:
        """All runs, by target and then by seed: what is there early has all methods."""
        return [(t, m, s) for t in self.targets for s in self.seeds for m in self.chosen()]

    def needed_sources(self) -> list[str]:
        needed = {source for method in self.chosen() for source in method.sources}
        return [source for source in self.settings.sources if source in needed]


def read_asked(out_dir: Path) -> Asked | None:
    """What the folder's ``compare.json`` says; None where there is none.

    Raises ValueError if it is damaged, or of another kind of comparison.
    """
    path = out_dir / COMPARE_FILE
    if not path.is_file():
        return None
    if (other := described(out_dir, GAMES)) is not None:
        raise ValueError(other)
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        lists = (tuple(held[name]) for name in ("targets", "methods", "seeds"))
        return Asked(ComparisonSettings.from_dict(held["settings"]), *lists)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged, or of no comparison of games ({error}); give another folder"
        ) from error


def open_comparison(out_dir: Path, asked: Asked, take: bool = True) -> Asked:
    """What the folder's comparison is of now: what was asked before, and what is asked besides.

    take: False only looks. Raises ValueError, before anything is written, if the folder holds
    something else, or a comparison under other settings.
    """
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file; give a folder")
    held = read_asked(out_dir)
    if held is None and out_dir.is_dir() and any(p.name[0] != "." for p in out_dir.iterdir()):
        raise ValueError(
            f"out: {out_dir} holds something that is no comparison of games; choose another folder"
        )
    if held is not None:
        changed = differences(held.settings.identity(), asked.settings.identity())
        if changed:
            raise ValueError(
                f"out: {out_dir} holds runs of another comparison, which cannot stand in one table "
                f"({'; '.join(changed)}); use the same settings or another folder"
            )
        asked = Asked(
            asked.settings,
            tuple(dict.fromkeys((*held.targets, *asked.targets))),
            tuple(dict.fromkeys((*held.methods, *asked.methods))),
            tuple(sorted({*held.seeds, *asked.seeds})),
        )
    if take:
        lists = {name: list(getattr(asked, name)) for name in ("targets", "methods", "seeds")}
        write_json(out_dir / COMPARE_FILE, {"settings": asked.settings.to_dict(), **lists})
    return asked


@dataclass(frozen=True)
class Outcome:
    """What a finished run reached. scores: of the games after its last step. curve: [T, 2], step
    and mean score of each evaluation."""

    steps: int
    scores: tuple[float, ...]
    curve: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def score(self) -> float:
        return math.fsum(self.scores) / len(self.scores)


def read_outcome(folder: Path) -> Outcome | None:
    """Of a run's ``result.json``; None where it has none. ValueError if it is damaged."""
    path = folder / RESULT
    if not path.is_file():
        return None
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        curve = tuple((int(step), float(score)) for step, score in held["curve"])
        scores = tuple(map(float, held["scores"]))
        if not all(map(math.isfinite, scores)) or not scores:
            raise ValueError(f"scores are {list(scores)}")
        return Outcome(int(held["steps"]), scores, curve, float(held["seconds"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, and the same "
            "`hubpath atari compare` makes it again"
        ) from error


def read_failure(path: Path) -> str | None:
    """Why a run failed, in a line; None if it did not."""
    try:
        return " ".join(str(json.loads(path.read_text(encoding="utf-8"))["error"]).split())
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError):
        return f"{path} is damaged"
