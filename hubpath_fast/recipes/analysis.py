"""``hubpath report``: the paper's analysis of a run of ``hubpath fit``, or of a comparison."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compare.digits_hub import expert_store
from ..compare.methods import Method, methods_of
from ..compare.problems import Problem, open_problem
from ..compare.results import RunFailed, SeedResults, files_of, read, seed_folder
from ..compare.settings import (
    COMPARE_FILE,
    PROBLEM,
    CompareSettings,
    names_of_experts,
    read_compare,
)
from ..compare.tables import TABLE, bar_of, describe_budget, retitled
from ..hub import expert_names, expert_sources
from ..model import HubPathway
from ..report.analysis import Analysis, write_analysis
from ..runs.build import eval_batches, make_experts, make_pathway, make_task
from ..runs.data import open_to_score
from ..runs.folder import FIT, RunFolder, open_run
from ..runs.kinds import kind_of
from ..runs.measure import predict
from ..runs.places import check_apart
from ..training import Task, load_weights, read_log
from ..training.routes import routes_of
from ..written import described, lacks

FINE_TUNED_ALONE = "each expert fine-tuned alone"
OWN_EXPERTS = "the hub's own experts, each on all images"


def report(
    run: str | Path,
    out_dir: str | Path | None = None,
    device: str = "cpu",
    tell: Callable[[str], None] = lambda note: None,
) -> Path:
    """Writes ``report.html`` and ``figures/`` of a run into ``out_dir`` (None: ``run/report``).

    run: a folder of ``hubpath fit`` or of ``hubpath compare``. tell: is given what to know beside
    the report, a sentence each. Returns the page's path.

    Raises:
        ValueError: the folder is neither, or holds no Hub-Pathway that is finished; the images that
            it reports on are not what they were.
    """
    run, out = Path(run), Path(run) / "report" if out_dir is None else Path(out_dir)
    if out.exists() and not out.is_dir():
        raise ValueError(f"out: {out} is a file; give a folder")
    compared = (run / COMPARE_FILE).is_file()
    config = _compared(run).fit if compared else RunFolder(run).config()
    if config is None:
        raise ValueError(
            described(run)
            or f"{run} holds neither a run of `hubpath fit` nor one of `hubpath compare` "
            f"({lacks(run, f'{FIT}, {COMPARE_FILE}')}); give the folder named by --out"
        )
    check_apart(out, config.dataset, config.data)
    make = _of_comparison if compared else _of_run
    return write_analysis(make(run, device, tell), out)


def _compared(out_dir: Path) -> CompareSettings:
    return CompareSettings.from_dict(read_compare(out_dir)["settings"])


def _of_run(run: Path, device: str, tell: Callable[[str], None]) -> Analysis:
    opened = open_run(run, device)
    config = opened.config
    splits = open_to_score(RunFolder(run), config)
    for note in (*opened.notes, *splits.changes):
        tell(note)
    task = opened.task
    task.check_same(make_task(config, splits), config.data)
    batches = eval_batches(splits.test, config, opened.image_size, device=device)
    kind, name = kind_of(config), config.data_name
    dataset = kind.eval_dataset(splits.test, config, opened.image_size)

    def images(indices) -> Tensor:
        return torch.stack([dataset[int(i)][0] for i in indices])

    targets = kind.targets(splits.test, config, opened.image_size)
    predictions, weights = predict(opened.model, task, batches, device, config.trainer.amp)
    split = "validation" if splits.test_is_validation else "test"
    return Analysis(
        title=f"Hub-Pathway on {name}",
        subtitle=f"{run.name}: {config.k} of {len(config.hub)} experts for each image, seed "
        f"{config.trainer.seed}; figures are of its {len(splits.test)} {split} images.",
        data_name=name,
        measure=task.metric,
        expert_names=expert_names(config.hub),
        expert_sources=expert_sources(config.hub),
        scores=task.scores(predictions, targets),
        scores_alone=scores_alone(task, opened.model, batches, device),
        alone_title=OWN_EXPERTS,
        weights=weights,
        k=config.k,
        split=split,
        routes=routes_of(weights, targets),
        routing=(RunFolder(run).result() or {}).get("routing"),
        history=RunFolder(run).history(),
        images=images,
        outputs=outputs_of(opened.model, images),
        **_together(kind.about(splits), task.report(predictions, targets)),
    )


def _of_comparison(out_dir: Path, device: str, tell: Callable[[str], None]) -> Analysis:
    settings = _compared(out_dir)
    table = read(out_dir / f"{TABLE}.json")
    if table is None:
        raise ValueError(f"{out_dir} holds no table yet; let `hubpath compare` finish first")
    found = [SeedResults(out_dir, seed, settings.rates) for seed in table["seeds"]]
    results = next((r for r in found if _has(r, "pathway")), None)
    if results is None:
        raise ValueError(f"{out_dir} holds no finished Hub-Pathway; compare it as well")
    problem = open_problem(
        settings, results.seed, cache=expert_store(out_dir), files=files_of(out_dir), scored=True
    )
    for note in problem.changes:
        tell(note)
    noted, outputs, known = results.problem, results.predictions("pathway"), results.targets()
    problem.check_same(noted, seed_folder(out_dir, results.seed) / PROBLEM)  # its images are shown
    task, targets = results.task, known["test"]
    singles = [f"single-{i}" for i in range(len(noted["experts"]))]
    if all(_has(results, run) for run in singles):
        found_alone = [task.scores(results.predictions(run)["test"], targets) for run in singles]
        alone = torch.stack(found_alone)
        title = FINE_TUNED_ALONE
    else:
        model = _pathway(problem, results, device)
        alone = scores_alone(task, model, problem.batches("test"), device)
        title = OWN_EXPERTS

    def images(indices) -> Tensor:
        return problem.images(torch.as_tensor(indices))

    groups = {}
    if "groups" in known:
        groups = {"groups": known["groups"], "group_names": noted["group_names"]}
        groups["group_label"] = noted["group_label"]
    k, name, methods = settings.fit.k, settings.fit.data_name, methods_of(settings)
    seeds = ", ".join(map(str, table["seeds"]))
    several = f" Figures over K and against cost are of seeds {seeds}." if len(found) > 1 else ""
    return Analysis(
        title=f"Hub-Pathway on {name}",
        subtitle=f"{k} of {len(singles)} experts for each image, seed {results.seed}; figures are "
        f"of its {len(targets)} {problem.split} images.{several} {describe_budget(settings)}",
        data_name=name,
        measure=task.metric,
        expert_names=names_of_experts(settings),
        expert_sources=expert_sources(settings.fit.hub),
        scores=task.scores(outputs["test"], targets),
        scores_alone=alone,
        alone_title=title,
        weights=outputs["weights"],
        k=k,
        split=problem.split,
        routes=routes_of(outputs["weights"], targets),
        routing=results.result("pathway").get("routing"),
        history=read_log(results.folder("pathway") / "log.jsonl"),
        values_by_k=_by_k(table["rows"], settings),
        rows=[bar_of(retitled(row, methods)) for row in table["rows"]],
        images=images,
        scores_of=lambda: _scores_of(table["rows"], methods, results),
        outputs=lambda indices: _outputs(problem, results, device, images, tell)(indices),
        **_together(problem.about(), task.report(outputs["test"], targets) | groups),
    )


def _together(*found: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of an ``Analysis`` from several places: of their details all, else the last."""
    details = {name: cells for fields in found for name, cells in fields.get("details", {}).items()}
    return {key: value for fields in found for key, value in fields.items()} | {"details": details}


