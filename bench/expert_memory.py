"""Memory of a training step: captured graphs by their sizes, beside eager experts and dense ones.

    python -m bench.expert_memory [--n 48] [--k 2] [--m 5] [--px 224] [--model resnet50]

Counted on meta tensors, in bfloat16 and channels last: what is allocated in forward and backward of
an expert, at its worst, in blocks of 512 bytes; without parameters, their gradients and what
libraries take as workspace, and without what an allocator loses between blocks. All sizes of an
expert share the memory of its largest, so that decides. The hub's graphs are those that
``model.warm_up`` captures ahead from one batch of balanced routing, and, later, those that a mean
over many steps asks for. Eager experts have the rows of one step, N*K together; dense ones N each.
"""

from __future__ import annotations

import argparse
import contextlib
import weakref

import timm
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubpath_fast.executors.graphs.capacities import AVERAGED, CapacitySizes
from hubpath_fast.executors.graphs.masked import masked, settled

from .expert_bytes import kernels_are_taken

BLOCK = 512  # bytes that an allocator gives at least


class Allocated(TorchDispatchMode):
    """peak: the most bytes that lived at once, of memory that is made within."""

    def __init__(self):
        super().__init__()
        self.now, self.peak = 0, 0
        self._living: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {_memory(tensor)._cdata for tensor in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for memory in map(_memory, _tensors(results)):
            key, size = memory._cdata, -(-memory.nbytes() // BLOCK) * BLOCK
            if size and key not in given | self._living:
                self._living.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(memory, self._freed, key, size)
        return results

    def _freed(self, key: int, size: int) -> None:
        self._living.discard(key)
        self.now -= size


def _tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def step_memory(model: nn.Module, x: Tensor, mask: bool) -> int:
    """Bytes of forward and backward on rows x of the meta device, at their worst. mask: as captured
    graphs run BatchNorm."""
    count = torch.empty((), dtype=torch.int32, device="meta")
    model.zero_grad(set_to_none=True)
    within = masked(model, count) if mask else contextlib.nullcontext()
    for parameter in model.parameters():  # gradients stay; they are there in every way to run it
        parameter.grad = torch.empty_like(parameter)
    with kernels_are_taken(), Allocated() as allocated, within:
        settled(model(x)).sum().backward()
    return allocated.peak


def captured_sizes(n: int, k: int, m: int, steps: int) -> list[int]:
    """Of an expert with its share of the rows, after so many steps."""
    sizes, mean = CapacitySizes(), round(n * k / m)
    for _ in range(steps):
        sizes.step(mean, n)
    return sizes.ahead(mean)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench.expert_memory", description=__doc__.split("\n")[0])
    parser.add_argument("--n", type=int, default=48)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--m", type=int, default=5)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--model", default="resnet50", help="of timm")
    args = parser.parse_args(argv)
    model = timm.create_model(args.model).to("meta", torch.bfloat16).train()
    model = model.to(memory_format=torch.channels_last)

    def memory(rows: int, mask: bool) -> int:
        x = torch.empty(rows, 3, args.px, args.px, dtype=torch.bfloat16, device="meta")
        return step_memory(model, x.to(memory_format=torch.channels_last), mask)

    n, k, m = args.n, args.k, args.m
    dense = m * memory(n, False)
    print("| experts | largest | MiB | of dense |\n|---|---|---|---|")
    ways = [("dense", n, dense), ("eager", round(n * k / m), m * memory(round(n * k / m), False))]
    for label, steps in (("graphs, ahead", 1), (f"graphs, after {AVERAGED} steps", AVERAGED)):
        largest = captured_sizes(n, k, m, steps)[0]
        ways.append((label, largest, m * memory(largest, True)))
    for label, rows, total in ways:
        print(f"| {label} | {rows} | {total / 2**20:,.0f} | {total / dense:.2f} |")


if __name__ == "__main__":
    main()
