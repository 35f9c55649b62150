"""The training loop: one for a Hub-Pathway, a single network, or a distilled student."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..devices import autocast, micro_batch, to_device
from ..measure import Measure
from .checkpoint import (
    CheckpointError,
    check_config,
    find_checkpoint,
    load_state,
    load_weights,
    save_checkpoint,
)
from .config import FREE_KEYS, TrainerConfig
from .evaluation import evaluate
from .guard import FiniteGuard
from .interrupt import Interrupt
from .log import JsonLog, ProgressLine, Reporting, TensorBoardLog
from .metrics import CollapseWatch, RoutingCollapseWarning, StepWindow
from .objective import Losses
from .optimizer import (
    ParameterGroup,
    build_optimizer,
    default_groups,
    group_names,
    match_layouts,
)
from .random_state import random_state, seed_all, set_random_state
from .run_state import RunState, TrainResult
from .schedule import apply_schedule
from .task import Task

Objective = Callable[[nn.Module, Any, Any], Losses]


class Trainer:
    """Trains ``model`` on ``stream`` by ``objective`` and keeps its records in ``out_dir``.

    objective: ``(model, images, targets) -> Losses``.
    stream: an object whose ``batches(start_step)`` yields (images, targets) from that step on, the
        batch of a step depending on nothing but the step (and a seed): then a resumed run sees
        what an uninterrupted one would.
    groups: parameter groups; None: :func:`default_groups`.
    validation: batches to evaluate on, iterable again and again, or a callable that returns them.
    task: what is learned; it evaluates, and its metric chooses the best step.
    run: what else defines the run (data, hub): kept in config.json, compared when resuming.
    resume: go on from ``out_dir/last`` if it exists. Without it a folder with a run is refused.
    reporting: what is shown and logged, and how.

    ``fit()`` writes ``last/`` and, given validation, ``best/`` (see checkpoint.py), and
    ``log.jsonl``. On the CPU a resumed run equals an uninterrupted one to the bit.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        stream: Any,
        config: TrainerConfig,
        out_dir: str | Path,
        *,
        task: Task,
        validation: Iterable | Callable[[], Iterable] | None = None,
        groups: Sequence[ParameterGroup] | None = None,
        run: Mapping[str, Any] | None = None,
        resume: bool = False,
        reporting: Reporting | None = None,
    ) -> None:
        self.device = torch.device(config.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={config.device!r}: torch sees no CUDA device; use cpu")
        if config.patience is not None and validation is None:
            raise ValueError(
                f"patience={config.patience} stops on the validation metric, but validation is "
                "None; give validation batches or patience=None"
            )
        self.model, self.objective, self.stream = model.to(self.device), objective, stream
        self.config, self.out_dir, self.validation = config, Path(out_dir), validation
        self.task, self.metric = task, chosen_metric(task, config)
        self.optimizer = build_optimizer(model, groups or default_groups(model, config), config)
        self.reporting = reporting = reporting or Reporting()
        names = reporting.expert_names
        self.expert_names = list(names) if names else None
        num_experts = len(getattr(model, "experts", self.expert_names or ()))
        if self.expert_names and len(self.expert_names) != num_experts:
            raise ValueError(
                f"expert_names has {len(self.expert_names)} names for {num_experts} experts; "
                "give one for each"
            )
        self.console = reporting.console if reporting.progress else Console(quiet=True)
        self.state, self.window = RunState(), StepWindow()
        self.watch = CollapseWatch(config.collapse_entropy, self.expert_names)
        self._settings = {"trainer": config.to_dict(), "run": dict(run or {})}
        self._random: dict[str, Any] | None = None  # the generators' states to start from
        self._interval = (0, 0.0, 0.0)  # images, waiting, seconds since the last line of the log
        self._saved: tuple[int, int] | None = None  # step and reported of the checkpoint in last/
        self._interrupt = Interrupt()
        self._stop = False
        self._guard = FiniteGuard(self.model, self.optimizer, self.out_dir, self.watch.name)
        self._open_folder(resume)

    # The run

    def fit(self) -> TrainResult:
        """Train until the steps are done, the metric stops rising, or a signal asks to stop.

        Raises NonFiniteLoss (checkpoints stay as they were), OSError when a checkpoint cannot be
        written, ValueError when the stream ends early.
        """
        self.out_dir.mkdir(parents=True, exist_ok=True)
        start = self.state.step
        self._log = JsonLog(self.out_dir / "log.jsonl", self.state.reported)
        self._writers = [self._log]
        if self.reporting.tensorboard:
            folder = self.out_dir / "tensorboard"
            self._writers.append(TensorBoardLog(folder, self.state.reported, self.expert_names))
        self._line = ProgressLine(self.config.steps, start, self.console, self.reporting.label)
        self._stop = False
        try:
            with self._interrupt:
                interrupted = self._loop()
        finally:
            self._line.close()
            for writer in self._writers:
                writer.close()
        if interrupted:
            by = self._interrupt.requested or "stop()"
            self._line.message(
                f"Stopped by {by} after step {self.state.step} of {self.config.steps}; saved in "
                f"{self.out_dir / 'last'}. Go on with {self.reporting.resume_hint}."
            )
        s = self.state
        return TrainResult(
            steps=s.step,
            best_metric=s.best,
            best_step=s.best_step,
            seconds=s.seconds,
            images_per_second=s.images / s.seconds if s.seconds else 0.0,
            interrupted=interrupted,
            stopped_early=s.stopped_early,
            history=self._log.records,
        )

    def stop(self) -> None:
        """Ask a running :meth:`fit` to finish its step, save and return, as SIGTERM does."""
        self._stop = True

    def load_best(self) -> None:
        """Load the weights of the best evaluation (of the last step, if there was none)."""
        best = self.out_dir / "best"
        load_weights(self.model, best if find_checkpoint(best) else self.out_dir / "last")

    @property
    def stopping(self) -> bool:
        return self._stop or self._interrupt.requested is not None

    def _loop(self) -> bool:
        """Run to the end; True if interrupted. Reports come first in a round, so that one that an
        interruption left out is made up for when the run resumes."""
        config, state = self.config, self.state
        if not self.model.training:  # else leave parts that the caller froze in eval() as they are
            self.model.train()
        if self._random is None:
            seed_all(config.seed)
        else:
            set_random_state(self._random, self.device)
        self._begin_interval(*self._interval)
        batches = None
        try:
            while True:
                if not self.stopping:
                    self._report()
                done = state.stopped_early or (
                    state.step >= config.steps and state.reported == state.step
                )
                due = config.save_every and state.step and state.step % config.save_every == 0
                if self._saved != (state.step, state.reported) and (done or self.stopping or due):
                    self._save("last")
                if done or self.stopping:
                    return not done
                if batches is None:
                    # Starting an iterator may draw random numbers; a run that resumes here must
                    # not be set off course by one more start.
                    before = random_state(self.device)
                    batches = iter(self.stream.batches(state.step))
                    batch = self._next(batches)
                    set_random_state(before, self.device)
                else:
                    batch = self._next(batches)
                if batch is not None:
                    self._step(*batch)
                    self._line.advance(state.step)
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def _next(self, batches: Iterator) -> tuple[Any, Any] | None:
        """The next batch; None if the stream broke because it is being stopped as well: a signal
        to the process group ends the processes that decode."""
        began = time.perf_counter()
        try:
            images, targets = next(batches)
        except StopIteration:
            raise ValueError(
                f"the stream ended at step {self.state.step} of {self.config.steps}; "
                "batches(start_step) must go on for as long as it is asked"
            ) from None
        except Exception:
            if self.stopping:
                return None
            raise
        self._waited += time.perf_counter() - began
        if len(images) < self.config.accumulate:
            raise ValueError(
                f"the batch of step {self.state.step} has {len(images)} samples, fewer than "
                f"accumulate={self.config.accumulate} micro-batches; lower accumulate"
            )
        return images, targets

    def _step(self, images: Any, targets: Any) -> None:
        """One update from one batch, in ``accumulate`` micro-batches weighted by their samples."""
        config, state = self.config, self.state
        size = len(images)
        images, targets = to_device((images, targets), self.device)
        apply_schedule(self.optimizer, config, state.step)
        self.optimizer.zero_grad(set_to_none=True)  # an expert without rows keeps no gradient
        for part in range(config.accumulate):
            x, y = (micro_batch(item, size, part, config.accumulate) for item in (images, targets))
            share = len(x) / size
            with autocast(self.device, config.amp):
                losses = self.objective(self.model, x, y)
            self.window.add(state.step + 1, share, losses)
            # Free on the CPU; a GPU would have to wait, so its losses are checked by _report.
            if self.device.type == "cpu" and not math.isfinite(losses.total.item()):
                self._guard.check_losses(self.window)
            # One part needs no factor, so that accumulate=1 is exactly the plain step.
            (losses.total * share if config.accumulate > 1 else losses.total).backward()
        if config.clip_norm is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            self.window.add_norm(nn.utils.clip_grad_norm_(params, config.clip_norm))
        self.optimizer.step()
        state.step += 1
        self._images += size

    # Reports

    def _report(self) -> None:
        """Log and evaluate what is due after the last update, unless that is done already."""
        config, state = self.config, self.state
        step, last = state.step, state.step >= config.steps
        if step == state.reported:
            return
        evaluating = self.validation is not None and (
            last or (config.eval_every and step % config.eval_every == 0)
        )
        if evaluating or last or step % config.log_every == 0:
            self._guard.check_losses(self.window)
            timing = self._end_interval()
            scores = self._evaluate() if evaluating else None
            if evaluating and scores is None:  # cut short by a signal: done when the run resumes
                return
            summary = self.window.summary()
            warned = self.watch.update(summary)
            summary.pop("rows", None)
            record = {
                "step": step,
                **summary,
                "lr": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
                **({"warnings": warned} if warned else {}),
                **({"validation": scores, "best": state.best} if scores is not None else {}),
                "time": timing,
            }
            for writer in self._writers:
                writer.write(record)
            self._line.report(record, self.window.names or ())
            for text in warned:
                warnings.warn(text, RoutingCollapseWarning, stacklevel=4)
            self._begin_interval()
        state.reported = step

    def _evaluate(self) -> dict[str, float] | None:
        """Evaluate, keep the best, count towards patience. None if a signal came meanwhile."""
        config, state = self.config, self.state
        before = random_state(self.device)
        batches = self.validation() if callable(self.validation) else self.validation
        try:
            scores = evaluate(
                self.model, self._until_stopped(batches), self.task, self.device, config.amp
            )
            scores = {k: v if isinstance(v, int) else float(v) for k, v in scores.items()}
        except _EvaluationStopped:
            set_random_state(before, self.device)
            return None
        if self.metric.name not in scores:
            raise ValueError(
                f"metric: expected one of {', '.join(scores)}, got {self.metric.name!r}; name a "
                "result of the evaluation, or None for the task's own metric"
            )
        metric = scores[self.metric.name]
        better = state.best is None or self.metric.is_better(metric, state.best)
        if better and math.isfinite(metric):
            state.best, state.best_step, state.stale = metric, state.step, 0
            self._save("best")
        else:
            state.stale += 1
            state.stopped_early = config.patience is not None and state.stale >= config.patience
        return scores

    def _until_stopped(self, batches: Iterable) -> Iterator:
        iterator = iter(batches)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except Exception as error:  # see _next
                if self.stopping:
                    raise _EvaluationStopped from error
                raise
            if self.stopping:
                raise _EvaluationStopped
            yield batch

    def _begin_interval(self, images: int = 0, waited: float = 0.0, seconds: float = 0.0) -> None:
        self._images, self._waited, self._began = images, waited, time.perf_counter() - seconds

    def _end_interval(self) -> dict[str, float]:
        """Rates since the last line, evaluations and checkpoints left out. seconds: since the run's
        first step, without them; data_wait: the share spent waiting for the stream."""
        seconds = time.perf_counter() - self._began
        self.state.seconds += seconds
        self.state.images += self._images
        timing = {
            "seconds": self.state.seconds,
            "images_per_second": self._images / seconds,
            "data_wait": self._waited / seconds,
        }
        self._begin_interval()
        return timing

    # Checkpoints

    def _save(self, name: str) -> None:
        """Write ``last/``, which a run resumes from, or ``best/``, the weights to use: the same
        without the optimizer's state, which makes up most of the bytes."""
        began = time.perf_counter()
        self._guard.check_losses(self.window)
        self._guard.check_state(self.state.step)
        self._log.sync()
        state: dict[str, Any] = {"run": asdict(self.state)}
        if name == "last":
            state |= {
                "optimizer": self.optimizer.state_dict(),
                "groups": group_names(self.model, self.optimizer),
                "random": random_state(self.device),
                "window": self.window.state_dict(),
                "watch": self.watch.state_dict(),
                "interval": (self._images, self._waited, began - self._began),
            }
        save_checkpoint(self.out_dir / name, self.model, state, self._settings)
        if name == "last":
            self._continue_from(state)
        self._began += time.perf_counter() - began  # saving is no part of the images per second

    def _open_folder(self, resume: bool) -> None:
        """Refuse a folder that holds another run; load the last checkpoint when resuming."""
        if self.out_dir.exists() and not self.out_dir.is_dir():
            raise ValueError(f"out_dir={str(self.out_dir)!r} is a file; give a folder")
        last, best = self.out_dir / "last", self.out_dir / "best"
        if not resume:
            log = self.out_dir / "log.jsonl"
            held = [str(p) for p in (last, best) if find_checkpoint(p)] + [str(log)] * log.exists()
            if held:
                raise ValueError(
                    f"out_dir={str(self.out_dir)!r} holds another run ({', '.join(held)}); go on "
                    f"with it by {self.reporting.resume_hint}, delete it, or choose another folder"
                )
            return
        free = frozenset(f"trainer.{key}" for key in FREE_KEYS)
        for folder in (last, best):
            if find_checkpoint(folder):
                check_config(folder, self._settings, free)
        if find_checkpoint(last) is None:  # ended before its first checkpoint: start anew
            return
        state = load_state(last)
        if state["groups"] != group_names(self.model, self.optimizer):
            raise CheckpointError(
                f"{last} is of another optimizer: its parameter groups are not the ones given now; "
                "use the same groups to resume, or another output folder"
            )
        load_weights(self.model, last)
        self.optimizer.load_state_dict(state["optimizer"])
        match_layouts(self.optimizer)
        self.state = RunState(**state["run"])
        self.window.load_state_dict(state["window"], self.device)
        self.watch.load_state_dict(state["watch"])
        self._continue_from(state)

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self._random, self._interval = state["random"], state["interval"]
        self._saved = (self.state.step, self.state.reported)


def chosen_metric(task: Task, config: TrainerConfig) -> Measure:
    """What chooses the best step: the task's metric, or another result that the settings name."""
    name, better = config.metric or task.metric.name, config.metric_mode
    if better is None and name != task.metric.name:
        raise ValueError(
            f"metric_mode: expected max or min with metric={name!r}, got None; only of the task's "
            f"own metric, {task.metric.name}, is it known which is better"
        )
    return Measure(name, better or task.metric.better)


class _EvaluationStopped(Exception):
    """A signal came during an evaluation."""