def _scores_of(
    rows: Iterable[Mapping[str, Any]], methods: Sequence[Method], results: SeedResults
) -> dict[str, Tensor]:
    """The scores [n] of the methods that have a figure, by title, of one seed."""
    found = {}
    known = {row["method"] for row in rows if row["mean"] is not None}
    for method in methods:
        if {method.name, method.full} & known:
            with contextlib.suppress(RunFailed):  # on this seed
                found[method.title] = method.scores(results)
    return found


def _pathway(problem: Problem, results: SeedResults, device: str) -> HubPathway:
    """A comparison's trained Hub-Pathway."""
    task = problem.task
    experts = make_experts(problem.fit, task, problem.size, pretrained=False)
    model = make_pathway(problem.fit, experts, task.num_outputs, problem.size, pretrained=False)
    load_weights(model, results.folder("pathway") / "last")
    return model.to(device)


def _outputs(
    problem: Problem,
    results: SeedResults,
    device: str,
    images: Callable[[Sequence[int]], Tensor],
    tell: Callable[[str], None],
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor] | None]:
    """``outputs_of`` of a comparison's Hub-Pathway; of one that cannot be opened any more, None."""
    try:
        return outputs_of(_pathway(problem, results, device), images)
    except (ValueError, OSError) as error:
        tell(f"the trained Hub-Pathway cannot be opened, so its maps are not shown: {error}")
        return lambda indices: None


def outputs_of(
    model: HubPathway, images: Callable[[Sequence[int]], Tensor]
) -> Callable[[Sequence[int]], tuple[Tensor, Tensor]]:
    """What ``Analysis.outputs`` asks for, on the CPU."""

    @torch.no_grad()
    def outputs(indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        model.eval()
        shown = images(indices).to(next(model.parameters()).device)
        return model.ask_all(shown).float().cpu(), model(shown).float().cpu()

    return outputs


@torch.no_grad()
def scores_alone(task: Task, model: HubPathway, batches: Iterable, device: str) -> Tensor:
    """[M, n] float64: the task's score of each of the model's experts on every image."""
    model.eval()
    parts = []
    for images, targets in batches:
        unit = images.to(device)
        unit = unit.float() / 255 if unit.dtype == torch.uint8 else unit
        pairs = zip(model.experts, model.input_mean, model.input_std, strict=True)
        outputs = [
            expert((unit - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)) for expert, mean, std in pairs
        ]
        scores = [task.scores(task.predict(output).cpu(), targets.cpu()) for output in outputs]
        parts.append(torch.stack(scores))
    return torch.cat(parts, dim=1)


def _has(results: SeedResults, run: str) -> bool:
    try:
        results.folder(run)
    except RunFailed:
        return False
    return True


def _by_k(
    rows: Iterable[Mapping[str, Any]], settings: CompareSettings
) -> dict[int, Sequence[float]] | None:
    """Values of the seeds, for every K that was trained; None unless there are several."""
    k_of = {method.name: method.k for method in methods_of(settings)}
    found = {k_of.get(row["method"]): row["accuracies"] for row in rows if row["accuracies"]}
    found.pop(None, None)
    return found if len(found) > 1 else None
