"""What the executor of captured graphs knows of each expert, and of the step that it is in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor, nn

from ..rows import Batch
from .capacities import Sizes
from .capture import CapturedModule, Pool
from .signature import Signature

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
    sizes: Sizes
    exact: str | None = None  # why no rows may be added to a group
    masks: bool = False  # whether graphs keep the rows that were added from BatchNorm's statistics
    min_rows: int = 1  # of a group that is replayed
    row_bytes: int = 0  # of a row that the expert is given
    # rows of an eager run -> bytes that autograd kept of it; of two runs at most
    kept: dict[int, int] = field(default_factory=dict)
    graphs: dict[int, CapturedModule] = field(default_factory=dict)  # by size
    stream: int | None = None  # that they were captured on
    pool: Pool | None = None
    draws: bool = False  # random numbers, as far as was seen
    draws_unseen: bool = False  # as only a capture showed: its backward draws
    failures: list[str] = field(default_factory=list)  # of captures
    eager: str | None = None  # why it is never captured

    @property
    def fuses(self) -> bool:
        """Whether BatchNorm is computed with what follows it, as not every module allows."""
        return not self.failures

    @property
    def busy(self) -> bool:
        return self.pool is not None and self.pool.busy

    @property
    def kept_bytes(self) -> float:
        """That autograd would keep of the largest size, as far as eager runs tell; 0: not seen.

        Some of it does not grow with the rows, such as weights that are standardised at each call:
        where two runs had different rows, a line through both tells it apart."""
        if not self.kept:
            return 0.0
        (few, fewer_bytes), *more = sorted(self.kept.items())
        per_row = fewer_bytes / few
        for many, more_bytes in more:
            per_row = max(0.0, (more_bytes - fewer_bytes) / (many - few))
        return fewer_bytes + per_row * (self.sizes.largest - few)

    def on(self, stream: int) -> None:
        """From now on it runs on that stream; graphs replay only where they were captured."""
        if self.graphs and self.stream != stream:
            self.drop()
        self.stream = stream

    def free(self) -> None:
        """The graphs; a backward that is under way keeps its own until it is done."""
        self.graphs.clear()
        self.pool = None

    def drop(self) -> None:
        """Frees the graphs, and has as much seen again before there are others."""
        self.free()
        self.sizes.dropped()


def name_of(index: int) -> str:
    return "the generator" if index == GENERATOR else f"experts[{index}]"


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
