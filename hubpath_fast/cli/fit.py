"""``hubpath fit`` and ``hubpath evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..notes import show_notes
from ..runs.config import CLASSIFICATION, FitConfig
from .messages import console, messages
from .options import options

OptionalStr, OptionalPath = Optional[str], Optional[Path]  # noqa: UP045
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Folder = Annotated[Path, typer.Argument(help="folder of a run of `hubpath fit`, or a saved hub")]
BudgetMs = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="milliseconds an image may take in the mean: see `hubpath budget`"),
]
TopMass = Annotated[
    Optional[float],  # noqa: UP045
    typer.Option(help="ask only as many experts as hold this share of the router's weight"),
]
Room = Annotated[
    OptionalStr,
    typer.Option(help="experts that are in memory at a time: 8GB of them, or a number"),
]
ExpertMajor = Annotated[
    bool,
    typer.Option("--expert-major", help="ask each expert about all images before the next one"),
]

SHOWN = ("data", "dataset", "hub", "k", "steps", "lr_expert", "device")
# Options that scripts have. A setting that is not here yet gets none: it is reached by --set.
HIDDEN = (
    "lr_head", "lr_router", "batch_size", "optimizer", "schedule", "weight_decay", "clip_norm",
    "accumulate", "explore", "aggregator", "head_init", "image_size", "pretrained", "eval_every",
    "patience", "save_every", "seed", "workers", "cache", "cache_dir", "validation", "crops",
    "flip", "augment", "fallback", "warm_up", "parallel",
)  # fmt: skip


@options(FitConfig, SHOWN, HIDDEN, {"lr_expert": "--lr"})
def fit(
    asked,
    preset: Annotated[
        OptionalStr,
        typer.Option(help="paper-homogeneous, paper-heterogeneous, tiny or tiny-homogeneous"),
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("hubpath-run"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any setting that --print-config shows"),
    ] = None,
    data_root: Annotated[OptionalStr, typer.Option(hidden=True)] = None,
    seeds: Annotated[OptionalStr, typer.Option(hidden=True)] = None,
    config: Annotated[OptionalPath, typer.Option(hidden=True)] = None,
    amp: Annotated[bool, typer.Option("--amp", hidden=True)] = False,
    print_config: Annotated[bool, typer.Option("--print-config", hidden=True)] = False,
) -> None:
    """Train a Hub-Pathway on your own images, or on a data set that has a name.

    All settings as JSON: --print-config; --config FILE reads them, and other options go first.
    --seeds 0,1,2 trains a run for each in OUT/seed-S and gives mean and spread; --amp is bf16
    autocast; --data-root DIR is the folder of --dataset.
    """
    with messages():
        fit_command(asked, preset, out, resume, set_, data_root, seeds, config, amp, print_config)


def fit_command(
    asked: dict[str, Any],
    preset: str | None,
    out: Path,
    resume: bool,
    set_: list[str] | None,
    data_root: str | None,
    seeds: str | None,
    config: Path | None,
    amp: bool,
    print_config: bool,
    task: str = CLASSIFICATION,
) -> None:
    """What `hubpath fit` does, and `hubpath landmarks fit`, with what was asked for."""
    from ..parallel import started
    from ..recipes.fit import fit as run
    from ..recipes.seeds import fit_seeds
    from ..runs.folder import RunFolder
    from ..runs.resolve import parse_seeds, parse_set, settings

    given = (asked, parse_set(set_ or ()))
    one_seed = any("seed" in part.get("trainer", {}) for part in given)
    chosen_seeds = None if seeds is None else parse_seeds(seeds)
    if resume and chosen_seeds is None and RunFolder(out).has_seeds:
        chosen_seeds = RunFolder(out).seeds()[1]
    if chosen_seeds is not None and one_seed:
        raise ValueError("seed and seeds: give one of them; a run of several goes on with all")
    if data_root is not None:
        asked["data_root"] = data_root
    trainer = {"amp": "bf16"} if amp else {}
    chosen = settings(out, resume, config, asked, trainer, preset, set_ or (), task=task)
    if print_config:
        print(chosen.to_json())
        return
    if chosen_seeds is not None and not started().single:
        raise ValueError(
            f"seeds: expected one seed on several ranks, got {seeds}; start torchrun for each "
            "seed, with --seed and an --out of its own"
        )
    if chosen_seeds is not None:
        stopped = not fit_seeds(chosen, chosen_seeds, out, resume, console)
    else:
        stopped = run(chosen, out, resume, console)[0].interrupted
    if stopped:
        raise typer.Exit(130)


def evaluate(
    run: Folder,
    data: Annotated[OptionalStr, typer.Option(help="other data with the same classes")] = None,
    device: Device = "cpu",
    crops: Annotated[
        int, typer.Option(help="1, 5 or 10 of each image; the outputs are added up")
    ] = 1,
    data_root: Annotated[
        OptionalStr, typer.Option(help="where the run's own data set lies now")
    ] = None,
    workers: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="processes that decode images; 0: decode here; as in training"),
    ] = None,
    budget_ms: BudgetMs = None,
    top_mass: TopMass = None,
    room: Room = None,
    expert_major: ExpertMajor = False,
) -> None:
    """What a run's best checkpoint says of held-out images, or of other ones, by --data.

    A saved hub has no images of its own, and needs --data.
    OTHER may be a folder CLASS/IMAGE (all of it is scored), one with test/ or val/ (that is), or a
    list file; images of some of the run's classes are enough.
    """
    with messages():
        from ..recipes.evaluate import evaluate as recipe

        policy = budget_ms, top_mass
        memory = room, expert_major
        scores = recipe(run, data, device, crops, data_root, workers, *policy, *memory)
        split, count, notes = (scores.pop(name) for name in ("split", "n", "notes"))
        scores.pop("routes", None)  # `hubpath report` shows them
        named = ", ".join(f"{n.replace('_', ' ')} {value:.4f}" for n, value in scores.items())
        console.print(f"{split}: {named}, {count} images", soft_wrap=True)
        show_notes(notes, console)
