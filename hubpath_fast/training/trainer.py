"""The training loop: one for a Hub-Pathway, a single network, or a distilled student."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
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
from ..devices import autocast, check_device, samples_of, to_device
from ..executors import Executor
from ..parallel.failure import RankFailure
from ..parallel.ranks import Ranks
from ..parallel.reduce import Gradients
from ..worker_failure import WorkerFailure, worker_failures
from .agreement import Agreement, check_ranks
from .checkpoint import expert_labels, model_entries, save_checkpoint
from .collapse import CollapseWatch, RoutingCollapseWarning
from .config import TrainerConfig
from .feed import Feed
from .guard import FiniteGuard
from .interrupt import Interrupt
from .log import NoLog, Reporting, RunLog
from .noise import step_noise
from .objective import Objective
from .optimizer import ParameterGroup, build_optimizer, default_groups, group_names
from .optimizer_files import count_updates
from .random_state import random_state, seed_all, seed_rank, set_random_state
from .resume import check_same_run, check_same_settings, load_run, refuse_other_run
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
        ranks: that train together, of ``parallel.start``: each calls the same with a model that
            ``distribute`` has given its experts, its share of the stream (``ranks.share`` with
            ``accumulate`` parts) and of the validation. The result is that of one process.

    Raises:
        ValueError: arguments that do not fit, a folder that holds another run, or (CheckpointError)
            a checkpoint that is damaged or of another model or configuration.
        RankFailure: another rank has ended, or did not come in time.
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
        ranks: Ranks = Ranks(),
    ) -> None:
        check_ranks(ranks, config, model)
        self.ranks = ranks
        self.device = check_device(config.device)
        self.model, self.objective, self.config = model.to(self.device), objective, config
        self.out_dir, self.reporting = Path(out_dir), reporting or Reporting()
        self.task = task
        if isinstance(executor := getattr(model, "executor", None), Executor):
            executor.settle(model.experts)
        self.optimizer = build_optimizer(model, groups or default_groups(model, config), config)
        count_updates(model, self.optimizer)
        self.state, self.window = RunState(), StepWindow(ranks)
        self.watch = CollapseWatch(config.collapse_entropy, self.reporting.names_of(model))
        self._interrupt, self._stop = Interrupt(), False
        self._agreement = Agreement(ranks, self._asked)
        self._feed = Feed(stream, config, self._asked, ranks)
        self._selection = Selection(task, validation, config, self._agreement)
        self._guard = FiniteGuard(self.model, self.optimizer, self.out_dir, self.watch.name, ranks)
        self._gradients = Gradients(self.model, ranks)
        self._keep = self._save if keep_best else lambda name: None
        self._settings = {"trainer": config.to_dict(), "run": dict(run or {})}
        self._start: tuple[Any, Sequence[float]] = (None, ())  # generators' states, and interval
        self._labels = expert_labels(model, self.reporting.names_of(model))
        self._written = Written()  # the checkpoints' files: what has not changed is linked to them
        self._saved: tuple[int, int] | None = None  # step and reported of the checkpoint in last/
        check_same_settings(ranks, self.out_dir, config, self._settings["run"])
        if resume:
            self._resume()
        else:
            with ranks.agreed("opening the folder of the run"):
                refuse_other_run(self.out_dir, self.reporting.resume_hint)

    def fit(self) -> TrainResult:
        """Train until the steps are done, the metric gets no better, or a signal asks to stop.

        Raises:
            NonFiniteLoss: a loss or a parameter is not finite; checkpoints stay as they were.
            OSError: a checkpoint cannot be written.
            WorkerFailure: a process that decodes images was killed; checkpoints are whole.
            RankFailure: another rank has ended, or did not come in time; likewise.
            ValueError: the stream ends early, or the evaluation lacks the metric.
        """
        config, state, self._stop = self.config, self.state, False
        self._agreement.forget()
        with self.ranks.last_words():
            with self.ranks.agreed("opening the log"):
                log = NoLog()
                if self.ranks.is_first:
                    log = RunLog(self.out_dir, self.reporting, config.steps, state)
            self._log = log
            try:
                with self._interrupt, self.reading(), closing(self._feed), self._updating():
                    interrupted = self._loop()
            finally:
                log.close()
            if interrupted:
                log.message(
                    f"Stopped by {self._agreement.reason} after step {state.step} of "
                    f"{config.steps}; saved in {self.out_dir / 'last'}. "
                    f"Go on with {self.reporting.resume_hint}."
                )
            result = state.result(interrupted, list(log.records))
            return self.ranks.gather(result, patient=True)[0]

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
        """Whether the run is being stopped, as all ranks have agreed."""
        return self._agreement.stopping

    def _asked(self) -> str | None:
        """What asks this process to stop."""
        return self._interrupt.requested or ("stop()" if self._stop else None)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads batches of the run: a WorkerFailure or a RankFailure says what is left
        of it."""
        try:
            with worker_failures():
                yield
        except (WorkerFailure, RankFailure) as error:
            last = find_checkpoint(self.out_dir / "last")
            kept = f"The checkpoint {last} is whole; go on with {self.reporting.resume_hint}"
            if isinstance(error, RankFailure):
                kept += ", on any number of ranks"
            kept = "No checkpoint was written yet" if last is None else kept
            if kept in str(error):  # another rank's last words say so
                raise
            told = type(error)(f"{error}. {kept}")
            told.agreed = getattr(error, "agreed", False)
            raise told from None

    def _updating(self) -> AbstractContextManager:
        """Within, an executor that the model was given may update the experts: see ``Executor``."""
        executor, config = getattr(self.model, "executor", None), self.config
        if not isinstance(executor, Executor) or config.clip_norm or config.cycle_momentum:
            return nullcontext()
        return executor.updating(self.model.experts, self.optimizer)

    def load_best(self) -> None:
        """Load the weights of the best evaluation (of the last step, if there was none)."""
        best = self.out_dir / "best"
        with self.ranks.agreed("loading the best weights"):
            load_weights(self.model, best if find_checkpoint(best) else self.out_dir / "last")

    def _loop(self) -> bool:
        """Run to the end; True if interrupted. Reports come first in a round, so that one that an
        interruption left out is made up for when the run resumes."""
        config, state = self.config, self.state
        if not self.model.training:  # else leave parts that the caller froze in eval() as they are
            self.model.train()
        generators, interval = self._start
        if generators is not None:
            set_random_state(generators, self.device)
        elif self.ranks.is_first:
            seed_all(config.seed)
        else:  # what a rank draws for its samples and experts alone is its own
            seed_rank(config.seed, self.ranks.rank, state.step)
        self._timing = Interval(*interval)
        while True:
            if not self.stopping:
                self._report()
            done = self.finished
            due = config.save_every and state.step and state.step % config.save_every == 0
            if self._saved != (state.step, state.reported) and (done or self.stopping or due):
                self._save("last")
            if done or self.stopping:
                # Also where the signal came while the last step was saved.
                return self._agreement.meet("ending the run")
            batch = self._next()
            if batch is not None:
                self._step(*batch)
                self._log.advance(state.step)

    def _next(self) -> tuple[Any, Any] | None:
        """The batch of the next step; None if the run is being stopped. Ranks leave a step out
        together, so that one which has no batch leaves none waiting."""
        doing, first = f"reading the batch of step {self.state.step}", not self._feed.begun
        try:
            with self._timing.waiting(), worker_failures():
                batch = self._feed.next(self.state.step)
        except Exception as error:
            self._agreement.meet(doing, error, first)
        stopping = self._agreement.meet(doing, patient=first)
        return batch if self.ranks.single or not stopping else None

    def _step(self, images: Any, targets: Any) -> None:
        """One update from one batch, in ``accumulate`` micro-batches weighted by their samples."""
        config, state, ranks = self.config, self.state, self.ranks
        size = len(images) if ranks.single else config.batch_size  # of the batch of all ranks
        images, targets = to_device((images, targets), self.device)
        rows, bad = [0] * len(getattr(self.model, "experts", ())), False
        apply_schedule(self.optimizer, config, state.step)
        self.optimizer.zero_grad(set_to_none=True)  # an expert without rows keeps no gradient
        parts = ranks.share(config.accumulate)
        for whole, own in zip(parts.slices(size), parts.bounds(size), strict=True):
            x, y = (samples_of(item, *own) for item in (images, targets))
            share = len(x) / size
            noise = step_noise(self.model, config.seed, state.step, whole.start)
            with autocast(self.device, config.amp), noise:
                losses = self.objective(self.model, x, y)
            self.window.add(state.step + 1, share, losses)
            # Free on the CPU; a GPU would have to wait, so its losses are checked by _report.
            if self.device.type == "cpu" and not math.isfinite(losses.total.item()):
                if ranks.single:
                    self._guard.check_losses(self.window)
                bad = True
            if not ranks.single and losses.routing is not None:
                rows = [a + b for a, b in zip(rows, losses.routing.counts(), strict=True)]
            # One part needs no factor, so that accumulate=1 is exactly the plain step. The mean of
            # the ranks' gradients is to be that of a mean over all samples.
            factor = share * ranks.world
            (losses.total * factor if config.accumulate > 1 else losses.total).backward()
        if not ranks.single and self._gradients.average(rows, bad):
            self._guard.check_losses(self.window)
        if config.clip_norm is not None:
            params = [p for group in self.optimizer.param_groups for p in group["params"]]
            clip = nn.utils.clip_grad_norm_ if ranks.single else self._gradients.clip
            self.window.add_norm(clip(params, config.clip_norm))
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
        for text in warned if self.ranks.is_first else ():
            warnings.warn(text, RoutingCollapseWarning, stacklevel=5)

    def _save(self, name: str) -> None:
        """Write ``last/``, which a run resumes from, or ``best/``, the weights to use: the same
        without the optimizer's state, which makes up most of the bytes."""
        with self._timing.paused() as interval:
            self._guard.check_losses(self.window)
            self._guard.check_state(self.state.step)
            with self.ranks.agreed("writing the log"):
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
                self.ranks,
            )
        if name == "last":
            self._continue_from(state)

    def _resume(self) -> None:
        with self.ranks.agreed("opening the folder of the run"):
            for name in ("last", "best") if self.ranks.is_first else ():
                discard_unfinished(self.out_dir / name)
        with self.ranks.agreed("reading the settings of the run"):
            check_same_run(self.out_dir, self.config, self._settings["run"])
        last = self.out_dir / "last"
        if find_checkpoint(last) is None:  # ended before its first checkpoint: start over
            return
        state, self._written = load_run(last, self.model, self.optimizer, self._labels, self.ranks)
        if not self.ranks.is_first:  # the generators' states are those of the first rank
            state["random"] = None
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
