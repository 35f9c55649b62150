"""What a worker process does: one job, done and written down."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ..baselines import difference
from ..baselines.costs import inference_costs
from ..files import write_bytes, write_json
from ..hub import expert_names
from ..hub.costs import count_flops
from ..runs.measure import PeakMemory, predict
from ..runs.warm_up import warm_up_steps
from ..training import RoutingCollapseWarning
from ..training.random_state import seed_all
from .methods import PATHWAY, methods_of
from .plan import PREPARE, PRETRAIN, Job
from .problems import Problem, open_problem
from .process import process_of_a_job
from .results import COSTS, OUTPUTS, RESULT, TARGETS, SeedResults, files_of, seed_folder
from .routing import judge_routing
from .runs import Constant, Context
from .settings import PROBLEM, CompareSettings


@dataclass(frozen=True)
class Body:
    """Does a job; see ``process_of_a_job``.

    cache: where the digits' pre-trained experts are kept. threads: of torch.
    """

    settings: CompareSettings
    out_dir: Path
    cache: Path
    threads: int

    def __call__(self, job: Job) -> None:
        warnings.simplefilter("ignore", RoutingCollapseWarning)  # the run's log has it
        with process_of_a_job(job.failed(self.out_dir), self.threads):
            if job.run == PREPARE:
                prepare(self.settings, job.seed, self.out_dir, self.cache)
            elif job.run.startswith(PRETRAIN):
                pretrain(self.settings, job, self.out_dir, self.cache)
            else:
                run_job(self.settings, job, self.out_dir, self.cache)


def prepare(settings: CompareSettings, seed: int, out_dir: Path, cache: Path) -> None:
    """Reads the data and the hub, and notes what all methods share: names, held-out targets, why
    the hub is not homogeneous, which experts are still to be pre-trained."""
    files = files_of(out_dir)
    problem = open_problem(settings, seed, verify=True, cache=cache, files=files)
    if not files.is_file() and (listed := problem.files()) is not None:
        listed.write(files)  # its seeds are prepared one after the other
    if settings.fit.warm_up:
        images = problem.batches("train").num_samples
        warm_up_steps(settings.fit.warm_up, images, settings.fit.trainer)
    experts, hub = problem.experts(loaded=()), problem.hub
    missing = [] if hub is None else hub.missing()
    targets = dict(problem.targets)
    if problem.groups is not None:
        targets["groups"] = problem.groups
    write_bytes(seed_folder(out_dir, seed) / TARGETS, save(targets))
    write_json(
        seed_folder(out_dir, seed) / PROBLEM,
        {
            **problem.task.record(),
            "experts": problem.expert_names,
            "models": expert_names([expert.name for expert in experts]),
            "group_names": list(problem.group_names),
            "group_label": problem.group_label,
            "images": {name: len(part) for name, part in problem.targets.items()},
            "difference": difference([expert.body for expert in experts], problem.expert_names),
            "fingerprint": problem.fingerprint(),
            "split": problem.split,
            "costs": [count_flops(e.module, problem.size) / 1e9 for e in experts],
            "parameters": sum(p.numel() for e in experts for p in e.module.parameters()),
            "pretrain": {member.index: member.before for member in missing},
            "notes": problem.notes(),
        },
    )


def pretrain(settings: CompareSettings, job: Job, out_dir: Path, cache: Path) -> None:
    """Pre-trains one of the digits' experts."""
    folder = job.folder(out_dir)
    hub = open_problem(settings, job.seed, cache=cache).hub
    _, seconds = hub.pretrain(int(job.run.removeprefix(PRETRAIN)), folder)
    write_json(folder / RESULT, {"train_seconds": seconds})
    shutil.rmtree(folder / "last")  # the store has the weights


def run_job(settings: CompareSettings, job: Job, out_dir: Path, cache: Path) -> None:
    """Trains and measures one run, and writes its outputs and then its result."""
    fit, folder = settings.fit, job.folder(out_dir)
    results = SeedResults(out_dir, job.seed, settings.rates)
    rate = results.result(job.follows)["rate"] if job.follows else job.rate
    problem = open_problem(settings, job.seed, cache=cache, files=files_of(out_dir))
    problem.check_same(results.problem, seed_folder(out_dir, job.seed) / PROBLEM)
    method = next(method for method in methods_of(settings) if method.run == job.run)
    problem.experts(loaded=())  # what only loading needs is no part of the run's memory
    memory = PeakMemory(fit.trainer.device)
    context = Context(problem, folder, rate, results, method.length)
    seed_all(job.seed)
    model = method.train(context)
    peak = memory.mebibytes()

    outputs, measured = held_out(model, problem)
    judged = judge_routing(model, problem) if method.run == PATHWAY else {}
    write_bytes(folder / OUTPUTS, save(outputs))
    write_json(
        folder / RESULT,
        {
            "seed": job.seed,
            "run": job.run,
            "rate": rate,
            "after": {run: results.result(run)["rate"] for run in method.waits_for},
            **measured,
            **judged,
            "train_seconds": context.seconds,
            "train_steps": context.steps,
            "train_forwards": context.steps * fit.trainer.batch_size * method.forwards
            + context.warm_up_forwards,
            "train_forwards_per_sample": method.forwards,
            "warm_up_forwards": context.warm_up_forwards,
            **costs(model, problem),
            "peak_memory_mb": peak,
            "threads": torch.get_num_threads(),
        },
    )


def held_out(
    model: nn.Module | Constant, problem: Problem
) -> tuple[dict[str, Tensor], dict[str, dict[str, float]]]:
    """What a model says of the held-out images: (what is stored, the task's results by split).

    Stored are the predictions of both splits, and of the test images: of a Hub-Pathway the weights
    of its experts, and of a task that is judged by errors each one's error.
    """
    task, trainer, outputs, measured = problem.task, problem.fit.trainer, {}, {}
    for split, targets in problem.targets.items():
        weights = None
        if isinstance(model, Constant):
            outputs[split] = model.prediction.repeat(len(targets), *[1] * model.prediction.dim())
        else:
            outputs[split], weights = predict(
                model, task, problem.batches(split), trainer.device, trainer.amp
            )
        measured[split] = task.results(outputs[split], targets)
        if split == "test" and weights is not None:
            outputs["weights"] = weights
        if split == "test" and task.metric.better == "min":
            outputs["errors"] = task.scores(outputs[split], targets)
    return outputs, measured


def costs(model: nn.Module | Constant, problem: Problem) -> dict[str, float | None]:
    """At inference; see ``inference_costs``."""
    if isinstance(model, Constant):
        return dict.fromkeys((*COSTS, "router_share"))
    images, _ = next(iter(problem.batches("test")))
    return inference_costs(model, images)
