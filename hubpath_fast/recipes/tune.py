"""``hubpath tune``: which executor is the fastest for a run's hub on this machine.

Steps of training and predictions are measured as the run does them, on images of noise: the time of
a step does not depend on what is seen. It does depend on how many rows each expert gets, so routes
are drawn such that experts get the shares that they had in the run, and every executor the same
ones. Nothing of the run is changed: the model is a copy in memory, and its learning rates are 0.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import CheckpointError, load_config
from ..devices import autocast
from ..executors import Executor, Workload, remembered
from ..executors.choice import CLASSES, by_rule, make_executor, runs_on
from ..executors.graphs import GraphsExecutor
from ..model import FixedRoutes
from ..runs.build import batch_changes, training_work
from ..runs.config import FitConfig
from ..runs.folder import Run, RunFolder, open_run
from ..runs.kinds import kind_of
from ..training import PathwayObjective, build_optimizer, default_groups, find_checkpoint

ROUTES = 64  # batches' routes, in turns: so many different sizes of groups
SMALLEST_SHARE = 1e-4  # of the rows, for an expert that had none: a logarithm is taken
MIN_WARM_UPS, MIN_ROUNDS, MAX_ROUNDS = 5, 5, 500
WARM_UP_FRACTION = 0.3  # of the seconds: captures of graphs take longest
STEPS_IN_A_ROW = 4  # on a GPU steps follow one another, and none waits for the one before

Tell = Callable[[str], None]


@dataclass(frozen=True)
class Spread:
    """Quantiles of the milliseconds of a step. memory: the most bytes that the device's allocator
    held in steps before, None on a CPU."""

    p25: float
    p50: float
    p75: float
    p90: float
    memory: int | None = None

    @classmethod
    def of(cls, samples: Sequence[float], memory: int | None = None) -> Spread:
        cuts = statistics.quantiles(samples, n=20, method="inclusive")
        return cls(cuts[4], cuts[9], cuts[14], cuts[17], memory)


@dataclass(frozen=True)
class Tuned:
    """What was found for batches like ``work``. times: by executor. chosen: the one to take."""

    work: Workload
    times: Mapping[str, Spread]
    chosen: str


@dataclass(frozen=True)
class Result:
    """tuned: of training, and of predictions, where any executor could run. path: where it is
    remembered, None where nothing was compared. notes: what to know."""

    tuned: tuple[Tuned, ...]
    path: Path | None
    notes: tuple[str, ...]


def tune(
    run: str | Path,
    device: str | None = None,
    seconds: float = 20.0,
    batch_size: int | None = None,
    tell: Tell = lambda text: None,
) -> Result:
    """Measures every executor that there is for a device, and remembers the fastest.

    Args:
        run: the folder of a finished run of ``hubpath fit`` or ``hubpath landmarks fit``.
        device: to measure on; None: as in training.
        seconds: to spend on training steps, and again on predictions.
        batch_size: of a step; None: as in training.
        tell: is told what is being done.

    Raises:
        ValueError: no finished run in the folder, or one of a game; a device that is not there, or
            that only one executor is for; batches too large for its memory.
    """
    check_kind(run)
    config = _config(run, device, batch_size)
    names = candidates(torch.device(config.trainer.device))
    notes: list[str] = []
    tuned, new = [], []
    for use in remembered.USES:
        opened = open_run(run, config.trainer.device)
        work = _work(config, opened.image_size)[use]
        tell(f"{use.replace('training', 'training steps')}: {', '.join(names)}")
        bench = Bench(opened, config, work, RunFolder(Path(run)).history())
        times = measure(bench, names, seconds, notes)
        if not times:
            notes.append(f"no executor could run {use}: nothing is remembered of it")
            continue
        own = by_rule(work, opened.model.experts).executor
        tuned.append(Tuned(work, times, decide(times, own)))
        medians = {name: round(spread.p50, 4) for name, spread in times.items()}
        if len(medians) > 1:
            experts, k = opened.model.experts, opened.model.k
            new.append(remembered.made(work, experts, k, tuned[-1].chosen, medians))
    if not tuned:
        raise ValueError(
            f"batch_size: no executor could run batches of {config.trainer.batch_size} "
            f"({'; '.join(notes)}); take a smaller one"
        )
    asked = config.executor
    if asked != "auto":
        notes.append(f"the run asks for executor={asked}; executor=auto follows what was measured")
    path = remembered.remember(new) if new else None
    return Result(tuple(tuned), path, tuple(notes))


def forget(run: str | Path | None = None) -> int:
    """Drops what was remembered of a run's hub, None: all; returns how many measurements."""
    if run is None:
        return remembered.forget()
    check_kind(run)
    return remembered.forget(open_run(run).model.experts)


