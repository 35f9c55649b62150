"""How many bytes a training step of an expert moves, with torch's layers and with masked BatchNorm.

    python -m bench.expert_bytes [--rows 20] [--capacity 24] [--px 224] [--model resnet50 ...]

Counted on meta tensors, in bfloat16 and channels last: nothing is computed, and no GPU is needed.
Every operator counts what it reads and writes, BatchNorm each pass over a map. What a map costs
more where it lies in no cache, and less where the last layer left it in one, is not seen. Columns:
convolutions (and other products) and all the rest, in MiB; in the last, passes over the output of
the BatchNorm layers per layer, all but convolutions'. ``padded``: masked at the capacity, of which
so many rows are valid.
"""

from __future__ import annotations

import argparse
import contextlib
from collections import Counter

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hubpath_fast import _backends, kernels
from hubpath_fast.executors import torch_private
from hubpath_fast.executors.graphs.masked import masked, settled

MODELS = ("resnet50", "regnetx_032", "mobilenetv3_large_100", "efficientnet_b0")
# How often kernels pass over their arguments, where not once: the statistics come first.
READS = {
    "native_batch_norm": {0: 2},
    "native_batch_norm_backward": {0: 2, 1: 2},
    "batch_norm_backward": {0: 2, 1: 2},
}
PRODUCTS = ("convolution", "convolution_backward", "mm", "addmm", "bmm")
FREE = ("empty", "new_empty", "detach", "zeros", "new_zeros", "alias")


class Traffic(TorchDispatchMode):
    """bytes: read and written, of products ("convolutions") and of all else ("others")."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.is_view or name.startswith(FREE):
            return results
        reads = READS.get(name, {})
        if name == "batch_norm_backward" and args[9]:  # with a residual, the second pass reads g
            reads = {1: 2}
        total = sum(reads.get(i, 1) * size(argument) for i, argument in enumerate(args))
        total += sum(map(size, (kwargs or {}).values())) + size(results)
        if name == "batch_norm_backward" and args[9]:
            total += size(results[3])
        self.bytes["convolutions" if name in PRODUCTS else "others"] += total
        return results


def size(tree: object) -> int:
    return sum(leaf.nbytes for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


def step_bytes(model: nn.Module, rows: int, px: int, mask: bool) -> Counter[str]:
    """Of forward and backward on so many rows, on meta tensors."""
    x = torch.empty(rows, 3, px, px, dtype=torch.bfloat16, device="meta")
    x = x.to(memory_format=torch.channels_last)
    count = torch.empty((), dtype=torch.int32, device="meta")
    within = masked(model, count) if mask else contextlib.nullcontext()
    with kernels_are_taken(), Traffic() as traffic, within:
        settled(model(x)).sum().backward()
    return traffic.bytes


@contextlib.contextmanager
def kernels_are_taken():
    """Within, public operations take meta tensors to the kernels, of which none is run; and results
    are deferred although each operation is looked at."""
    pick, has_modes = _backends.choose, torch_private.has_modes
    _backends.choose = lambda name, x: kernels
    torch_private.has_modes = lambda: False
    try:
        yield
    finally:
        _backends.choose, torch_private.has_modes = pick, has_modes


def normalised_bytes(model: nn.Module, rows: int, px: int) -> int:
    """Of the outputs of all its BatchNorm layers."""
    found = 0

    def add(module, args, output):
        nonlocal found
        found += output.nbytes

    hooks = [m.register_forward_hook(add) for m in model.modules() if isinstance(m, _BatchNorm)]
    x = torch.empty(rows, 3, px, px, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        model(x)
    for hook in hooks:
        hook.remove()
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("bench.expert_bytes", description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--capacity", type=int, default=24)
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--model", action="append", help=f"of timm; default {' '.join(MODELS)}")
    args = parser.parse_args(argv)
    print("| model | layers | convolutions | others | all | passes |\n|---|---|---|---|---|---|")
    for name in args.model or MODELS:
        model = timm.create_model(name).to("meta", torch.bfloat16).train()
        model = model.to(memory_format=torch.channels_last)
        for label, rows, mask in (
            ("torch's", args.rows, False),
            ("masked", args.rows, True),
            ("padded", args.capacity, True),
        ):
            found = step_bytes(model, rows, args.px, mask)
            passes = found["others"] / normalised_bytes(model, rows, args.px)
            cells = [f"{v / 2**20:,.0f}" for v in (*found.values(), sum(found.values()))]
            print(f"| {name} | {label} | {' | '.join(cells)} | {passes:.1f} |")


if __name__ == "__main__":
    main()
