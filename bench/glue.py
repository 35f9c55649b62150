"""The whole glue of a training step against the reference: everything but experts and generator.

    python -m bench.glue [--device cpu|cuda] [--seconds 20] [--out FILE]

Glue: the router on given scores and noise, the gather of input vectors (64 floats a sample, no
gradient, as for images), joining the experts' given outputs into rows, the linear aggregator, the
task, exploit and exploration losses, and the backward pass to the scores, the experts' outputs and
the aggregator's weight and bias. Every row starts from the same M output tensors, one per expert.

Rows: ``reference`` is ``ReferenceHubPathway`` and its ``losses``, unchanged: a loop over experts
with boolean masks, the full concatenation, F.linear. Its experts return their given outputs, its
generator the given scores. ``compiled`` is the same under torch.compile. ``torch`` and ``triton``
are the public operations on that backend. Each is checked against the float64 reference first; a
wrong one is not timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hubpath_fast import functional as HF
from hubpath_fast import reference
from hubpath_fast.devices import full_float32

from . import jsonl, records, timing
from .children import first_line
from .inputs import scores
from .operations import relative_error

SIZES = [(48, 5, 2, 10), (48, 5, 2, 100), (512, 16, 2, 1000), (1024, 64, 2, 1000)]  # N, M, K, C
FEATURES = 64
EXPLORE = 0.5


@dataclass
class Glue:
    """Given tensors of one size; ``leaves`` are what gradients are taken of."""

    k: int
    x: Tensor  # [N, FEATURES]
    eps: Tensor  # [N, M]
    target: Tensor  # [N]
    clean: Tensor  # [N, M]
    noise: Tensor  # [N, M]
    weight: Tensor  # [C, M*C]
    bias: Tensor  # [C]
    outputs: list[Tensor]  # M of [n_i, C]

    @property
    def leaves(self) -> list[Tensor]:
        active = [part for part in self.outputs if len(part) > 0]
        return [self.clean, self.noise, self.weight, self.bias, *active]


def make(n: int, m: int, k: int, c: int, device: str, seed: int = 0) -> Glue:
    """Random scores, outputs and an aggregator near its start (a weighted sum)."""
    random = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=random, device=device)

    clean, noise, eps = scores(n, m, k, device, random)
    counts = reference.noisy_topk(clean, noise, k, eps).counts()
    weight = torch.eye(c, device=device).repeat(1, m) + normal(c, m * c) / c
    target = torch.randint(c, (n,), generator=random, device=device)
    found = Glue(
        k, normal(n, FEATURES), eps, target, clean, noise, weight, normal(c),
        [normal(count, c) for count in counts],
    )  # fmt: skip
    for leaf in found.leaves:
        leaf.requires_grad_()
    return found


def double(glue: Glue) -> Glue:
    """The same glue in float64, with leaves of its own."""
    wide = {
        name: value.detach().double() if value.is_floating_point() else value
        for name, value in vars(glue).items()
        if isinstance(value, Tensor)
    }
    found = Glue(k=glue.k, outputs=[part.detach().double() for part in glue.outputs], **wide)
    for leaf in found.leaves:
        leaf.requires_grad_()
    return found


class _Given(nn.Module):
    """Stands for an expert or a generator: whatever goes in, it returns what it was given."""

    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value


class _Linear(nn.Module):
    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias

    def forward(self, concat):
        return F.linear(concat, self.weight, self.bias)


def reference_step(glue: Glue, compiled: bool = False):
    """A function: forward and backward of the reference's glue -> (loss, gradients of leaves)."""
    model = reference.ReferenceHubPathway(
        [_Given(part) for part in glue.outputs],
        _Given((glue.clean, glue.noise)),
        _Linear(glue.weight, glue.bias),
        glue.k,
    ).train()

    def forward() -> Tensor:
        return reference.losses(model(glue.x, glue.eps), glue.target, EXPLORE)[0]

    return _step(torch.compile(forward) if compiled else forward, glue)


def step(glue: Glue, backend: str):
    """The same for the public operations on a backend."""

    def forward() -> Tensor:
        routing = HF.noisy_topk(glue.clean, glue.noise, glue.k, glue.eps, backend=backend)
        HF.gather(glue.x, routing, backend=backend)
        outputs = torch.cat(glue.outputs)
        prediction, exploit = HF.aggregate_with_exploit_loss(
            outputs, routing, glue.weight, glue.bias, glue.target, backend=backend
        )
        return HF.total_loss(
            prediction, glue.target, routing.mean, exploit, EXPLORE, backend=backend
        )[0]

    return _step(forward, glue)


