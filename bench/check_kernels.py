"""Checks of the kernels, each a function of a device and a backend.

On a GPU they are run at the sizes of ``check_operations``; the tests run the same functions at
small sizes on a CPU, with the kernels interpreted. What only a GPU has (its waits, its graphs) is
an argument: ``waits_forbidden`` and ``record``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hubpath_fast import Routing, reference
from hubpath_fast import functional as HF
from hubpath_fast.devices import full_float32

from . import glue, operations, timing
from .check_operations import CASES, label, make
from .children import Write, first_line
from .inputs import Inputs, Size
from .operations import TOLERANCE

Case = tuple[str, str, Size]  # the name in a line, what makes it, its size
# A single element of 1e8 may be this many times the bound on the norm from its place: an element
# that was lost, doubled or taken from elsewhere is off by about its own size, 1.
WORST_ELEMENT = 4


def values(write: Write, cases: Iterable[Case], device: str, backend: str) -> None:
    """Each case's results and gradients against the reference in float64: a line each."""
    for name, kind, size in cases:
        text = label(name, size)
        try:
            operation = make(kind, size, device)
            with full_float32():
                expected = operations.truth(operation)
                found = operations.found(operation, backend)
            bound = TOLERANCE[size.dtype]
            problem = first_wrong(operation.labels, found, expected, bound)
            if problem is None and kind == "noisy_topk":
                problem = wrong_plan(size, device, backend)
            pairs = zip(found, expected, strict=True)
            error = max(operations.relative_error(*pair) for pair in pairs)
            if problem is None:
                write(text, error=error)
            else:
                write(text, ok=False, error=error, note=problem)
        except Exception as problem:  # the other sizes may still tell something
            write(text, ok=False, note=first_line(problem))
            _stop_without_device(device)


def _stop_without_device(device: str) -> None:
    """Raises where the device's context is lost: all that follows would only say so again."""
    if device == "cuda":
        torch.cuda.synchronize()


def first_wrong(
    labels: list[str], found: list[Tensor], expected: list[Tensor], bound: float
) -> str | None:
    """The first element that is wrong, with what was expected; None where all are right.

    bound: of the norm of what differs, relative to the norm of what is expected.
    """
    for name, ours, right in zip(labels, found, expected, strict=True):
        if ours.shape != right.shape:
            return f"{name}: shape {list(ours.shape)}, expected {list(right.shape)}"
        size = right.square().mean().sqrt()
        allowed = WORST_ELEMENT * bound * (right.abs() + size)
        wrong = ~((ours.double() - right).abs() <= allowed)  # NaN is wrong
        if wrong.any():
            flat = int(wrong.flatten().int().argmax())
            index = [int(i) for i in torch.unravel_index(torch.tensor(flat), right.shape)]
            got, wanted = ours.flatten()[flat].item(), right.flatten()[flat].item()
            return (
                f"{name}{index} got {got:.6g} expected {wanted:.6g} "
                f"({int(wrong.sum())} of {wrong.numel()} wrong)"
            )
        error = operations.relative_error(ours, right)
        if error > bound:
            return f"{name}: relative error {error:.1e} above {bound:.0e}"
    return None


def wrong_plan(size: Size, device: str, backend: str) -> str | None:
    """The integers of a routing against those of the reference in float64."""
    clean, noise, eps = Inputs(size, device).scores()
    found = HF.noisy_topk(clean, noise, size.k, eps, backend=backend)
    expected = reference.noisy_topk(clean.double(), noise.double(), size.k, eps.double())
    return first_unequal(found, expected)


def first_unequal(found: Routing, expected: Routing) -> str | None:
    for name in ("experts", "offsets", "rows", "positions"):
        ours, right = getattr(found, name), getattr(expected, name)
        wrong = (ours.long() != right.long()).flatten()
        if wrong.any():
            flat = int(wrong.int().argmax())
            got, wanted = int(ours.flatten()[flat]), int(right.flatten()[flat])
            return f"{name}[{flat}] got {got} expected {wanted} ({int(wrong.sum())} wrong)"
    return None


def drawn_noise(write: Write, sizes: Iterable[Size], device: str, backend: str) -> None:
    """Noise drawn in the kernel: no reference has it, but what holds for any noise must hold."""
    for size in sizes:
        clean, noise, _ = Inputs(size, device).scores()
        leaves = [clean.requires_grad_(), noise.requires_grad_()]
        routings = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            routings.append(HF.noisy_topk(*leaves, size.k, "draw", backend=backend))
        first, same, other = routings
        upstream = torch.randn(first.weights.shape, device=device)
        d_clean, _ = torch.autograd.grad(first.weights, leaves, upstream)
        sorted_rows = torch.sort(first.experts.flatten(), stable=True).indices
        facts = {
            "the same seed draws the same": torch.equal(first.weights, same.weights),
            "another seed draws other noise": not torch.equal(first.weights, other.weights),
            "weights fall": bool((first.weights.diff(dim=1) <= 0).all()),
            "weights are in (0, 1]": bool((first.weights > 0).all() & (first.weights <= 1).all()),
            "rows are by expert, then by sample": torch.equal(first.rows.long(), sorted_rows),
            # p is a softmax: its mean sums to 1, and a shift of all scores changes nothing.
            # Float32 sums of M terms.
            "the mean sums to 1": abs(first.mean.sum().item() - 1) < 1e-5,
            "gradients of scores sum to 0": bool((d_clean.sum(dim=1).abs() < 1e-5).all()),
        }
        wrong = [name for name, holds in facts.items() if not holds]
        text = f"draw {size.n},{size.m},{size.k}"
        if wrong:
            write(text, ok=False, note="not so: " + "; ".join(wrong))
        else:
            write(text, text="")


