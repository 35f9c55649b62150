"""``hubpath shelf fit``: a shelf of features in, a router and the heads of its experts out.

The bodies stand still and were asked already, so a step is a few small products: it is trained by
the trainer that ``hubpath fit`` has, with its losses, log, checkpoints and ways to go on.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..checkpoints.tensor_file import replace_file
from ..devices import check_device, read_device
from ..features import Shelf
from ..files import write_json
from ..locks import locked
from ..model import HubPathway
from ..runs.measure import predict
from ..runs.places import check_apart, check_not_taken
from ..runs.resolve import parse_set
from ..shelf.choice import Routed, choose_models
from ..shelf.heads import HEADS
from ..shelf.memory import keep_freed_memory
from ..shelf.model import FEATURES, router_model
from ..shelf.placing import place
from ..shelf.run import (
    FOLDER,
    PREDICTIONS,
    RESULT,
    best_checkpoint,
    build,
    has_hub,
    read_hub,
    shelf_task,
    write_hub,
)
from ..shelf.save import is_saved
from ..shelf.settings import ShelfFitSettings
from ..shelf.stream import ShelfBatches, ShelfStream
from ..shelf.timing import router_ms
from ..training import (
    PathwayObjective,
    Reporting,
    RoutingCollapseWarning,
    Trainer,
    TrainResult,
    evaluate,
    find_checkpoint,
)
from ..training.random_state import seed_all
from ..training.resume import refuse_other_run
from ..written import SHELF_HUB

EVAL_BATCH = 1024
ROUNDING = 1e-6  # of a number of experts
AS_BEGUN = "those that it began with"


def shelf_fit(
    shelf: str | Path,
    settings: ShelfFitSettings,
    out: str | Path | None = None,
    resume: bool = False,
    console: Console | None = None,
) -> tuple[TrainResult, dict[str, Any]]:
    """Trains, evaluates the best checkpoint, and writes ``result.json`` and the predictions.

    Args:
        shelf: its folder.
        out: of the hub; None: ``SHELF/hub``.
        resume: go on with the training in ``out``, with the experts that it has.

    Returns:
        (the training's result, the contents of ``result.json``; empty if a signal stopped it).

    Raises:
        ValueError: no shelf, or one of too few images; settings that do not fit it (see
            ``choose_models`` and ``build_hub``); a folder that holds another hub.
        NonFiniteLoss: as of ``Trainer.fit``.
    """
    console = console or Console()
    opened = Shelf.open(shelf)
    folder = opened.folder / FOLDER if out is None else Path(out)
    check_device(settings.trainer.device)
    check_apart(folder, opened.record.dataset, opened.record.data)
    check_not_taken(folder, SHELF_HUB)
    with locked(folder, console=console):
        return _fit(opened, settings, folder, resume, console)


def asked_settings(
    shelf: str | Path,
    asked: Mapping[str, Any],
    router_features: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    extra: Sequence[str] = (),
) -> ShelfFitSettings:
    """The settings that a command asks for: the defaults, or those of the hub that is resumed, over
    them ``asked``, as ``from_dict`` takes it, and last ``extra``, as "KEY=VALUE".

    router_features: a model's label or name, in place of the setting ``router``.

    Raises ValueError for an unknown or impossible setting.
    """
    folder = Path(shelf) / FOLDER if out is None else Path(out)
    base = ShelfFitSettings()
    if resume and has_hub(folder):
        base = read_hub(folder, Shelf.open(shelf)).settings
    given = {"router": f"{FEATURES}:{router_features}"} if router_features is not None else {}
    trainer = base.trainer.to_dict()
    values = {**base.to_dict(), **given}
    for part in (asked, parse_set(extra, ShelfFitSettings)):
        trainer |= part.get("trainer", {})
        values |= part
    return ShelfFitSettings.from_dict({**values, "trainer": trainer})


def _fit(
    shelf: Shelf, settings: ShelfFitSettings, folder: Path, resume: bool, console: Console
) -> tuple[TrainResult, dict[str, Any]]:
    def say(head: str, text: str) -> None:
        console.print(f"[bold]{head:<8}[/]{escape(text)}", soft_wrap=True, highlight=False)

    began = time.perf_counter()
    if is_saved(folder):
        raise ValueError(
            f"out: {folder} is a hub that hubpath shelf prune or add wrote, from which no training "
            "goes on; give another folder"
        )
    hint = f"the same command and --resume (--out {folder})"
    if not resume:
        refuse_other_run(folder, hint, "out")
    if resume and has_hub(folder) and find_checkpoint(folder / "last"):
        routed = Routed(read_hub(folder, shelf).models, None, AS_BEGUN)
    else:
        try:
            with console.status("") as status:
                routed = choose_models(shelf, settings, status.update)
        except KeyboardInterrupt:
            raise InterruptedError(
                f"stopped while the experts were chosen: the heads that are fitted are kept in "
                f"{shelf.folder / HEADS}, and the same command goes on from there"
            ) from None
    prepared = time.perf_counter() - began
    seed_all(settings.trainer.seed)
    model = build(shelf, routed.models, settings, routed.heads)
    labels = model.origin.labels
    _banner(say, shelf, settings, routed, model)
    device = read_device(settings.trainer.device)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.type == "cuda":
        say("memory", place(model, device).text())
    task, validation = shelf_task(shelf, settings), shelf.splits["validation"]
    trainer = Trainer(
        model,
        PathwayObjective(task.criterion(settings.explore, **settings.supervision)),
        ShelfStream(shelf, settings.trainer.batch_size, settings.trainer.seed),
        settings.trainer,
        folder,
        task=task,
        validation=ShelfBatches(shelf, validation, EVAL_BATCH) if len(validation) else None,
        run=_identity(shelf, settings, routed.models),
        resume=resume,
        reporting=Reporting(
            console,
            expert_names=labels,
            resume_hint=hint,
            metric=task.metric,
        ),
    )
    if not trainer.begun:
        write_hub(folder, shelf, routed.models, settings)
    with warnings.catch_warnings():  # a line for each of hundreds of experts: log.jsonl has them
        warnings.simplefilter("ignore", RoutingCollapseWarning)
        result = trainer.fit()
    if result.interrupted:
        return result, {}
    trainer.load_best()
    found = _finish(model, shelf, routed.models, settings, result, folder)
    summary = found | {"prepare_seconds": prepared, "seed": settings.trainer.seed}
    write_json(folder / RESULT, summary)
    _tell(say, summary, shelf, folder)
    return result, summary


def _identity(shelf: Shelf, settings: ShelfFitSettings, models: tuple[int, ...]) -> dict[str, Any]:
    """What makes two trainings the same, but for the trainer's settings, which it compares."""
    identity = settings.identity()
    asked = {name: identity[name] for name in identity if not name.startswith("trainer.")}
    keys = [shelf.models[i].key for i in models]
    return {"shelf fit": asked, "models": keys, "classes": list(shelf.classes)}


def _finish(
    model: HubPathway,
    shelf: Shelf,
    models: tuple[int, ...],
    settings: ShelfFitSettings,
    result: TrainResult,
    folder: Path,
) -> dict[str, Any]:
    """Scores the held-out images and keeps what is predicted; what ``result.json`` holds."""
    task, device = shelf_task(shelf, settings), settings.trainer.device
    scores, predictions = {}, {}
    for split in ("validation", "test"):
        batches = ShelfBatches(shelf, shelf.splits[split], EVAL_BATCH)
        if not batches.num_samples:
            continue
        scores[split] = evaluate(model, batches, task, device, settings.trainer.amp)
        predictions[split], _ = predict(model, task, batches, device, settings.trainer.amp)
    replace_file(folder / PREDICTIONS, predictions)
    routes = scores["test"].pop("routes") if "test" in scores else {}
    scores.get("validation", {}).pop("routes", None)
    routes.pop("class_share", None)
    watched = router_model(shelf, settings.router)
    router = router_ms(model, shelf.splits["train"])
    return {
        **{f"{s}_{name}": value for s, found in scores.items() for name, value in found.items()},
        "test_is_validation": shelf.record.test_is_validation,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "weights": str(best_checkpoint(folder).relative_to(folder)),
        "experts": [shelf.models[i].label for i in models],
        "k": settings.k,
        "routes": routes,
        "forwards": settings.k + (watched is not None),
        "router_ms": router,
        "ms": _ms(shelf, models, routes, watched, router),
        "router": settings.router,
    }


def _ms(
    shelf: Shelf,
    models: tuple[int, ...],
    routes: dict[str, Any],
    watched: int | None,
    router: float,
) -> float | None:
    """Of an image at inference: the bodies that are asked, as often as each is, that which the
    router looks at, and the router. None where a body was not measured. Heads are not counted."""
    asked = [
        (shelf.models[i].ms, share)
        for i, share in zip(models, routes.get("share", ()), strict=bool(routes))
        if share > 0
    ]
    if watched is not None:
        asked.append((shelf.models[watched].ms, 1.0))
    if not asked or any(ms is None for ms, _ in asked):
        return None
    return router + sum(ms * share for ms, share in asked)


def _banner(say: Any, shelf: Shelf, settings: ShelfFitSettings, routed: Routed, model) -> None:
    trainer, sizes = settings.trainer, shelf.record.sizes
    rate = trainer.lr_expert if trainer.lr_head is None else trainer.lr_head
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    heads = f", {settings.heads} heads" if routed.reason != AS_BEGUN else ""
    say(
        "hub",
        f"K = {settings.k} of {len(routed.models)} ({routed.reason}){heads}, {millions:.2f} M "
        f"parameters; router on {_watched(settings.router)}; aggregator: {_kind(model)}",
    )
    say(
        "data",
        f"{shelf.folder}: {len(shelf.models)} models, {len(shelf.classes)} classes, {sizes[0]} "
        f"train, {sizes[1]} validation, {sizes[2]} test images, {shelf.record.views} views, "
        f"{shelf.record.dtype}",
    )
    say(
        "run",
        f"{trainer.steps} steps of {trainer.batch_size} on {trainer.device}, {trainer.optimizer} "
        f"{trainer.schedule}, learning rates {rate:g} (heads) and {trainer.lr_router:g} "
        f"(router), seed {trainer.seed}",
    )


def collapsed(share: Sequence[float], k: int) -> str:
    """A warning where a router hardly chooses, else "". share: [M], of the images that each expert
    is asked about.

    Counted are as many experts, asked alike often, as have the same entropy. Two images can have
    nothing in common only where there are 2 K; of fewer experts in all, half of those beside K.
    """
    total = math.fsum(share)
    parts = [part / total for part in share if part > 0]
    alike = math.exp(-math.fsum(part * math.log(part) for part in parts))
    if len(share) <= k or alike > min(2 * k, (k + len(share)) / 2) - ROUNDING:
        return ""
    used = len(parts)
    return (
        f"the routing has collapsed: of {len(share)} experts {used} are asked, nearly the "
        "same ones about every image; take fewer --experts, more --steps, or raise --set explore="
    )


def _watched(router: str) -> str:
    """What a router looks at, in words."""
    kind, _, label = router.partition(":")
    return f"the features of {label}" if kind == FEATURES else "the image"


def _kind(model: HubPathway) -> str:
    """The aggregator as the setting names it, "auto" decided."""
    return type(model.aggregator).__name__.removesuffix("Aggregator").lower()


def _tell(say: Any, found: dict[str, Any], shelf: Shelf, folder: Path) -> None:
    name = "no test" if found["test_is_validation"] else "test"
    images = "validation images" if found["test_is_validation"] else "images"
    if "test_accuracy" in found:
        cost = "" if found["ms"] is None else f", {found['ms']:.3g} ms an image"
        guessing = math.log(len(shelf.classes))
        say(
            name,
            f"{100 * found['test_accuracy']:.1f} % of {found['test_n']} {images} right, log-loss "
            f"{found['test_loss']:.3f} (guessing: {guessing:.3f}), with {found['forwards']} "
            f"models asked of each{cost}; weights of {found['weights']}/",
        )
    share = found["routes"].get("share", [])
    asked = sorted(zip(share, found["experts"], strict=bool(share)), reverse=True)
    if asked:
        most = ", ".join(f"{name} {100 * part:.0f} %" for part, name in asked[:5] if part > 0)
        used = sum(part > 0 for part in share)
        say("routes", f"{used} of {len(share)} experts are asked; most often {most}")
        if text := collapsed(share, found["k"]):
            say("warning", text)
    say("written", str(folder))
