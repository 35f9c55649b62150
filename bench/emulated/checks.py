"""What ``bench.emulated.kernels`` checks: each a function of where its lines go.

Operations of ``check_operations`` come first; then what has no place among those that a GPU's times
are taken of.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from hubpath_fast import functional as HF

from .. import check_batch_norm, check_kernels, operations
from ..check_operations import CASES, label
from ..children import Write
from ..inputs import Inputs, Size
from ..operations import TOLERANCE, Operation

# Elements of a case's rows, of its scores or of its matrix: beyond, it would take many seconds.
LARGEST = 40_000
# Where cutting down leaves code out: several blocks of samples and their scan, two warps a row, a
# loss whose sum is a launch of its own.
MORE = [
    ("route", "noisy_topk", Size(4099, 6, 2, 1)),
    ("route", "noisy_topk", Size(6, 600, 3, 1)),
    ("total loss", CASES["total loss"][0], Size(300, 16, 2, 100)),
]
DRAWN = (Size(48, 5, 2, 1), Size(37, 7, 3, 1), Size(600, 16, 2, 1))
WIDTHS = (40, 16, 70)  # features of each expert's head
LAST_FIRST = 2**48 - 1  # the largest number of a sample
Check = Callable[[Write], None]


def checks() -> dict[str, Check]:
    """By name, in the order of ``check_operations``."""
    found: dict[str, Check] = {}
    cases = check_kernels.cases_of(CASES, CASES)
    cut_down = [(name, kind, smaller(size)) for name, kind, size in cases]
    for case in dict.fromkeys([*cut_down, *MORE]):
        found[label(case[0], case[2])] = partial(_twice, case)
    for source in ("float32", "uint8"):
        found[f"layouts of {source}"] = partial(_layouts, source)
    found["heads"], found["heads' updates"] = _heads, _updated_heads
    for size in DRAWN:
        numbers = ",".join(map(str, size[:3]))
        found[f"draw {numbers}"] = partial(_drawn, size)
        found[f"numbered draw {numbers}"] = partial(_numbered, size)
    for case in dict.fromkeys(case for case in cut_down if case[0] == "batch norm"):
        found[f"statistics {label(case[0], case[2])}"] = partial(_statistics, case)
    return found


def smaller(size: Size) -> Size:
    """The same with fewer samples, then fewer positions, then fewer channels or experts, until it
    is small; what is odd stays odd."""
    while (half := _halved(size)) is not None:
        size = half
    return size


def _halved(size: Size) -> Size | None:
    """None where it is small enough."""
    norm, channels = size.norm, size.c
    rows = size.n if norm else size.n * size.k
    elements = max(rows * channels * size.positions, size.n * size.m)
    matrix = 0 if norm else channels * size.m * channels
    if elements <= LARGEST and matrix <= 4 * LARGEST:
        return None
    if size.n > 64:
        return size._replace(n=_half(size.n), norm=norm and norm._replace(valid=_half(norm.valid)))
    if max(size.trailing, default=0) > 9 and elements > LARGEST:
        return size._replace(trailing=tuple(max(_half(side), 5) for side in size.trailing))
    if channels > 100:
        return size._replace(c=_half(channels))
    if size.m > 16:
        return size._replace(m=_half(size.m))
    fewer = max(size.n // 2, 3)
    return size._replace(n=fewer, norm=norm and norm._replace(valid=fewer - (norm.valid < size.n)))


def _half(number: int) -> int:
    return number // 2 | number & 1


def _twice(case: check_kernels.Case, write: Write) -> None:
    for _ in range(2):
        check_kernels.values(write, [case], "cpu", "triton")


def _layouts(source: str, write: Write) -> None:
    """Images to rows of another layout, forward and backward, and rows of many channels."""
    last, first = torch.channels_last, torch.contiguous_format
    for channels, (before, after) in itertools.product(
        (3, 20), itertools.permutations((last, first))
    ):
        size = Size(5, 3, 2, channels, dtype="float32")
        operation = _turned(Inputs(size, "cpu"), getattr(torch, source), before, after)
        _compare(f"layouts of {source}, {channels} channels to {str(after)[6:]}", operation, write)


def _compare(text: str, operation: Operation, write: Write) -> None:
    """Twice, as cases are: results and gradients against float64."""
    expected = operations.truth(operation)
    for _ in range(2):
        found = operations.found(operation, "triton")
        bound = TOLERANCE[operation.size.dtype]
        problem = check_kernels.first_wrong(operation.labels, found, expected, bound)
        errors = [operations.relative_error(*pair) for pair in zip(found, expected, strict=True)]
        write(text, ok=problem is None, error=max(errors), **{"note": problem} if problem else {})


def _turned(
    inputs: Inputs, source: torch.dtype, before: torch.memory_format, after: torch.memory_format
) -> Operation:
    n, m, _, channels = inputs.size[:4]
    routing, shape = inputs.routing(), (n, channels, 7, 9)
    scale, shift = inputs.normal(m, channels), inputs.normal(m, channels)
    x = (inputs.normal(*shape) * 50).abs().to(source).contiguous(memory_format=before)
    slots = routing.rows.long()
    sample, expert = slots // routing.k, routing.experts.flatten()[slots]

    def loop(x: Tensor) -> tuple[Tensor]:
        factor, term = (t.double()[expert, :, None, None] for t in (scale, shift))
        return (x[sample].double() * factor + term,)

    def ours(backend: str, x: Tensor) -> tuple[Tensor]:
        float32 = torch.float32
        return (HF.gather(x, routing, scale, shift, float32, after, backend=backend),)

    if not source.is_floating_point:
        without = ((), [], ("rows",), [], lambda: loop(x), lambda backend: ours(backend, x))
        return Operation("turned", inputs.size, *without)
    upstream = [inputs.normal(len(slots), *shape[1:]).contiguous(memory_format=after)]
    return Operation(
        "turned", inputs.size, ("x",), [x.requires_grad_()], ("rows",), upstream, loop, ours
    )


def _drawn(size: Size, write: Write) -> None:
    check_kernels.drawn_noise(write, [size], "cpu", "triton")


def _statistics(case: check_kernels.Case, write: Write) -> None:
    check_batch_norm.statistics(write, [case], "cpu", "triton")


def _numbered(size: Size, write: Write) -> None:
    """Noise by the sample's number: of a part of a batch, the bits that the whole has."""
    clean, noise, _ = Inputs(size, "cpu").scores()
    cut, wrong = size.n // 3, []
    for seed, first in ((0, 0), (2**63 - 1, LAST_FIRST - size.n)):

        def outcome(rows: slice, seed: int = seed, first: int = first) -> list[Tensor]:
            leaves = [part[rows].clone().requires_grad_() for part in (clean, noise)]
            eps = HF.NoiseDraw(seed, first + rows.start)
            found = HF.noisy_topk(*leaves, size.k, eps, backend="triton")
            upstream = torch.ones_like(found.weights).cumsum(dim=1)
            gradients = torch.autograd.grad(found.weights, leaves, upstream)
            return [found.experts, found.weights.detach(), *gradients]

        whole = outcome(slice(0, size.n))
        parts = zip(outcome(slice(0, cut)), outcome(slice(cut, size.n)), strict=True)
        names = ("experts", "weights", "d_clean", "d_noise")
        wrong += [
            f"{name} of seed {seed}, sample {first}"
            for name, ours, both in zip(names, whole, parts, strict=True)
            if not torch.equal(ours, torch.cat(both))
        ]
    text = f"numbered draw {','.join(map(str, size[:3]))}"
    if wrong:
        write(text, ok=False, note=f"other bits in parts: {'; '.join(wrong)}")
    else:
        write(text, text="parts have the bits of the whole")


