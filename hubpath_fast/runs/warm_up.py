"""``warm_up="heads:E"``: heads and router first, by E passes on features of the bodies, then all.

Linear probing before fine-tuning: a new head's first, large gradients would pull the bodies away
from what they know. The first phase is a training of its own, in ``OUT/warm-up``: the run's
optimizer, schedule, rates, batch size, losses and seed, over its own steps. It is resumed as any
training is; the features, which it does not save, are then computed again. See ``model.features``.
"""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from ..data.cache import free_memory
from ..data.order import SampleOrder
from ..model import HubPathway, always_on
from ..model.features import OnFeatures
from ..parallel.ranks import Ranks
from ..training import Interrupt, Trainer, TrainerConfig, find_checkpoint, load_state
from ..training.agreement import Agreement, Stopped
from ..training.config import with_steps
from ..training.objective import Objective
from ..training.progress import ProgressLine

FOLDER = "warm-up"
MEMORY_FRACTION = 0.5  # of the free memory that features may take


def read_warm_up(text: str) -> str:
    """ "heads:E" in the form that is kept; ValueError for anything else."""
    found = re.fullmatch(r"heads:0*([1-9][0-9]{0,8})", text.strip().lower())
    if found is None:
        raise ValueError(
            "warm_up: expected heads:E, E passes over the training images, a whole number of at "
            f"least 1, such as heads:5, got {text!r}"
        )
    return f"heads:{found[1]}"


def warm_up_steps(warm_up: str, images: int, trainer: TrainerConfig) -> int:
    """The updates of the first phase: E * ceil(n / batch).

    Raises ValueError unless they are fewer than the run's own.
    """
    passes, size = int(warm_up.rpartition(":")[2]), trainer.batch_size
    steps = passes * -(-images // size)
    if steps >= trainer.steps:
        raise ValueError(
            f"warm_up: expected fewer steps than the {trainer.steps} of the run, got {steps} "
            f"({warm_up} over {images} images in batches of {size}); take fewer passes or more "
            "steps"
        )
    return steps


def warm_up_trainer(trainer: TrainerConfig, steps: int) -> TrainerConfig:
    """The run's settings over ``steps`` updates, nothing being evaluated meanwhile."""
    return with_steps(trainer, steps).replace(
        eval_every=0,
        patience=None,
        metric=None,
        metric_mode=None,
    )


@dataclass(frozen=True)
class WarmUp:
    """What came of the first phase.

    interrupted: a signal stopped it. forwards: of experts, without backward, see
    ``forwards_per_image``; 0: there was none. seconds: of these and of its steps, over all
    sessions.
    """

    interrupted: bool = False
    forwards: int = 0
    seconds: float = 0.0

    def costs(self) -> dict[str, float]:
        """What a run's result says of it."""
        if not self.forwards:
            return {}
        return {"warm_up_forwards": self.forwards, "warm_up_seconds": self.seconds}


def forwards_per_image(model: nn.Module) -> int:
    """Expert forwards by which features are computed: of each expert one, and one more where the
    router looks at an expert."""
    if not isinstance(model, HubPathway):
        return 1
    return len(model.experts) + (always_on(model.generator) is not None)


def warm_up_heads(
    trainer: Trainer,
    objective: Objective,
    batches: Any,
    warm_up: str,
    resume: bool,
    run: dict[str, Any] | None = None,
    names: Sequence[str] | None = None,
    tell: Callable[[str], None] = lambda _: None,
    free: int | None = None,
) -> WarmUp:
    """Trains heads and router of a run's model in place, unless that is done.

    Args:
        trainer: of the run. Where it goes on from a checkpoint, nothing is left to do.
        objective: of the first phase.
        batches: the training images in their own order, as evaluation sees them; ``EvalBatches``.
        warm_up: "heads:E".
        resume, run: as of ``Trainer``.
        names: of the experts.
        tell: is given a line on what is done.
        free: bytes of free memory; None: as the machine says.

    Raises:
        ValueError: as many steps as the run's or more, an expert whose head cannot be trained by
            itself, features that do not fit into memory, another run in the folder.
        NonFiniteLoss, WorkerFailure, OSError: as ``Trainer.fit``.
    """
    folder, images = trainer.out_dir / FOLDER, batches.num_samples
    steps = warm_up_steps(warm_up, images, trainer.config)
    forwards = images * forwards_per_image(trainer.model)
    if trainer.begun:
        return WarmUp(False, forwards, _seconds(folder))
    phase = OnFeatures(trainer.model, names)
    stream = NumberStream(images, trainer.config.batch_size, trainer.config.seed)
    first = Trainer(
        phase.trained,
        objective,
        stream,
        warm_up_trainer(trainer.config, steps),
        folder,
        task=trainer.task,
        run=run,
        resume=resume,
        keep_best=False,
        reporting=dataclasses.replace(trainer.reporting, label="heads"),
    )
    if first.finished:
        return WarmUp(False, forwards, first.state.seconds)

    def room(needed: int) -> None:
        _check_memory(needed, free_memory() if free is None else free)
        tell(
            f"first{', with the router' if phase.routed else ''}, on features of the frozen "
            f"bodies: {warm_up}, {steps:,} steps over {images:,} images; features take "
            f"{forwards:,} expert forwards and {needed / 1e6:,.1f} MB of memory"
        )

    began = time.perf_counter()
    stream.targets = _keep(phase, trainer, batches, room)
    first.state.seconds += time.perf_counter() - began
    interrupted = stream.targets is None or first.fit().interrupted
    return WarmUp(interrupted, forwards, first.state.seconds)


class NumberStream:
    """Endless batches of a training on features: numbers of images, float64 [B], and targets.

    The order is ``TrainStream``'s: a function of (seed, step) alone. Float64 holds every number to
    2^53, and a Hub-Pathway's rows are floats. targets: [n, ...], of all images.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        self.order = SampleOrder(num_samples, batch_size, seed)
        self.targets: Tensor | None = None

    def batches(self, start_step: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for step in count(start_step):
            numbers = self.order.indices(step)
            yield numbers.double(), self.targets[numbers]


def _keep(
    phase: OnFeatures, trainer: Trainer, batches: Any, room: Callable[[int], None]
) -> Tensor | None:
    """All targets, once the features are kept; None if a signal came meanwhile."""
    device, reporting, interrupt = trainer.device, trainer.reporting, Interrupt()
    console = reporting.console if reporting.progress else Console(quiet=True)
    line = ProgressLine(max(1, len(batches)), 0, console, "features")

    def shown() -> Iterator:
        for i, batch in enumerate(
            Agreement(Ranks(), lambda: interrupt.requested).until_stopped(batches)
        ):
            yield batch
            line.advance(i + 1)

    with closing(line), interrupt, trainer.reading():
        try:
            return phase.keep(shown(), batches.num_samples, device, trainer.config.amp, room)
        except Stopped:
            line.message(
                f"Stopped by {interrupt.requested} while features were computed. Go on with "
                f"{reporting.resume_hint}."
            )
            return None


def _check_memory(needed: int, free: int | None) -> None:
    if free is not None and needed > MEMORY_FRACTION * free:
        raise ValueError(
            f"warm_up: the features of the training images need {needed / 2**30:.2f} GiB of "
            f"memory, more than half of the {free / 2**30:.2f} GiB that are free; train without "
            "the warm-up, or with fewer experts or images"
        )


def _seconds(folder: Path) -> float:
    """Of a first phase that is done; 0 where its folder is gone."""
    if find_checkpoint(folder / "last") is None:
        return 0.0
    return float(load_state(folder / "last")["run"]["seconds"])
