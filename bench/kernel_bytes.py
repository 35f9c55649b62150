"""Bytes that BatchNorm's kernels load and store, over the fewest that a layer can do with.

    python -m bench.kernel_bytes [--layout last] [--only 7x7] [--rows 24] [--channels 2048]

Triton's interpreter runs every program, and each load and store counts the bytes of its lanes that
are not masked out: what two programs load, or one loads twice, counts twice, as if there were no
cache. A line for each distinct BatchNorm layer of a ResNet-50 in bfloat16, all rows valid.

The fewest, of a layer's maps: forward two reads of x (statistics come first), one write of y and
one read of a residual; backward two reads of x and of d_y and one write of d_x, and with a residual
one write of its gradient, which is then read in place of d_y, and a read of what an activation's
derivative can be told from. What has a number for each channel is counted as given or taken once.

What is more than the fewest are numbers of each channel, which every program reads for itself, so
many for each of its items (rows x positions). Programs have the fewest items where maps are small,
and as many of few channels as of many: by default a layer has no more than 32 channels, and only
as many rows as make up the 1176 items that 24 rows of the last maps have. Whole layers take minutes
each (24 rows, all channels), and have hardly more than that, or less.

An interpreted program loads what a compiled one asks for. How many transactions the memory makes of
it is not seen here; ``bench.compile_report`` shows how wide they are. No GPU is needed.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

ITEMSIZE = 2  # of the maps, in bfloat16
CHANNELS, ITEMS = 32, 24 * 7 * 7  # that are enough, see above
LIMIT = 1.05


@dataclass(frozen=True)
class Layer:
    """BatchNorm over maps of side x side, and what follows it."""

    side: int
    channels: int
    activation: str | None = "relu"
    residual: bool = False

    def __str__(self) -> str:
        then = [*["sum"] * self.residual, *filter(None, [self.activation])]
        return f"{self.side}x{self.side}x{self.channels} {' '.join(then) or 'alone'}"


def resnet50() -> list[Layer]:
    """Each distinct layer once: the stem's, and of each stage the blocks' and the shortcut's."""
    layers = [Layer(112, 64)]
    for side, width in ((56, 64), (28, 128), (14, 256), (7, 512)):
        if width > 64:  # the first block's, before its stride
            layers.append(Layer(2 * side, width))
        layers.append(Layer(side, width))
        layers.append(Layer(side, 4 * width, residual=True))
        layers.append(Layer(side, 4 * width, activation=None))
    return layers


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Bytes loaded ("loads") and stored ("stores") by the kernels interpreted meanwhile."""
    from triton.runtime.interpreter import InterpreterBuilder, _get_np_dtype

    found: Counter[str] = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(pointers, mask) -> int:
        return int(mask.data.sum()) * _get_np_dtype(pointers.get_element_ty()).itemsize

    def loading(builder, pointers, mask, *rest):
        found["loads"] += size(pointers, mask)
        return load(builder, pointers, mask, *rest)

    def storing(builder, pointers, value, mask, *rest):
        found["stores"] += size(pointers, mask)
        return store(builder, pointers, value, mask, *rest)

    InterpreterBuilder.create_masked_load = loading
    InterpreterBuilder.create_masked_store = storing
    try:
        yield found
    finally:
        InterpreterBuilder.create_masked_load = load
        InterpreterBuilder.create_masked_store = store


def moved(layer: Layer, rows: int, channels_last: bool) -> tuple[int, int]:
    """Bytes that one call moves, forward and backward."""
    from hubpath_fast.kernels import masked_batch_norm

    def maps() -> torch.Tensor:
        x = torch.ones(rows, layer.channels, layer.side, layer.side, dtype=torch.bfloat16)
        return x.contiguous(memory_format=torch.channels_last) if channels_last else x

    x, weight, bias = (t.requires_grad_() for t in (maps(), *torch.ones(2, layer.channels)))
    residual = maps().requires_grad_() if layer.residual else None
    mean, var, batches = *torch.ones(2, layer.channels), torch.tensor(0)
    count = torch.tensor(rows, dtype=torch.int32)
    totals = []
    with counted() as found:
        y = masked_batch_norm(
            x, count, weight, bias, mean, var, batches, 0.1, 1e-5, layer.activation, residual
        )
        totals.append(found.total())
        leaves = [x, weight, bias, *([residual] if layer.residual else [])]
        torch.autograd.grad(y, leaves, maps())
        totals.append(found.total() - totals[0])
    return totals[0], totals[1]


def fewest(layer: Layer, rows: int) -> tuple[int, int]:
    """Bytes that one call has to move, forward and backward; see the module's docstring."""
    maps, vector = ITEMSIZE * rows * layer.channels * layer.side**2, 4 * layer.channels
    gated = layer.residual and layer.activation is not None
    # Weight and bias are read, the running statistics read and written.
    forward = (3 + layer.residual) * maps + 6 * vector
    # The weight and both statistics are read, two gradients written.
    backward = (5 + layer.residual + gated) * maps + 5 * vector
    return forward, backward


def enough_rows(layer: Layer) -> int:
    return max(2, -(-ITEMS // layer.side**2))


def first_of(layer: Layer, channels: int = CHANNELS) -> Layer:
    """The layer with the first of its channels alone."""
    return replace(layer, channels=min(layer.channels, channels))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.kernel_bytes", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, help="of a group, all valid")
    parser.add_argument("--channels", type=int, default=CHANNELS, help="of a layer, at most")
    parser.add_argument("--only", action="append", help="layers whose name has this text")
    parser.add_argument("--layout", choices=("last", "contiguous"), default="last")
    args = parser.parse_args(argv)
    os.environ["TRITON_INTERPRET"] = "1"  # read when kernels are defined, at their import
    chosen = [x for x in resnet50() if not args.only or any(text in str(x) for text in args.only)]
    print(f"{'bytes over the fewest':28} forward backward")
    worst = 0.0
    for layer in chosen:
        rows, part = args.rows or enough_rows(layer), first_of(layer, args.channels)
        found, least = moved(part, rows, args.layout == "last"), fewest(part, rows)
        over = [one / other for one, other in zip(found, least, strict=True)]
        worst = max(worst, *over)
        print(f"{layer!s:28} {over[0]:7.3f} {over[1]:8.3f}", flush=True)
    print(f"at most {worst:.3f}, and {LIMIT} is allowed")
    return int(worst > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