def _heads(write: Write) -> None:
    """A linear head of each expert on its own features, of which the samples have numbers."""
    from hubpath_fast import kernels

    size, images = Size(37, len(WIDTHS), 2, 5), 41
    inputs = Inputs(size, "cpu")
    routing, features = inputs.routing(), [inputs.normal(images, width) for width in WIDTHS]
    numbers = torch.randint(images, (size.n,), generator=inputs.random)
    slots, offsets = routing.rows.long(), routing.offsets.tolist()
    starts = [images * sum(WIDTHS[:i]) for i in range(size.m)]
    table = kernels.head_table(starts, WIDTHS, size.c)
    touched = torch.zeros(size.m, dtype=torch.int32)
    sizes = [*(size.c * width for width in WIDTHS), size.m * size.c]

    def loop(parameters: Tensor) -> tuple[Tensor]:
        *weights, biases = parameters.split(sizes)
        parts = []
        for i, (weight, x) in enumerate(zip(weights, features, strict=True)):
            seen = x.double()[numbers[slots[offsets[i] : offsets[i + 1]] // size.k]]
            parts.append(seen @ weight.view(size.c, -1).T + biases.view(size.m, -1)[i])
        return (torch.cat(parts),)

    def ours(_: str, parameters: Tensor) -> tuple[Tensor]:
        flat = torch.cat([x.flatten() for x in features])
        given = (flat, numbers.double(), routing.rows, routing.offsets, size.k, table, touched)
        return (kernels.feature_heads(parameters, *given),)

    upstream = [inputs.normal(len(slots), size.c)]
    leaves = [inputs.leaf(sum(sizes))]
    names = (("parameters",), leaves, ("outputs",), upstream)
    _compare("heads", Operation("heads", size, *names, loop, ours), write)
    if not touched.all():
        write("heads touched", ok=False, note=f"of experts that all have rows: {touched.tolist()}")


def _updated_heads(write: Write) -> None:
    """AdamW of the experts that were touched, by its formula in float64."""
    from hubpath_fast import kernels

    outputs, experts, betas, eps, decays = 5, len(WIDTHS), (0.9, 0.999), 1e-8, (0.1, 0.0)
    table = kernels.head_table([0] * experts, WIDTHS, outputs)
    random = torch.Generator().manual_seed(0)
    sizes = torch.tensor([*(outputs * width for width in WIDTHS), *[outputs] * experts])
    owner = torch.arange(experts).repeat(2).repeat_interleave(sizes)
    decay = torch.tensor(decays).repeat_interleave(experts).repeat_interleave(sizes).double()
    ours = [torch.randn(len(owner), generator=random), *torch.zeros(2, len(owner))]
    p, m, v = (tensor.double() for tensor in ours)
    steps, powers = torch.zeros(2, experts), torch.ones(2, 2, experts, dtype=torch.float64)
    for step, (there, rate) in enumerate((((1, 0, 1), 1e-2), ((1, 1, 0), 3e-3), ((0, 1, 0), 1e-2))):
        gradient = torch.randn(len(owner), generator=random)
        touched, rates = torch.tensor(there, dtype=torch.int32), torch.full((2,), rate)
        kernels.update_heads(
            ours[0], gradient, ours[1], ours[2], table, touched, steps, powers, rates, decays,
            betas, eps,
        )  # fmt: skip
        now, count = torch.tensor(there).bool()[owner], steps[0].double()[owner].clamp(min=1)
        m = torch.where(now, betas[0] * m + (1 - betas[0]) * gradient.double(), m)
        v = torch.where(now, betas[1] * v + (1 - betas[1]) * gradient.double() ** 2, v)
        size = (v / (1 - betas[1] ** count)).sqrt() + eps
        moved = p * (1 - rate * decay) - rate * m / (1 - betas[0] ** count) / size
        p = torch.where(now, moved, p)
        problem = check_kernels.first_wrong(["p", "m", "v"], ours, [p, m, v], TOLERANCE["float32"])
        errors = [operations.relative_error(*pair) for pair in zip(ours, (p, m, v), strict=True)]
        text = f"heads' update {step + 1}"
        write(text, ok=problem is None, error=max(errors), **{"note": problem} if problem else {})
