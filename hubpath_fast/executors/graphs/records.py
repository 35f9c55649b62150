"""What the executor of captured graphs knows of each expert, and of the step that it is in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ..rows import Batch
from .capture import CapturedModule, Pool
from .signature import Signature

MIN_SEEN = 3  # a capture costs several eager runs; rare sizes never earn it back
GENERATOR = -1  # for an expert's index


class Use(NamedTuple):
    """One expert, or the generator, with gradients or without, in training mode or not."""

    index: int
    gradients: bool
    training: bool


@dataclass
class Record:
    """What is known of an expert in one use, as long as its signature holds."""

    signature: Signature
    may_pad: bool
    needed: int = MIN_SEEN  # times that a size must be seen
    seen: Counter[int] = field(default_factory=Counter)  # by size
    graphs: dict[int, CapturedModule] = field(default_factory=dict)  # by size
    stream: int | None = None  # that they were captured on
    pool: Pool | None = None
    draws: bool = False  # random numbers, as far as was seen
    draws_unseen: bool = False  # as only a capture showed: its backward draws
    failures: list[str] = field(default_factory=list)  # of captures
    eager: str | None = None  # why it is never captured

    @property
    def busy(self) -> bool:
        return self.pool is not None and self.pool.busy

    def drop(self) -> None:
        """Frees the graphs; a backward that is under way keeps its own until it is done."""
        self.graphs.clear()
        self.seen.clear()
        self.pool = None


class Step(NamedTuple):
    """One call of the executor, or the generator's. buffered: whether ``rows`` are the buffers that
    graphs read."""

    modules: Sequence[nn.Module]  # the experts, or the generator alone
    uses: list[Use | None]
    streams: list[int]  # of the modules
    source: Batch  # of rows, or as it is
    rows: Tensor
    buffered: bool
    gradients: bool
    min_group: int
