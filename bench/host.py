"""What the host pays at every step: for the glue's launches, and to see that graphs still fit.

    python -m bench.host [--models resnet50 swin_tiny_patch4_window7_224 ...] [--out FILE]

For each size of ``bench.glue``: the public operations of a training step's glue, forward and
backward, and of an evaluation's, up to where Triton hands a launch to the driver. ``kept`` is from
a kept plan, as every step after the first; ``planned`` plans and lets Triton choose each time.
Losses and sums that are torch's own are left out. ``the step of bench.glue`` is the whole step
that it times as ``triton``, given tensors on the CPU: our launches end as above, torch's operators
run, which at these sizes costs the host about what handing them to a GPU does.

For each network: taking its signature, as when something changed; seeing that nothing
changed; and, for the network as one of a hub, seeing that no module is shared.

Nothing is run, so it is the same with and without a GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import timm
import torch

from hubpath_fast import functional as HF
from hubpath_fast.executors import RowPrecision, RowSource
from hubpath_fast.executors.graphs.signature import Signature
from hubpath_fast.executors.sharing import Sharing

from . import glue, jsonl, records, timing

MODELS = ("resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny", "efficientnet_b3")


def network(name: str, seconds: float) -> list[dict]:
    expert = timm.create_model(name)
    scores = torch.zeros(4, 2)
    x, routing = torch.rand(4, 3, 8, 8), HF.noisy_topk(scores, scores, 1)
    layout = torch.contiguous_format
    source = RowSource(x, routing, None, None, x.dtype, layout, RowPrecision())
    kept, sharing = Signature(expert, source), Sharing()
    times = timing.interleaved(
        {
            "taken anew": lambda: Signature(expert, source),
            "unchanged": lambda: kept.holds(expert, source),
            "shared": lambda: sharing([expert]),
        },
        seconds=seconds,
    )
    return _rows({"model": name}, times)


def launches(size: tuple[int, int, int, int], seconds: float) -> list[dict]:
    """Needs Triton. Raises RuntimeError where the kernels are interpreted."""
    from .stubbed import launches_end_here, planned_each_time

    given = glue.make(*size, "cpu")
    outputs = torch.cat(given.outputs).detach().requires_grad_()
    leaves = [given.clean, given.noise, outputs, given.weight, given.bias]

    def forward() -> list[torch.Tensor]:
        routing = HF.noisy_topk(given.clean, given.noise, given.k, given.eps, backend="triton")
        HF.gather(given.x, routing, backend="triton")
        joined = (outputs, routing, given.weight, given.bias)
        if not torch.is_grad_enabled():
            return [HF.aggregate(*joined, backend="triton")]
        joined = HF.aggregate_with_exploit_loss(*joined, given.target, backend="triton")
        return [*joined, routing.mean]

    with launches_end_here():
        upstream = [torch.ones_like(result) for result in forward()]
        training = lambda: torch.autograd.grad(forward(), leaves, upstream)  # noqa: E731
        evaluation = torch.no_grad()(forward)
        calls: dict[str, Callable] = {"training, kept": training, "evaluation, kept": evaluation}
        calls |= {
            "training, planned": planned_each_time(training),
            "evaluation, planned": planned_each_time(evaluation),
            "the step of bench.glue": glue.step(given, "triton"),
        }
        return _rows(
            dict(zip("NMKC", size, strict=True)), timing.interleaved(calls, seconds=seconds)
        )


def _rows(what: dict, times: dict[str, timing.Times]) -> list[dict]:
    common = {"benchmark": "host", **what, **records.environment("cpu")}
    return [{**common, "row": row, **asdict(found)} for row, found in times.items()]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="*", default=MODELS, help="names of timm's models")
    parser.add_argument("--sizes", type=int, nargs="*", help="of bench.glue; default all")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model and size")
    parser.add_argument("--out", type=Path, help="add rows to this file of JSON lines")
    args = parser.parse_args(argv)
    sizes = range(len(glue.SIZES)) if args.sizes is None else args.sizes
    parts = [(str(glue.SIZES[i]), launches, glue.SIZES[i]) for i in sizes]
    parts += [(name, network, name) for name in args.models]
    for title, measure, what in parts:
        rows = measure(what, args.seconds)
        cells = ", ".join(f"{row['row']} {row['p50'] * 1e6:.0f} us" for row in rows)
        print(f"{title}: {cells}")
        if args.out:
            jsonl.write(args.out, rows)


if __name__ == "__main__":
    main()