def repeats(
    write: Write, cases: Iterable[Case], glue_size: tuple, device: str, backend: str, times: int
) -> None:
    """The same bits each time: a race, or an order that varies, shows sooner or later."""
    for text, call in _calls(cases, glue_size, device, backend):
        first = call()
        differs = torch.zeros((), dtype=torch.bool, device=device)
        for _ in range(times):
            for a, b in zip(first, call(), strict=True):
                differs |= (a != b).any()
        if differs.item():
            write(f"repeat {text}", ok=False, note=f"other bits in one of {times} repeats")
        else:
            write(f"repeat {text}", text=f"{times} times", quiet=True)


def no_waits(
    write: Write, cases: Iterable[Case], glue_size: tuple, device: str, backend: str,
    waits_forbidden: Callable[[], contextlib.AbstractContextManager],
) -> None:  # fmt: skip
    """Nothing waits for the device, forward or backward."""
    for text, call in _calls(cases, glue_size, device, backend):
        call()  # compiles
        try:
            with waits_forbidden():
                call()
        except Exception as error:
            write(f"wait {text}", ok=False, note=first_line(error))
            continue
        write(f"wait {text}", text="none", quiet=True)


def _calls(
    cases: Iterable[Case], glue_size: tuple, device: str, backend: str
) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    for name, kind, size in cases:
        operation = make(kind, size, device)
        yield label(name, size), lambda operation=operation: operations.found(operation, backend)
    step = glue.step(glue.make(*glue_size, device), backend)
    yield f"glue {','.join(map(str, glue_size))}", lambda: list(step())


@contextlib.contextmanager
def waits_are_errors() -> Iterator[None]:
    """Within, what waits for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def replays(
    write: Write, sizes: Iterable[tuple], device: str, backend: str,
    record: Callable[[Callable[[], list[Tensor]]], Callable[[], list[Tensor]]],
) -> None:  # fmt: skip
    """The captured glue, replayed with fresh inputs, gives what eager calls give.

    record: makes a replay of a function, which leaves its results in the same tensors each time.
    """
    for size in sizes:
        given, problem = glue.make(*size, device, seed=1), None
        step = glue.step(given, backend)
        replay = record(lambda step=step: list(step()))
        for seed in (2, 3):
            other = glue.make(*size, device, seed=seed)
            expected = _joined(glue.step(other, backend)())
            copy_inputs(given, other)
            found = _joined(replay())
            for name, ours, right in zip(GLUE_LABELS, found, expected, strict=True):
                if problem is None and not torch.equal(ours, right):
                    error = operations.relative_error(ours, right.double())
                    problem = f"inputs {seed}: {name} is not the eager one, by {error:.1e}"
        text = f"replay glue {','.join(map(str, size))}"
        if problem is None:
            write(text, text="the eager bits")
        else:
            write(text, ok=False, note=problem)


GLUE_LABELS = ("loss", "d_clean", "d_noise", "d_weight", "d_bias", "d_outputs")


def _joined(results: tuple[Tensor, ...]) -> list[Tensor]:
    """Of other routings experts have other rows: all rows' gradients together have one shape."""
    return [*results[:5], torch.cat(results[5:])]


def copy_inputs(given: glue.Glue, other: glue.Glue) -> None:
    """Gives one glue the values of another of its size, in place."""
    with torch.no_grad():
        for name in ("x", "eps", "target", "clean", "noise", "weight", "bias"):
            getattr(given, name).copy_(getattr(other, name))
        rows, start = torch.cat(other.outputs), 0
        for part in given.outputs:
            part.copy_(rows[start : start + len(part)])
            start += len(part)


def record_graph(function: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
    """A function as a CUDA graph."""
    kept: dict[str, list[Tensor]] = {}

    def call() -> None:
        kept["results"] = function()

    graph = timing.capture(lambda: call)

    def replay() -> list[Tensor]:
        graph.replay()
        return kept["results"]

    return replay


def cases_of(table: dict[str, tuple[str, list[Size]]], names: Iterable[str]) -> list[Case]:
    return [(name, table[name][0], size) for name in names for size in table[name][1]]


def main(device: str = "cuda", backend: str = "triton") -> None:
    """Every kernel once, at a ragged size that is small: what a memory checker is run over."""
    for kind, sizes in CASES.values():
        small = Size(13, 5, 2, 37, dtype=sizes[-1].dtype if kind == "images" else "float32")
        small = small._replace(trailing=(5, 7) if sizes[0].trailing else ())
        if norm := sizes[0].norm:
            small = small._replace(norm=norm._replace(valid=11, residual=True))
        operations.found(make(kind, small, device), backend)
    timing.synchronize(device)


if __name__ == "__main__":
    main()
