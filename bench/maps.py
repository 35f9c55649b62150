"""Aggregation of maps: peak memory and time of its forms on the CPU, with and without gradients.

    python -m bench.maps [--size 16,5,2,98] [--maps 64x64] [--threads 1,2] [--dtype float32]
                         [--channels-last] [--seconds 10] [--check] [--out FILE]

Rows: ``convolution`` (the concatenation [N, M*C, h, w] and a 1x1 convolution, as a user would write
it), ``grouped`` (a product per expert, whose results are kept: the form of vectors) and ``by row``
(``functional.aggregate`` on large maps). What is measured "with gradients" is y, the mean of its
squares, and the gradients of outputs, weights, matrix and bias; "without", y alone.

Peak memory is that of torch's allocator above the inputs, counted by the profiler
(``counting.allocated_peak``): exact, the same in each run, y and the gradients in it. A form's
results are compared with the float64 reference first, and a wrong one is not timed. ``x memory``
and ``x time`` are shares of the convolution's. --check: exit status 1 where ``by row`` takes more
than 0.30 of its memory with gradients, or longer.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from hubpath_fast import Routing, _torch_ops
from hubpath_fast import functional as HF

from . import jsonl, operations, records, timing
from .counting import allocated_peak
from .inputs import Inputs, Size
from .operations import TOLERANCE, relative_error

MEMORY_SHARE = 0.30  # of the convolution's, with gradients, at most
Form = Callable[..., Tensor]


def convolution(outputs: Tensor, routing: Routing, matrix: Tensor, bias: Tensor) -> Tensor:
    concat = HF.combine(outputs, routing, backend="torch")
    return F.conv2d(concat, matrix[:, :, None, None], bias)


def grouped(outputs: Tensor, routing: Routing, matrix: Tensor, bias: Tensor) -> Tensor:
    return _torch_ops.aggregate(outputs, routing.weights, routing, matrix, bias, grouped=True)


def by_row(outputs: Tensor, routing: Routing, matrix: Tensor, bias: Tensor) -> Tensor:
    return _torch_ops.aggregate(outputs, routing.weights, routing, matrix, bias, by_row=True)


FORMS: dict[str, Form] = {"convolution": convolution, "grouped": grouped, "by row": by_row}


class Case:
    """The inputs of one size, and what is called."""

    def __init__(self, size: Size, channels_last: bool = False):
        inputs = Inputs(size, "cpu")
        n, m, k, c = size[:4]
        routing = inputs.routing()
        values = [
            inputs.leaf(n * k, c, *size.trailing), routing.weights,
            inputs.leaf(c, m * c, scale=c**-0.5), inputs.leaf(c),
        ]  # fmt: skip
        if channels_last:
            values[0] = values[0].detach().to(memory_format=torch.channels_last)
        self.leaves = [value.detach().requires_grad_() for value in values]
        self.size, self.routing = size, routing

    def y(self, form: Form, leaves: list[Tensor]) -> Tensor:
        outputs, weights, matrix, bias = leaves
        kept = self.routing
        routing = Routing(weights, kept.mean, kept.experts, kept.offsets, kept.rows, kept.positions)
        return form(outputs, routing, matrix, bias)

    def without_gradients(self, form: Form) -> Tensor:
        with torch.no_grad():
            return self.y(form, self.leaves)

    def with_gradients(self, form: Form) -> tuple[Tensor, ...]:
        return self.gradients(form, self.leaves)

    def gradients(self, form: Form, leaves: list[Tensor]) -> tuple[Tensor, ...]:
        y = self.y(form, leaves)  # held to the end, as a step holds its prediction
        return y, *torch.autograd.grad(y.square().mean(), leaves)

    def errors(self) -> dict[str, float]:
        """Of each form, the largest relative error of y and the gradients against float64."""
        exact = [leaf.detach().double().requires_grad_() for leaf in self.leaves]

        def reference(outputs, routing, matrix, bias):
            concat = operations.concat_loop(outputs, routing.weights, routing)
            return operations.linear_over_channels(concat, matrix, bias)

        truth = self.gradients(reference, exact)
        found = {name: self.with_gradients(form) for name, form in FORMS.items()}
        return {name: max(map(relative_error, ours, truth)) for name, ours in found.items()}


def measure(case: Case, threads: int, seconds: float) -> list[dict]:
    """A row for each form and mode; of a wrong form a note."""
    torch.set_num_threads(threads)
    errors, size = case.errors(), case.size
    common = {
        "benchmark": "maps", **dict(zip("NMKC", size[:4], strict=True)),
        "maps": "x".join(map(str, size.trailing)), "dtype": size.dtype,
        **records.environment("cpu"), "threads": threads,
    }  # fmt: skip
    rows = [
        {**common, "row": name, "note": f"wrong: relative error {error:.1e}; not timed"}
        for name, error in errors.items()
        if not error <= TOLERANCE[size.dtype]
    ]
    right = {name: form for name, form in FORMS.items() if errors[name] <= TOLERANCE[size.dtype]}
    for mode, call in (("with", case.with_gradients), ("without", case.without_gradients)):
        functions = {name: lambda form=form, call=call: call(form) for name, form in right.items()}
        peaks = {name: allocated_peak(function) for name, function in functions.items()}
        times = timing.interleaved(functions, "cpu", seconds, min_rounds=3, calls=1)
        for name in right:
            base = "convolution" if "convolution" in right else name
            rows.append({
                **common, "row": name, "gradients": mode, "peak_memory": peaks[name],
                "p20": times[name].p20, "p50": times[name].p50, "p80": times[name].p80,
                "best": times[name].best, "error": errors[name],
                "memory_share": peaks[name] / peaks[base],
                "time_share": times[name].p50 / times[base].p50,
            })  # fmt: skip
    return rows


def show(row: dict) -> str:
    head = f"{row['threads']:>7}  {row.get('gradients', ''):<9}{row['row']:<12}"
    if "note" in row:
        return f"{head}{row['note']}"
    return (
        f"{head}{row['peak_memory'] / 1e6:>8.1f}{row['memory_share']:>10.2f}"
        f"{row['p20'] * 1e3:>9.1f}{row['p50'] * 1e3:>9.1f}{row['p80'] * 1e3:>9.1f}"
        f"{row['time_share']:>8.2f}{row['error']:>10.1e}"
    )


def missed(rows: list[dict]) -> list[str]:
    """What the goals miss, in words."""
    found = [row["row"] + ": " + row["note"] for row in rows if "note" in row]
    for row in rows:
        if row["row"] != "by row" or "note" in row:
            continue
        where = f"{row['threads']} threads, {row['gradients']} gradients"
        if row["memory_share"] > MEMORY_SHARE:
            found.append(f"{where}: {row['memory_share']:.2f} of the convolution's memory")
        if row["time_share"] > 1:
            found.append(f"{where}: {row['time_share']:.2f} of the convolution's time")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.maps", description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="16,5,2,98", help="N,M,K,C")
    parser.add_argument("--maps", default="64x64", help="height x width")
    parser.add_argument("--threads", default="1,2", help="one or several, by commas")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each mode, three rounds")
    parser.add_argument("--check", action="store_true", help="exit status 1 where a goal is missed")
    parser.add_argument("--out", type=Path, help="add rows to this file of JSON lines")
    args = parser.parse_args(argv)
    numbers = [int(number) for number in args.size.split(",")]
    trailing = tuple(int(side) for side in args.maps.split("x"))
    case = Case(Size(*numbers, dtype=args.dtype, trailing=trailing), args.channels_last)
    print(f"{case.size}, {records.device_name('cpu')}, torch {torch.__version__}")
    print(
        f"{'threads':>7}  {'gradients':<9}{'form':<12}{'peak MB':>8}{'x memory':>10}"
        f"{'20 % ms':>9}{'50 %':>9}{'80 %':>9}{'x time':>8}{'error':>10}"
    )
    rows = []
    for threads in args.threads.split(","):
        found = measure(case, int(threads), args.seconds)
        print("\n".join(map(show, found)), flush=True)
        rows += found
    if args.out:
        jsonl.write(args.out, rows)
    problems = missed(rows)
    print(f"goals: at most {MEMORY_SHARE:.2f} of the memory, and not longer; ", end="")
    print("missed: " + "; ".join(problems) if problems else "all met")
    return 1 if args.check and problems else 0


if __name__ == "__main__":
    sys.exit(main())
