"""What ``bench.gpu_check`` runs of every kernel: operations and sizes.

Beside the operations that are timed (``operations``) these are the others that a step may take:
images that are normalised while they are gathered, rows in static input buffers, and the exploit
loss with the combination or the aggregation in one node, the router's loss with it or not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import functional as HF
from hubpath_fast import reference

from . import operations, ops
from .inputs import Inputs, Size, batch_norm
from .operations import Operation, concat_loop, rows_loss

HALF = {"bfloat16": "bf16", "float16": "fp16"}
PAPER, ODD = (48, 5, 2, 100), (37, 7, 3, 53)  # N, M, K, C
LANDMARKS, MAPS = (16, 5, 2, 98), (64, 64)  # of WFLW
TALL, WIDE = (65536, 16, 2, 100), (4096, 64, 2, 1000)  # many samples; a large hub of many outputs
SIDES = {PAPER: (224, 224), ODD: (37, 41), (256, 5, 2, 100): (224, 224)}  # of images

# The name in a line -> (what makes it, its sizes: the paper's, a ragged one, a large one).
CASES = {
    "route": ("noisy_topk", [Size(*PAPER), Size(*ODD), Size(262144, 64, 2, 10)]),
    "gather": ("gather", [Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(*TALL)]),
    "images": ("images", [Size(*side, dtype="bfloat16") for side in SIDES]),
    "into": ("into", [Size(*PAPER, dtype="bfloat16"), Size(*ODD), Size(*TALL)]),
    "combine": ("combine", [Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(*TALL)]),
    "aggregate": ("aggregate", [
        Size(*PAPER), Size(*PAPER, dtype="bfloat16"), Size(*ODD), Size(*ODD, dtype="float16"),
        Size(*WIDE, dtype="bfloat16"), Size(512, 16, 2, 1000),
    ]),
    "aggregate maps": ("aggregate", [
        Size(*PAPER, trailing=(16, 16)), Size(*ODD, trailing=(5, 7)),
        Size(*ODD, dtype="float16", trailing=(19,)), Size(*LANDMARKS, trailing=MAPS),
        Size(*LANDMARKS, dtype="bfloat16", trailing=MAPS), Size(256, 16, 2, 10, trailing=(3, 5)),
    ]),
    "loss": ("exploit_loss", [Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(65536, 5, 2, 1000)]),
    "combine+loss": ("combine_loss", [Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(*TALL)]),
    "aggregate+loss": ("aggregate_loss", [
        Size(*PAPER), Size(*PAPER, dtype="bfloat16"), Size(*ODD), Size(*WIDE, dtype="bfloat16"),
    ]),
    "aggregate+router": ("aggregate_router", [
        Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(65536, 16, 4, 10),
    ]),
    # One program, a ragged one, many.
    "total loss": ("total_loss", [Size(*PAPER), Size(*ODD, dtype="bfloat16"), Size(*WIDE)]),
    # The paper's layers in all dtypes and layouts; ragged ones; features without maps.
    "batch norm": ("masked_batch_norm", [
        *ops.NORMS,
        batch_norm(20, 24, 256, 56, 56, dtype="float16", activation="silu"),
        batch_norm(20, 24, 256, 56, 56, dtype="bfloat16", activation="relu", layout="contiguous"),
        batch_norm(2, 48, 512, 28, 28, activation="hardswish", residual=True, layout="contiguous"),
        batch_norm(17, 19, 37, 5, 9, activation="relu6"),
        batch_norm(17, 19, 37, 5, 9, dtype="float16", activation="relu6", layout="contiguous"),
        batch_norm(13, 13, 3, 1, 13, dtype="bfloat16", residual=True),
        batch_norm(11, 16, 1280, dtype="bfloat16", activation="hardswish"),
        batch_norm(255, 256, 64, 56, 56, dtype="bfloat16", activation="relu"),
    ]),
}  # fmt: skip


def make(kind: str, size: Size, device: str, seed: int | None = 0) -> Operation:
    """An operation of this file or of ``operations``; seed as there."""
    if kind in _MAKERS:
        return _MAKERS[kind](size, Inputs(size, device, seed))
    return operations.make(kind, size, device, seed)


def label(name: str, size: Size) -> str:
    """``route 48,5,2``: how lines call a case."""
    numbers = ",".join(map(str, size[:3])) if name in ("route", "images") else size.numbers
    text = f"{name} {numbers}"
    if size.trailing and size.norm is None:
        text += f" {'x'.join(map(str, size.trailing))}"
    kind = f" {HALF[size.dtype]}" if size.dtype in HALF else ""
    return text + (kind if name != "images" else "")


def _bytes_of(size: Size, inputs: Inputs) -> Tensor:
    """Images [N, 3, height, width] as bytes, channels last."""
    shape = (size.n, 3, *SIDES.get(tuple(size[:4]), (9, 11)))
    if not inputs.values:
        x = torch.empty(shape, dtype=torch.uint8, device=inputs.device)
    else:
        x = torch.randint(
            256, shape, generator=inputs.random, dtype=torch.uint8, device=inputs.device
        )
    return x.contiguous(memory_format=torch.channels_last)


def _images(size: Size, inputs: Inputs) -> Operation:
    """Bytes to normalised rows of the size's dtype, as the experts take them."""
    x, routing = _bytes_of(size, inputs), inputs.routing()
    scale, shift = inputs.normal(size.m, 3) / 64, inputs.normal(size.m, 3)
    last = torch.channels_last

    def loop():
        slots = routing.rows.long()
        expert = routing.experts.flatten()[slots]
        factor, term = (t.double()[expert, :, None, None] for t in (scale, shift))
        return (x[slots // routing.k].double() * factor + term,)

    return Operation(
        "images", size, (), [], ("rows",), [], loop,
        lambda backend: (
            HF.gather(x, routing, scale, shift, inputs.dtype, last, backend=backend),
        ),
    )  # fmt: skip


def _into(size: Size, inputs: Inputs) -> Operation:
    """Rows in static input buffers, of which the rest must stay as it is."""
    n, m, _, c = size[:4]
    x, routing = inputs.normal(n, c).to(inputs.dtype), inputs.routing()
    capacity, untouched = n + 3, 7.0

    def loop():
        out = torch.full((m * capacity, c), untouched, dtype=torch.float64, device=x.device)
        start = 0
        for i, count in enumerate(routing.counts()):
            slots = routing.rows[start : start + count].long()
            out[i * capacity : i * capacity + count] = x[slots // routing.k].double()
            start += count
        return (out,)

    def ours(backend):
        out = torch.full((m * capacity, c), untouched, dtype=inputs.dtype, device=x.device)
        HF.gather_into(out, x, routing, backend=backend)
        return (out,)

    return Operation("into", size, (), [], ("buffers",), [], loop, ours)


def _combine_loss(size: Size, inputs: Inputs) -> Operation:
    n, m, k, c = size[:4]
    routing, target = inputs.routing(), inputs.target()
    leaves = [inputs.leaf(n * k, c), routing.weights.detach().requires_grad_()]

    def loop(outputs, weights):
        return concat_loop(outputs, weights, routing), rows_loss(outputs, routing, target)

    def ours(backend, outputs, weights):
        own = replace(routing, weights=weights)
        return HF.combine_with_exploit_loss(outputs, own, target, backend=backend)

    upstream = [inputs.upstream(n, m * c), torch.ones((), device=inputs.device)]
    names = ("concat", "loss")
    return Operation(
        "combine_loss", size, ("outputs", "weights"), leaves, names, upstream, loop, ours
    )


def _aggregate_loss(size: Size, inputs: Inputs, temperature: float | None = None) -> Operation:
    """temperature: of the router's loss, the third result; None for none."""
    n, m, k, c = size[:4]
    routing, target = inputs.routing(), inputs.target()
    weights = routing.weights.detach().requires_grad_()
    linear = [inputs.leaf(c, m * c, scale=c**-0.5), inputs.leaf(c)]

    def loop(outputs, weights, matrix, bias):
        concat = concat_loop(outputs, weights, routing)
        results = [F.linear(concat, matrix, bias), rows_loss(outputs, routing, target)]
        if temperature is not None:
            out = reference.ReferenceOutput(None, outputs, replace(routing, weights=weights))
            results.append(reference.router_loss(out, target, temperature))
        return tuple(results)

    def ours(backend, outputs, weights, matrix, bias):
        own = replace(routing, weights=weights)
        return HF.aggregate_with_exploit_loss(
            outputs, own, matrix, bias, target, backend=backend, router_temperature=temperature
        )

    losses = ["loss"] if temperature is None else ["loss", "router"]
    return Operation(
        "aggregate_loss" if temperature is None else "aggregate_router", size,
        ("outputs", "weights", "matrix", "bias"), [inputs.leaf(n * k, c), weights, *linear],
        ("y", *losses), [inputs.upstream(n, c), *torch.ones(len(losses), device=inputs.device)],
        loop, ours,
    )  # fmt: skip


def _total_loss(size: Size, inputs: Inputs) -> Operation:
    n, c = size.n, size.c
    target, scalar = inputs.target(), torch.ones((), device=inputs.device)
    mean = inputs.routing().mean.detach().requires_grad_()
    exploit = scalar.clone().requires_grad_()

    def loop(prediction, mean, exploit):
        losses = F.cross_entropy(prediction, target, reduction="none")
        task, explore = losses.mean(), (mean * mean.log()).sum()
        return task + 0.5 * explore + exploit, task, explore, losses

    def ours(backend, prediction, mean, exploit):
        return HF.total_loss(prediction, target, mean, exploit, 0.5, backend=backend)

    return Operation(
        "total_loss", size, ("prediction", "mean", "exploit"), [inputs.leaf(n, c), mean, exploit],
        ("total", "task", "explore", "losses"), [scalar, scalar, scalar, inputs.normal(n)],
        loop, ours,
    )  # fmt: skip


_MAKERS = {
    "total_loss": _total_loss,
    "images": _images,
    "into": _into,
    "combine_loss": _combine_loss,
    "aggregate_loss": _aggregate_loss,
    "aggregate_router": partial(_aggregate_loss, temperature=0.5),
}
