"""What follows the training of ``hubpath fit``: whether routing pays, what is kept, the figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape

from ..hub import expert_names
from ..model import HubPathway
from ..notes import show_notes
from ..parallel import Ranks
from ..runs.build import eval_batches, score
from ..runs.config import FitConfig
from ..runs.folder import RunFolder
from ..runs.pays import does_routing_pay, fixed_routes, prefers_fixed
from ..runs.pays_words import NO_VALIDATION, kept_sentence, quality_sentence, routes_sentence
from ..training import Task, TrainResult


def check_fallback(config: FitConfig, splits: Any) -> None:
    """Raises ValueError where there is nothing to decide on."""
    if config.fallback != "none" and not len(splits.validation):
        raise ValueError(
            f"fallback: {config.fallback} is decided on validation images, and there are none; "
            "give --validation a share above 0, or leave --fallback out"
        )


def finish(
    model: HubPathway,
    task: Task,
    result: TrainResult,
    splits: Any,
    config: FitConfig,
    image_size: int,
    folder: RunFolder,
    console: Console,
    costs: Mapping[str, Any],
    ranks: Ranks,
) -> dict[str, Any]:
    """Judges the trained model with its best weights, puts the fixed routes into it where the run
    keeps those, scores the test split, and writes ``routes.json`` and ``result.json``. Returns what
    that holds."""
    lost, step = folder.lost_best(), result.best_step
    if lost is not None:
        show_notes([lost], console)
    if lost is not None or step is None:
        step = result.steps
    routing = _judge(model, task, splits, config, image_size, ranks)
    kept = fixed_routes(routing) if routing["kept"] == "fixed" else None
    if kept is not None:
        model.generator = kept
    with ranks.agreed("writing the routes"):
        if ranks.is_first:
            folder.write_routes(kept)
    ends = f"with the weights of step {step}; kept in {folder.checkpoint()}"
    test, routes = _test(model, task, splits, config, image_size, console, ends, ranks)
    summary = {
        **test,
        "best_validation": result.best_metric,
        "best_step": step,
        "steps": result.steps,
        "seconds": result.seconds,
        "images_per_second": result.images_per_second,
        "seed": config.trainer.seed,
        **costs,
        "routes": routes,
        "routing": routing,
    }
    _tell(console, routing, routes_sentence(routes, expert_names(config.hub)), task, config)
    with ranks.agreed("writing the result"):
        if ranks.is_first:
            folder.write_result(summary)
    return summary


def _test(
    model: HubPathway,
    task: Task,
    splits: Any,
    config: FitConfig,
    image_size: int,
    console: Console,
    ends: str,
    ranks: Ranks,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures of the test split for ``result.json``, and its routes; ``ends`` ends the line
    that says them."""
    metric = task.metric
    test = score(model, task, splits.test, config, image_size, ranks=ranks)
    also = getattr(task, "also", ())
    beside = {n: v for n, v in test.items() if n.endswith(f"_{metric.name}") or n in also}
    figures = {
        f"test_{metric.name}": test[metric.name],
        **{f"test_{name}": value for name, value in beside.items()},
        "test_loss": test["loss"],
        "test_images": test["n"],
        "test_is_validation": splits.test_is_validation,
        **(task.facts() if hasattr(task, "facts") else {}),
    }
    more = "".join(f", {n.replace('_', ' ')} {metric.text(v)}" for n, v in beside.items())
    more += "," if beside else ""
    name = "validation (there is no test split)" if splits.test_is_validation else "test"
    measured = f" ({task.measured})" if hasattr(task, "measured") else ""
    console.print(
        f"[bold]{name}: {metric.text(test[metric.name])}{measured} of {test['n']} images[/]{more} "
        f"{escape(ends)}",
        soft_wrap=True,
    )
    show_notes(task.remarks(test) if hasattr(task, "remarks") else [], console)
    if config.crops > 1:
        scores = score(model, task, splits.test, config, image_size, config.crops, ranks=ranks)
        value = figures[f"test_{metric.name}_{config.crops}_crops"] = scores[metric.name]
        console.print(
            f"[bold]{name}: {metric.text(value)}[/] over {config.crops} crops of each image",
            soft_wrap=True,
        )
    return figures, test["routes"]


def _judge(
    model: HubPathway, task: Task, splits: Any, config: FitConfig, image_size: int, ranks: Ranks
) -> dict[str, Any]:
    """What ``does_routing_pay`` says of the validation images, and "kept": "learned" or "fixed"."""
    if not len(splits.validation):
        return {"sentence": NO_VALIDATION, "pays": None, "kept": "learned"}
    trainer, names = config.trainer, expert_names(config.hub)
    batches = eval_batches(splits.validation, config, image_size, ranks=ranks)
    found = does_routing_pay(
        model, task, batches, names, trainer.seed, trainer.device, trainer.amp, ranks=ranks
    )
    fixed = config.fallback == "fixed" and prefers_fixed(found, task.metric)
    return {**found, "kept": "fixed" if fixed else "learned"}


def _tell(
    console: Console, routing: dict[str, Any], routes: str, task: Task, config: FitConfig
) -> None:
    lines = [routes, routing["sentence"], quality_sentence(routing, task.metric)]
    if "fixed" in routing or config.fallback != "none":
        prefers = prefers_fixed(routing, task.metric)
        lines.append(kept_sentence(routing, config.fallback, prefers, task.metric))
    for head, line in zip(("routes", "routing", "", ""), lines, strict=False):
        if line is not None:
            console.print(f"[bold]{head:<8}[/]{escape(line)}", soft_wrap=True, highlight=False)
