"""The training loop: one for a Hub-Pathway, a single network, or a distilled student."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoints import (
    CheckpointError,
    Written,
    discard_unfinished,
    find_checkpoint,
    load_weights,
)
from ..devices import autocast, check_device, micro_batch, to_device
from ..worker_failure import WorkerFailure, worker_failures
from .checkpoint import expert_labels, model_entries, save_checkpoint
from .collapse import CollapseWatch, RoutingCollapseWarning
from .config import TrainerConfig
from .feed import Feed
from .guard import FiniteGuard
from .interrupt import Interrupt
from .log import Reporting, RunLog
from .objective import Objective
from .optimizer import ParameterGroup, build_optimizer, default_groups, group_names
from .optimizer_files import count_updates
from .random_state import random_state, seed_all, set_random_state
from .resume import check_same_run, load_run, refuse_other_run
from .run_state import Interval, RunState, TrainResult
from .schedule import apply_schedule
from .selection import Selection
from .step_window import StepWindow
from .task import Task


class Trainer:
    """Trains a model and keeps its records: ``last/``, given validation ``best/`` (see
    checkpoint.py), and ``log.jsonl``. On the CPU resuming changes nothing, to the bit.

    Args:
        model: what is trained, on ``config.device``.
        objective: ``(model, images, targets) -> Losses``.
        stream: has ``batches(start_step)``, which yields (images, targets) from that step on, the
            batch of a step depending on nothing but the step (and a seed): then a resumed run sees
            what an uninterrupted one would.
        task: what is learned; it evaluates, and its metric chooses the best step.
        validation: batches to evaluate on, iterable again and again, or a callable that returns
            them; None: no evaluation.
        groups: parameter groups; None: :func:`default_groups`.
        run: what else defines the run (data, hub): kept in config.json, compared when resuming.
        resume: go on from ``out_dir/last`` if it exists. Without it a folder with a run is refused.
        keep_best: write ``best/``; False: evaluations only say how it goes.
        reporting: what is shown and logged; None: the defaults.

    Raises:
        ValueError: arguments that do not fit, a folder that holds another run, or (CheckpointError)
            a checkpoint that is damaged or of another model or configuration.
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
        keep_best: bool = True,
        reporting: Reporting | None = None,
    ) -> None:
        self.device = check_device(config.device)
        self.model, self.objective, self.config = model.to(self.device), objective, config
        self.out_dir, self.reporting = Path(out_dir), reporting or Reporting()
        self.task = task
        self.optimizer = build_optimizer(model, groups or default_groups(model, config), config)
        count_updates(model, self.optimizer)
        self.state, self.window = RunState(), StepWindow()
        self.watch = CollapseWatch(config.collapse_entropy, self.reporting.names_of(model))
        self._interrupt, self._stop = Interrupt(), False
        self._feed = Feed(stream, config, lambda: self.stopping)
        self._selection = Selection(task, validation, config, lambda: self.stopping)
        self._guard = FiniteGuard(self.model, self.optimizer, self.out_dir, self.watch.name)
        self._keep = self._save if keep_best else lambda name: None
        self._settings = {"trainer": config.to_dict(), "run": dict(run or {})}
        self._start: tuple[Any, Sequence[float]] = (None, ())  # generators' states, and interval
        self._labels = expert_labels(model, self.reporting.names_of(model))
        self._written = Written()  # the checkpoints' files: what has not changed is linked to them
        self._saved: tuple[int, int] | None = None  # step and reported of the checkpoint in last/
        if resume:
            self._resume()
        else:
            refuse_other_run(self.out_dir, self.reporting.resume_hint)

    def fit(self) -> TrainResult:
        """Train until the steps are done, the metric gets no better, or a signal asks to stop.

        Raises:
            NonFiniteLoss: a loss or a parameter is not finite; checkpoints stay as they were.
            OSError: a checkpoint cannot be written.
            WorkerFailure: a process that decodes images was killed; checkpoints are whole.
            ValueError: the stream ends early, or the evaluation lacks the metric.
        """
        config, state, self._stop = self.config, self.state, False
        self._log = RunLog(self.out_dir, self.reporting, config.steps, state)
        try:
            with self._interrupt, self.reading(), closing(self._feed):
                interrupted = self._loop()
        finally:
            self._log.close()
        if interrupted:
            by, last = self._interrupt.requested or "stop()", self.out_dir / "last"
            self._log.message(
                f"Stopped by {by} after step {state.step} of {config.steps}; saved in {last}. "
                f"Go on with {self.reporting.resume_hint}."
            )
        return state.result(interrupted, self._log.records)

    def stop(self) -> None:
        """Ask a running :meth:`fit` to finish its step, save and return, as SIGTERM does."""
        self._stop = True

    @property
    def begun(self) -> bool:
        """Whether ``last/`` holds a checkpoint of this run."""
        return self._saved is not None

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do."""
        state = self.state
        return state.stopped_early or state.reported == state.step >= self.config.steps

    @property
    def stopping(self) -> bool:
        return self._stop or self._interrupt.requested is not None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads batches of the run: a WorkerFailure says what is left of the run."""
        try:
            with worker_failures():
                yield
        except WorkerFailure as error:
            last = find_checkpoint(self.out_dir / "last")
            kept = f"The checkpoint {last} is whole; go on with {self.reporting.resume_hint}"
            kept = "No checkpoint was written yet" if last is None else kept
            raise WorkerFailure(f"{error}. {kept}") from None

    def load_best(self) -> None:
        """Load the weights of the best evaluation (of the last step, if there was none)."""
        best = self.out_dir / "best"
        load_weights(self.model, best if find_checkpoint(best) else self.out_dir / "last")

    def _loop(self) -> bool:
        """Run to the end; True if interrupted. Reports come first in a round, so that one that an
        interruption left out is made up for when the run resumes."""
        config, state = self.config, self.state
        if not self.model.training:  # else leave parts that the caller froze in eval() as they are
            self.model.train()
        generators, interval = self._start
        if generators is None:
            seed_all(config.seed)
        else:
            set_random_state(generators, self.device)
        self._timing = Interval(*interval)
        while True:
            if not self.stopping:
                self._report()
            done = self.finished
            due = config.save_every and state.step and state.step % config.save_every == 0
            if self._saved != (state.step, state.reported) and (done or self.stopping or due):
                self._save("last")
            if done or self.stopping:
                return self.stopping  # also where the signal came while the last step was saved
            with self._timing.waiting():
                batch = self._feed.next(state.step)
            if batch is not None:
                self._step(*batch)
                self._log.advance(state.step)

    def _step(self, images: Any, targets: Any) -> None:
        """One update from one batch, in ``accumulate`` micro-batches weighted by their samples."""
        config, state, size = self.config, self.state, len(images)
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
        self._timing.images += size

    def _report(self) -> None:
        """Log and evaluate what is due after the last update, unless that is done already."""
        config, state, step = self.config, self.state, self.state.step
        if step == state.reported:
            return
        evaluating = self._selection.due(step)
        if evaluating or step >= config.steps or step % config.log_every == 0:
            self._guard.check_losses(self.window)
            timing, self._timing = self._timing.close(state), Interval()
            found = self._selection.evaluate(self.model, state, self._keep) if evaluating else {}
            if found is not None:
                self._write(found, timing)
            self._timing = Interval()
            if found is None:  # cut short by a signal: done when the run resumes
                return
        state.reported = step

    def _write(self, found: Mapping[str, Any], timing: Mapping[str, float]) -> None:
        """A line of the log, and warnings if the routing has collapsed."""
        summary = self.window.summary()
        warned = self.watch.update(summary)
        if "routes" in found:
            ends = self.state.step >= self.config.steps or self.state.stopped_early
            warned += self.watch.update_routes(found["routes"], ends)
        summary.pop("rows", None)
        record = {
            "step": self.state.step,
            **summary,
            "lr": {group["name"]: group["lr"] for group in self.optimizer.param_groups},
            **({"warnings": warned} if warned else {}),
            **found,
            "time": timing,
        }
        self._log.write(record, self.window.names or ())
        for text in warned:
            warnings.warn(text, RoutingCollapseWarning, stacklevel=5)

    def _save(self, name: str) -> None:
        """Write ``last/``, which a run resumes from, or ``best/``, the weights to use: the same
        without the optimizer's state, which makes up most of the bytes."""
        with self._timing.paused() as interval:
            self._guard.check_losses(self.window)
            self._guard.check_state(self.state.step)
            self._log.sync()
            state: dict[str, Any] = {"run": asdict(self.state)}
            if name == "last":
                state |= {
                    "groups": group_names(self.model, self.optimizer),
                    "random": random_state(self.device),
                    "window": self.window.state_dict(),
                    "watch": self.watch.state_dict(),
                    "interval": interval,
                }
            self._written |= save_checkpoint(
                self.out_dir / name,
                self.model,
                state,
                {**model_entries(self.model), **self._settings},
                self._labels,
                self.optimizer if name == "last" else None,
                self._written,
            )
        if name == "last":
            self._continue_from(state)

    def _resume(self) -> None:
        for name in ("last", "best"):
            discard_unfinished(self.out_dir / name)
        check_same_run(self.out_dir, self.config, self._settings["run"])
        last = self.out_dir / "last"
        if find_checkpoint(last) is None:  # ended before its first checkpoint: start over
            return
        state, self._written = load_run(last, self.model, self.optimizer, self._labels)
        try:
            self.state = RunState(**state["run"])
            self.window.load_state_dict(state["window"], self.device)
            self.watch.load_state_dict(state["watch"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{last} cannot be resumed from ({error!r})") from error
        self._continue_from(state)

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        self._start = state["random"], state["interval"]
        self._saved = (self.state.step, self.state.reported)