def _step(forward, glue: Glue):
    leaves = glue.leaves

    def run() -> tuple[Tensor, ...]:
        loss = forward()
        return loss.detach(), *torch.autograd.grad(loss, leaves)

    return run


def worst_error(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> float:
    """The largest ||found - truth|| / ||truth|| of the loss and the gradients; NaN is infinite."""
    return max(relative_error(*pair) for pair in zip(found, truth, strict=True))


# Sums of at most 64,000 float32 terms, relative to their norm, stay well below; a wrong weight or
# a lost row shows at 1e-3 and above.
TOLERANCE = 2e-5


def measure(
    size: tuple[int, int, int, int], device: str, seconds: float, compiled: bool
) -> Iterator[dict]:
    """The rows of a size, as they are made: who is killed keeps those that were written."""
    glue = make(*size, device)
    truth = reference_step(double(glue))()
    steps = {"reference": reference_step(glue), "torch": step(glue, "torch")}
    if device == "cuda":
        steps["triton"] = step(glue, "triton")
    if compiled:
        torch._dynamo.reset()
        steps["compiled"] = reference_step(glue, compiled=True)
    shape = dict(zip("NMKC", size, strict=True))
    common = {"benchmark": "glue", "direction": "both", **shape, **records.environment(device)}
    errors = {}
    for name in list(steps):
        try:
            with full_float32():
                errors[name] = worst_error(steps[name](), truth)
        except Exception as error:
            yield {**common, "row": name, "note": f"does not run: {first_line(error)}"}
            del steps[name]
            continue
        if errors[name] > TOLERANCE:
            note = f"wrong: relative error {errors[name]:.1e}; not timed"
            yield {**common, "row": name, "note": note}
            del steps[name]
    del truth
    times = timing.interleaved(steps, device, seconds)
    base = times.get("reference")
    yield from _rows(times, "eager", errors, common, base)
    if device != "cuda":
        return
    # The reference cannot be captured: its boolean masks wait for the device.
    graphs = {}
    for name in ("torch", "triton"):
        if name not in steps:
            continue
        try:
            graphs[name] = _captured(size, device, name)
        except Exception as error:
            note = f"not captured: {first_line(error)}"
            yield {**common, "row": name, "mode": "graph", "note": note}
    yield from _rows(timing.replayed(graphs, seconds), "graph", errors, common, base)


def _captured(size: tuple[int, int, int, int], device: str, backend: str) -> timing.Captured:
    """The step as a graph, on leaves of its own: a node that accumulates other leaves' gradients
    may still be alive (compiled code keeps some), on a stream that the capture must not wait for.
    """
    own = make(*size, device)
    return timing.capture(lambda: step(own, backend))


def _rows(times, mode: str, errors, common, base) -> list[dict]:
    """Rows of one mode; ``speedup`` is the eager reference's median (``base``) over the row's."""
    return [
        {
            **common,
            "row": name,
            "mode": mode,
            **asdict(found),
            "speedup": base.p50 / found.p50 if base else None,
            "speedup_best": base.best / found.best if base else None,
            "error": errors[name],
        }
        for name, found in times.items()
    ]


def show(row: dict) -> None:
    size = "({N}, {M}, {K}, {C})".format(**row)
    if "note" in row:
        print(f"{size:20} {row['row']:10} {row['note']}", flush=True)
        return
    ratio = f"{row['speedup']:6.2f}x" if row["speedup"] else ""
    best = f"{row['speedup_best']:6.2f}x" if row["speedup_best"] else ""
    print(
        f"{size:20} {row['row']:10} {row['mode']:6} p20 {row['p20'] * 1e3:9.3f}  "
        f"p50 {row['p50'] * 1e3:9.3f}  p80 {row['p80'] * 1e3:9.3f} ms  "
        f"{ratio} (of the fastest {best})  error {row['error']:.0e}",
        flush=True,
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.glue", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=10.0, help="for each size and mode")
    parser.add_argument("--compile", action="store_true", help="add the reference compiled")
    parser.add_argument("--sizes", type=int, nargs="*", help="indices into the sizes; default all")
    parser.add_argument("--out", type=Path, help="add rows to this file of JSON lines")
    args = parser.parse_args(argv)
    timing.refuse_interpreter()
    for i in range(len(SIZES)) if args.sizes is None else args.sizes:
        for row in measure(SIZES[i], args.device, args.seconds, args.compile):
            show(row)
            if args.out:
                jsonl.write(args.out, [row])


if __name__ == "__main__":
    main()
