"""Where a hub's features lie while it is on a GPU: there, all of them, or on the host.

A step reads some hundred rows, by number, of features that never change. So they are copied to the
device once, those of all experts into one tensor, where one kernel finds any of them. What does not
fit stays mapped: then the rows of a step are gathered on the host into one pinned buffer, which
goes over in one copy that nobody waits for.

Letters: M experts, D_i features of expert i, R rows, r_i rows of expert i.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..model import HubPathway
from ..routing import Routing
from ..sizes import bytes_text
from .parts import FeatureHead, Mapped

SHARE = 0.5  # of the memory that is free: heads, their optimizer and the router take some, too
START = 16  # elements: each expert's features start at a multiple
ALIGNMENT = 64  # bytes


class Placement(NamedTuple):
    """nbytes: of the features, and of pixels that the router looks at. free: bytes of the device's
    memory. fits: whether they are there."""

    device: torch.device
    nbytes: int
    free: int
    fits: bool

    def text(self) -> str:
        """For people."""
        features, free = bytes_text(self.nbytes), bytes_text(self.free)
        if self.fits:
            return f"{features} of features on {self.device}, of {free} free"
        return (
            f"{features} of features are more than {SHARE:.0%} of the {free} free on {self.device}:"
            " they stay on the host, and the rows of each step are copied"
        )


def place(model: HubPathway, device: str | torch.device, free: int | None = None) -> Placement:
    """Copies what a hub reads of its shelf to a device, if that takes at most ``SHARE`` of what
    is free there.

    model: of ``build_hub``; heads and router move by ``to``, before or after. free: bytes that are
    free there; None: as the device says.
    """
    device = torch.device(device)
    heads = [expert for expert in model.experts if isinstance(expert, FeatureHead)]
    others = [part for part in model.generator.modules() if isinstance(part, Mapped)]
    nbytes = sum(part.mapped.nbytes for part in (*heads, *others))
    if free is None:
        free = torch.cuda.mem_get_info(device)[0]
    fits = nbytes <= SHARE * free
    if fits:
        place_heads(heads, device)
        for part in others:
            part.placed = part.mapped.to(device)
    return Placement(device, nbytes, free, fits)


def place_heads(heads: Sequence[FeatureHead], device: torch.device) -> None:
    """Copies the features of heads to a device, into one tensor."""
    ends = list(itertools.accumulate(-(-h.mapped.numel() // START) * START for h in heads))
    flat = torch.empty(ends[-1], dtype=heads[0].mapped.dtype, device=device)
    for head, start in zip(heads, [0, *ends], strict=False):
        part = flat[start : start + head.mapped.numel()].view(head.mapped.shape)
        head.placed = part.copy_(head.mapped)


def placed_features(heads: Sequence[FeatureHead], device: torch.device) -> Tensor | None:
    """The one tensor, flat, that the features of these heads lie in on a device; None where they
    do not. What a newcomer brought lies by itself, and is put to the others."""
    found = [head.placed for head in heads]
    if any(each is None or each.device != device for each in found):
        return None
    if len({each.untyped_storage().data_ptr() for each in found}) > 1:
        place_heads(heads, device)
    storage = heads[0].placed.untyped_storage()
    whole = heads[0].placed.new_empty(0)
    return whole.set_(storage, 0, (storage.nbytes() // whole.element_size(),), (1,))


def capacity(elements: int) -> int:
    """As many, or up to an eighth more: for every shape that it meets, a launch is planned anew."""
    step = max(2 ** (elements.bit_length() - 4), START)
    return -(-elements // step) * step


def pack(
    heads: Sequence[FeatureHead], table: Tensor, vec: int, numbers: Tensor, routing: Routing
) -> tuple[Tensor, Tensor]:
    """(features of the rows alone, flat; the table of them), both on the device.

    One read of the device, of the numbers of all rows with the counts, and one copy to it.

    Args:
        table: int64 [3, M] on the host, of ``kernels.head_table``, whose first row is to be made.
        vec: elements that it counts in.
        numbers: [N], of the samples.
    """
    sample = torch.div(routing.rows, routing.k, rounding_mode="floor")
    asked = torch.cat([routing.offsets.double(), numbers.index_select(0, sample).double()])
    asked = asked.cpu().long()
    offsets, own = asked[: len(heads) + 1], asked[len(heads) + 1 :]
    counts = offsets.diff().tolist()
    routing.tell_counts(counts)
    starts, *rest = itertools.accumulate(
        (count * head.mapped.shape[1] for count, head in zip(counts, heads, strict=True)), initial=0
    )
    bounds = [starts, *rest]
    dtype = heads[0].mapped.dtype
    header = -(-table.nbytes // ALIGNMENT) * ALIGNMENT
    nbytes = header + capacity(bounds[-1]) * dtype.itemsize
    buffer = torch.empty(nbytes, dtype=torch.uint8, pin_memory=numbers.is_cuda)
    told = buffer[: table.nbytes].view(torch.int64).view(table.shape)
    told.copy_(table)[0] = torch.tensor(bounds[:-1]) // vec
    values = buffer[header:].view(dtype)
    groups = zip(heads, own.split(counts), itertools.pairwise(bounds), strict=True)
    for head, rows, (start, stop) in groups:
        if len(rows):
            part = values[start:stop].view(len(rows), -1)
            torch.index_select(head.mapped, 0, rows, out=part)
    moved = buffer.to(numbers.device, non_blocking=True)
    return moved[header:].view(dtype), moved[: table.nbytes].view(torch.int64).view(table.shape)