def check_kind(run: str | Path) -> None:
    """Raises ValueError for a run of a game, which owns its loop."""
    last = find_checkpoint(Path(run) / "last")
    if last is None or RunFolder(Path(run)).has_run:
        return
    try:
        known = load_config(last)
    except CheckpointError:  # of no run that is known: the run's folder will say so
        return
    if isinstance(known, dict) and "atari" in known:
        raise ValueError(
            f"{run} is a run of `hubpath atari`, whose steps are captured as they are or not at "
            "all; expected one of `hubpath fit` or `hubpath landmarks fit`"
        )


def candidates(device: torch.device) -> list[str]:
    """The executors that there are for a device; ValueError if that is but one."""
    names = [name for name in CLASSES if runs_on(name, device)]
    if device.type == "cpu" and torch.get_num_threads() == 1:
        names.remove("threads")  # it needs two
    if len(names) == 1:
        where = f"{device.type} with one thread" if device.type == "cpu" else device.type
        raise ValueError(
            f"device: on {where} experts run one after another in any case, so there is nothing to "
            "choose; use a GPU, or a CPU with OMP_NUM_THREADS=2 or more"
        )
    return names


def _config(run: str | Path, device: str | None, batch_size: int | None) -> FitConfig:
    config = RunFolder(Path(run)).record().config
    trainer = config.trainer
    size = trainer.batch_size if batch_size is None else batch_size
    return config.replace(trainer=trainer.replace(device=device or trainer.device, batch_size=size))


def _work(config: FitConfig, image_size: int) -> dict[str, Workload]:
    training = training_work(config, image_size)
    predictions = training._replace(samples=config.trainer.batch_size, gradients=False)
    return dict(zip(remembered.USES, (training, predictions), strict=True))


class Bench:
    """A run's model with a batch of noise: ``bench(name, i)`` runs step ``i`` by an executor."""

    def __init__(
        self, run: Run, config: FitConfig, work: Workload, history: Sequence[Mapping[str, Any]]
    ):
        self.work, self.model, self._config = work, run.model, config
        self._images, self._targets = random_batch(run, config, work)
        self._eps = draw_noise(shares(history, len(run.model.experts), work.gradients), work)
        if not isinstance(self.model.generator, FixedRoutes):
            self.model.generator = Indifferent(self.model.generator)
        self.model.train(work.gradients)
        criterion = run.task.criterion(config.explore, **config.supervision)
        self._objective = PathwayObjective(criterion)
        trainer = config.trainer
        self._optimizer = build_optimizer(self.model, default_groups(self.model, trainer), trainer)
        for group in self._optimizer.param_groups:
            group["lr"] = 0.0  # as much to compute, and weights that stay as they are

        self._executors: dict[str, Executor] = {}

    def obstacle(self, name: str) -> str | None:
        """Why an executor does not do what it is for."""
        executor = self._executors[name]
        return executor.obstacle if isinstance(executor, GraphsExecutor) else None

    def drop(self, name: str) -> None:
        """Frees what an executor holds."""
        self._optimizer.zero_grad(set_to_none=True)
        self.model.executor = "sequential"
        self._executors.pop(name, None)
        if self.work.device.type == "cuda":
            torch.cuda.empty_cache()

    def __call__(self, name: str, i: int) -> None:
        if name not in self._executors:
            self._executors[name] = make_executor(name)
        self.model.executor = self._executors[name]
        eps = self._eps[i % len(self._eps)]
        if not self.work.gradients:
            with torch.no_grad(), autocast(self.work.device, self._config.trainer.amp):
                self.model(self._images, eps=eps)
            return
        self._optimizer.zero_grad(set_to_none=True)

        def routed(*arguments: Any, **more: Any) -> Any:
            return self.model(*arguments, eps=eps, **more)

        with autocast(self.work.device, self._config.trainer.amp):
            losses = self._objective(routed, self._images, self._targets)
        losses.total.backward()
        if (norm := self._config.trainer.clip_norm) is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), norm)
        self._optimizer.step()


class Indifferent(nn.Module):
    """A generator that computes its scores, and gives zeros: the noise alone decides."""

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator
        self.not_captured = getattr(generator, "not_captured", None)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        clean, noise = self.generator(x)
        return clean * 0, noise * 0


def random_batch(run: Run, config: FitConfig, work: Workload) -> tuple[Tensor, Tensor]:
    """Images of noise and targets of the run's task, changed as whole training batches are."""
    draw = torch.Generator().manual_seed(0)
    count = config.trainer.batch_size
    images = torch.randint(0, 256, (count, *work.shape), dtype=torch.uint8, generator=draw)
    targets = kind_of(config).random_targets(run.task, count, run.image_size, draw)
    images, targets = images.to(work.device), targets.to(work.device)
    change = batch_changes(config, run.image_size, run.task.num_outputs)
    if change is not None and work.gradients:
        images, targets = change(images, targets, 0)
    return images[: work.samples].contiguous(), targets[: work.samples].contiguous()


def shares(history: Sequence[Mapping[str, Any]], num_experts: int, training: bool) -> list[float]:
    """The rows that each expert had lately, as shares: in training, or in an evaluation; the same
    for all where the log says nothing."""
    for line in reversed([line for line in history if isinstance(line, dict)]):
        routes = line.get("routes")
        found = line.get("load") if training or not routes else routes.get("share")
        if isinstance(found, list) and len(found) == num_experts and sum(found) > 0:
            return [share / sum(found) for share in found]
    return [1 / num_experts] * num_experts


def draw_noise(share: Sequence[float], work: Workload) -> list[Tensor]:
    """Noise [N, M] of several batches, whose K largest are experts drawn by their shares without
    putting back (Gumbel's trick)."""
    draw = torch.Generator().manual_seed(0)
    logs = torch.tensor(share).clamp_min(SMALLEST_SHARE).log()
    uniform = torch.rand(ROUTES, work.samples, len(share), generator=draw)
    gumbel = -(-uniform.clamp(1e-6, 1 - 1e-6).log()).log()
    return list((logs + gumbel).to(work.device))


def measure(
    bench: Bench, names: Sequence[str], seconds: float, notes: list[str]
) -> dict[str, Spread]:
    """The spread of each executor's steps, in rounds that run all of them: a machine drifts, and
    so all drift alike. notes: is told of those that could not run."""
    memory: dict[str, int | None] = {}
    for name in names:  # graphs last: what they hold is no other's
        with _memory_of(bench, name, notes):
            memory[name] = _warm_up(bench, name, WARM_UP_FRACTION * seconds / len(names))
        if name not in memory:
            bench.drop(name)
        elif (obstacle := bench.obstacle(name)) is not None:
            notes.append(f"{name}: not measured in {bench.work.use}, since {obstacle}")
            del memory[name]
            bench.drop(name)
    samples: dict[str, list[float]] = {name: [] for name in memory}
    for done in _rounds((1 - WARM_UP_FRACTION) * seconds):
        if not samples:
            break
        order = list(samples)
        random.Random(done).shuffle(order)
        for name in order:
            with _memory_of(bench, name, notes):
                samples[name].append(_sample(bench, name, done))
            if len(samples[name]) == done:
                del samples[name]
                bench.drop(name)
    return {name: Spread.of(found, memory[name]) for name, found in samples.items()}


@contextlib.contextmanager
def _memory_of(bench: Bench, name: str, notes: list[str]) -> Iterator[None]:
    """Where memory runs out within, that is noted and no error. What the step has made can be freed
    after it, once the error no longer keeps it."""
    try:
        yield
    except torch.OutOfMemoryError:
        device, use = bench.work.device, bench.work.use
        notes.append(f"{name}: the memory of {device} does not suffice for {use}")


def _rounds(seconds: float) -> Iterator[int]:
    began = time.perf_counter()
    for done in range(MAX_ROUNDS):
        if done >= MIN_ROUNDS and time.perf_counter() - began > seconds:
            return
        yield done


def _warm_up(bench: Bench, name: str, seconds: float) -> int | None:
    """Steps that are not measured; returns the memory that was held in them."""
    device = bench.work.device
    on_cuda = device.type == "cuda"
    if on_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began, done = time.perf_counter(), 0
    while done < MIN_WARM_UPS or (done < ROUTES and time.perf_counter() - began < seconds):
        bench(name, done)
        done += 1
    return torch.cuda.max_memory_reserved(device) if on_cuda else None


def _sample(bench: Bench, name: str, round_: int) -> float:
    """The milliseconds of a step."""
    device = bench.work.device
    steps = STEPS_IN_A_ROW if device.type == "cuda" else 1
    _wait(device)
    began = time.perf_counter()
    for i in range(steps):
        bench(name, round_ * steps + i)
    _wait(device)
    return 1e3 * (time.perf_counter() - began) / steps


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def decide(times: Mapping[str, Spread], own: str) -> str:
    """The fastest by its median; or ``own``, which ``auto`` takes by itself, unless that is slower
    beyond the noise: where the middle halves of both overlap, it is not."""
    fastest = min(times, key=lambda name: times[name].p50)
    if own in times and times[own].p25 <= times[fastest].p75:
        return own
    return fastest
