"""Every kernel at representative sizes, as operations plan their launches: for the compiler only.

Tensors are on the "meta" device, so that nothing is allocated, and no GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hubpath_fast.kernels import _aggregate_backward as aggregate_backward
from hubpath_fast.kernels._activation import ACTIVATIONS, FROM_RESULT
from hubpath_fast.kernels._batch_norm_backward import plan_backward as plan_norm_backward
from hubpath_fast.kernels._batch_statistics import plan_statistics
from hubpath_fast.kernels._launch import Launch
from hubpath_fast.kernels._layout import empty
from hubpath_fast.kernels._tiles import FEW_CHANNELS
from hubpath_fast.kernels.aggregate import plan_forward as plan_aggregate
from hubpath_fast.kernels.batch_norm import plan_forward as plan_norm
from hubpath_fast.kernels.combine import plan_backward as plan_combine_backward
from hubpath_fast.kernels.combine import plan_forward as plan_combine
from hubpath_fast.kernels.exploit_loss import plan_backward as plan_loss_backward
from hubpath_fast.kernels.exploit_loss import plan_forward as plan_loss
from hubpath_fast.kernels.feature_heads import plan_backward as plan_heads_backward
from hubpath_fast.kernels.feature_heads import plan_forward as plan_heads
from hubpath_fast.kernels.gather import plan_backward as plan_gather_backward
from hubpath_fast.kernels.gather import plan_forward as plan_gather
from hubpath_fast.kernels.gather import plan_into
from hubpath_fast.kernels.head_update import plan_update
from hubpath_fast.kernels.noisy_topk import plan_backward as plan_route_backward
from hubpath_fast.kernels.noisy_topk import plan_forward as plan_route
from hubpath_fast.kernels.router_loss import plan_forward as plan_router_loss
from hubpath_fast.kernels.total_loss import plan_backward as plan_total_backward
from hubpath_fast.kernels.total_loss import plan_forward as plan_total_loss
from torch import Tensor

BF16, FP16, FP32, UINT8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
ROUTES = [  # N, M, K: the paper's step, and the ends of the benchmarks
    (48, 5, 2), (512, 5, 2), (256, 16, 2), (64, 64, 8),
    (4096, 64, 8), (262144, 64, 2), (4096, 1000, 16), (300, 1024, 1024),
]  # fmt: skip
_POINTER = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.uint8: "*u8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class CompileCase:
    """One launch. wide: its bulk loads and stores must be 128 bits."""

    name: str
    launch: Launch
    wide: bool = False
    note: str = ""

    def specialised(self) -> tuple[dict[str, str], dict[str, Any], list[str]]:
        """As Triton's launcher would: types of run-time arguments, constants, and the names of the
        arguments that are multiples of 16. Pointers count as such, as torch's allocator makes them.
        """
        signature, constants, aligned = {}, {}, []
        for param in self.launch.kernel.params:
            key, varies = param.name, param.do_not_specialize
            value = self.launch.values[key]
            if isinstance(value, Tensor):
                signature[key] = _POINTER[value.dtype]
                aligned.append(key)
            elif param.is_constexpr or value is None or (value == 1 and not varies):
                constants[key] = value
            elif isinstance(value, float):
                signature[key] = param.annotation_type or "fp32"
            else:
                signature[key] = "i32" if -(2**31) <= value < 2**31 else "i64"
                if value % 16 == 0 and not varies:
                    aligned.append(key)
        return signature, constants, aligned


def every_case() -> list[CompileCase]:
    routes = [case for size in ROUTES for case in router_cases(*size)]
    glue = [*_gather_cases(), *_combine_cases(), *_aggregate_cases(), *_loss_cases()]
    return [
        *routes,
        *glue,
        *_router_loss_cases(),
        *_total_loss_cases(),
        *_norm_cases(),
        *_heads_cases(),
    ]


def _meta(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _integers(*shape: int) -> Tensor:
    return _meta(*shape, dtype=torch.int32)


def router_cases(n: int, m: int, k: int) -> Iterator[CompileCase]:
    """The kernels of one routing and its gradient, for each of the sources of eps."""
    scores, size = _meta(n, m), f"N={n} M={m} K={k}"
    sources = {
        "no eps": (None, None),
        "eps": (scores, None),
        "draw": (None, _meta(2, dtype=torch.int64)),
    }
    for name, (eps, seed) in sources.items():
        given = (scores, scores, eps, seed)
        forward = plan_route(*given, k, False)
        weights, mean, experts, *_ = forward.results
        route, *rest = forward.launches
        [backward] = plan_route_backward(*given, experts, weights, mean, False).launches
        yield CompileCase(f"route {name} {size}", route, m % 4 == 0)
        yield CompileCase(f"route backward {name} {size}", backward, m % 4 == 0)
    for launch in rest:  # whatever the source
        yield CompileCase(f"{launch.kernel.__name__.split('_')[1]} {size}", launch)


def _gather_cases() -> Iterator[CompileCase]:
    """On images, rows of features and maps of features."""
    narrow = "loads are narrow by design: the result is written in order"
    for shape, dtype, out_dtype, x_last, last, affine in [
        ((48, 3, 224, 224), FP32, FP32, False, False, False),
        ((48, 3, 224, 224), UINT8, BF16, False, False, True),
        ((48, 3, 224, 224), UINT8, BF16, True, True, True),
        ((48, 3, 224, 224), UINT8, BF16, False, True, True),
        ((48, 3, 224, 224), FP32, FP16, True, False, True),
        ((48, 64, 56, 56), FP32, BF16, False, True, True),
        ((48, 64, 56, 56), BF16, BF16, True, False, False),
        ((4096, 1000), FP32, BF16, False, False, True),
    ]:
        n, channels = shape[:2]
        x = empty(_meta(*shape), n, dtype, channels_last=x_last)
        positions, offsets = _integers(n, 2), _integers(6)
        scale = _meta(5, channels) if affine else None
        turned = x_last != last and channels < FEW_CHANNELS
        name = f"{list(shape)} {dtype} to {out_dtype}".replace("torch.", "")
        name += f"{' turned' if x_last != last else ''}{' affine' if affine else ''}"
        name += f"{' channels_last' if last else ''}"
        rows = plan_gather(x, positions, offsets, scale, scale, out_dtype, last)
        buffers = empty(x, 5 * n, out_dtype, channels_last=last)
        into = plan_into(buffers, x, positions, offsets, scale, scale)
        for kind, plan in (("gather", rows), ("gather into", into)):
            note = narrow if turned else ""
            yield CompileCase(f"{kind} {name}", plan.launches[0], not turned, note)
        if dtype.is_floating_point:
            plan = plan_gather_backward(rows.results, positions, offsets, scale, dtype)
            yield CompileCase(f"gather backward {name}", plan.launches[0], True)


def _combine_cases() -> Iterator[CompileCase]:
    for (n, m, k, c), trailing, dtype in [
        ((48, 5, 2, 100), (), FP32),
        ((4096, 64, 2, 1000), (), BF16),
        ((4096, 16, 8, 10), (), FP32),
        ((256, 64, 64, 1000), (), FP32),
        ((48, 5, 2, 128), (64, 64), BF16),
    ]:
        size = f"N={n} M={m} K={k} C={c} {_words(trailing, dtype)}"
        outputs, weights = _meta(n * k, c, *trailing, dtype=dtype), _meta(n, k)
        given = (outputs, weights, weights.long(), _integers(n, k), m)
        wide = c % 4 == 0 and c > 16
        forward = plan_combine(*given)
        yield CompileCase(f"combine forward {size}", forward.launches[0], wide)
        loss = (weights.sum(), outputs.float(), weights.long())
        for name, extra in (("", (None, None, None)), (" with loss", loss)):
            plan = plan_combine_backward(forward.results, *given, *extra, 0.0, -100)
            yield CompileCase(f"combine backward{name} {size}", plan.launches[0], wide)


def _aggregate_cases() -> Iterator[CompileCase]:
    """On vectors, and on maps: of landmarks, in both layouts and of few positions."""
    landmarks, maps = (16, 5, 2, 98), (64, 64)
    for (n, m, k, c), trailing, dtype, last in [
        ((48, 5, 2, 100), (), FP32, False),
        ((4096, 64, 2, 1000), (), FP32, False),
        ((4096, 64, 2, 1000), (), BF16, False),
        ((65536, 5, 2, 10), (), FP16, False),
        ((48, 5, 2, 32), maps, BF16, False),
        (landmarks, maps, FP32, False),
        (landmarks, maps, BF16, False),
        (landmarks, maps, FP32, True),
        (landmarks, maps, BF16, True),
        ((48, 3, 2, 68), (4, 8), FP16, False),
        ((48, 3, 2, 5), (16, 16), FP32, False),
        ((2, 64, 8, 300), (128, 128), BF16, False),
    ]:
        size = f"N={n} M={m} K={k} C={c} {_words(trailing, dtype)}{' last' if last else ''}"
        for name, launch in aggregate_launches(n, m, k, c, trailing, dtype, last).items():
            # A map's positions are read side by side, whatever C is; the matrix has C in a row.
            wide = c % 4 == 0 or (len(trailing) > 0 and not last and "matrix" not in name)
            yield CompileCase(f"aggregate {name} {size}", launch, wide)


def aggregate_launches(
    n: int,
    m: int,
    k: int,
    c: int,
    trailing: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool = False,
) -> dict[str, Launch]:
    """By name, of the grouped form with C outputs: forward with the loss (maps: one launch),
    backward with and without."""
    outputs = empty(_meta(n * k, c, *trailing), n * k, dtype, channels_last=channels_last)
    weights = _meta(n, k)
    rows, offsets = _integers(n * k), _integers(m + 1)
    matrix = _meta(c, m * c, dtype=dtype)
    partials, target = outputs.float().flatten(), weights.long()
    # What only says where rows lie may stand for the positions.
    forward = plan_aggregate(
        outputs, weights, rows, offsets, matrix, matrix[:, 0], dtype, partials
    )  # fmt: skip
    (y, loss), found = (
        forward.results,
        dict(zip(("products", "sum"), forward.launches, strict=False)),
    )
    for name, extra in (("", (None, None, None)), (" with loss", (loss, partials, target))):
        given = (y, outputs, weights, rows, offsets, matrix, dtype, dtype, True, True)
        plan = aggregate_backward.plan_backward(*given, *extra, 0.1, -100)
        found[f"backward rows{name}"], found["backward matrix"] = plan.launches
    return found


def _loss_cases() -> Iterator[CompileCase]:
    for shape, dtype in [
        ((96, 100), FP32),
        ((8192, 1000), BF16),
        ((32768, 10), FP32),
        ((1024, 20000), FP32),
        ((96, 32, 64, 64), BF16),
    ]:
        (rows, channels), trailing = shape[:2], shape[2:]
        size = f"R={rows} C={channels} {_words(trailing, dtype)}"
        outputs = _meta(*shape, dtype=dtype)
        given = (_integers(rows), _meta(rows // 2, *trailing).long(), 2, 0.1, -100)
        wide = bool(trailing) or channels % 4 == 0
        forward = plan_loss(outputs, *given)
        yield CompileCase(f"exploit loss forward {size}", forward.launches[0], wide)
        kept = plan_loss(outputs, *given, with_losses=True)
        yield CompileCase(f"exploit loss forward, rows kept {size}", kept.launches[0], wide)
        logsumexp = forward.results[1]
        plan = plan_loss_backward(logsumexp.sum(), outputs, logsumexp, *given)
        yield CompileCase(f"exploit loss backward {size}", plan.launches[0], wide)


def _router_loss_cases() -> Iterator[CompileCase]:
    """A few numbers a sample: nothing is wide."""
    for n, k in [(48, 2), (4096, 8), (65536, 2), (300, 1024)]:
        plan = plan_router_loss(_meta(n * k), _meta(n, k), _integers(n, k), 0.5)
        yield CompileCase(f"router loss N={n} K={k}", plan.launches[0])


def _total_loss_cases() -> Iterator[CompileCase]:
    """One program that does all, and many of wide rows."""
    for n, m, c, dtype in [(48, 5, 100, FP32), (48, 5, 100, BF16), (4096, 64, 1000, FP32)]:
        prediction, mean, scalar = _meta(n, c, dtype=dtype), _meta(m), _meta()
        target, size = _meta(n, dtype=torch.int64), f"N={n} C={c} {str(dtype)[6:]}"
        forward = plan_total_loss(prediction, target, mean, scalar, 0.1, 0.5)
        given = prediction, forward.results[4], target, mean, 0.1
        [backward] = plan_total_backward(*given, scalar, None, None, None, 0.5).launches
        for launch in (*forward.launches, backward):
            yield CompileCase(
                f"{launch.kernel.__name__.strip('_').replace('_', ' ')} {size}", launch
            )


def _norm_cases() -> Iterator[CompileCase]:
    """BatchNorm of a ResNet-50's layers, of other networks' activations, and of features."""
    for shape, dtype, last, activation, residual in [
        ((24, 64, 112, 112), BF16, True, "relu", False),
        ((24, 256, 56, 56), BF16, True, "relu", True),
        ((24, 256, 56, 56), BF16, True, None, False),
        ((24, 256, 56, 56), FP32, True, "relu", True),
        ((24, 256, 56, 56), BF16, False, "relu", True),
        ((24, 256, 56, 56), FP32, False, "silu", True),
        ((24, 2048, 7, 7), BF16, True, "relu", True),
        ((24, 2048, 7, 7), FP16, False, "relu", True),
        ((24, 24, 112, 112), BF16, True, "relu6", True),
        ((24, 72, 28, 28), FP16, True, "hardswish", False),
        ((24, 72, 28, 28), FP32, False, "hardswish", True),
        ((24, 40, 14, 14), FP16, True, "silu", True),
        ((24, 3, 224, 224), FP32, True, None, False),
        ((4096, 512), FP32, False, "relu", False),
    ]:
        maps = "x".join(map(str, shape[2:]))
        size = f"N={shape[0]} C={shape[1]} {maps} {str(dtype).removeprefix('torch.')}"
        size += f"{' last' if last else ''} {activation}{' residual' if residual else ''}"
        vector = 16 // dtype.itemsize
        along = shape[1] if last or not maps else shape[2] * shape[3]
        launches = norm_launches(shape, dtype, last, activation, residual)
        for name, launch in launches.items():
            wide = along % vector == 0 and not name.startswith("joined")
            yield CompileCase(f"norm {name} {size}", launch, wide)


def norm_launches(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    channels_last: bool,
    activation: str | None,
    residual: bool,
) -> dict[str, Launch]:
    """By name, of BatchNorm with all its parameters and statistics, forward and backward."""
    x = empty(_meta(*shape), shape[0], dtype, channels_last=channels_last)
    vector, count, tracked = _meta(shape[1]), _integers(), _meta(1, dtype=torch.int64)
    added, number = x if residual else None, ACTIVATIONS[activation]
    statistics = plan_statistics(x, count, vector, vector, tracked, 0.1, 1e-5)
    parameters = (*statistics.results, vector, vector)
    forward = plan_norm(x, count, added, *parameters, number)
    gate = (forward.results if number in FROM_RESULT else x) if residual and number else None
    given = (x, x, gate, count, *parameters, number, residual, True, True)
    # With a residual the sums' kernel writes what goes back to it, too.
    sums = "gradient and its sums" if residual else "sums of the gradient"
    names = ("statistics", "joined statistics", "forward", sums, "joined sums", "backward")
    plans = (statistics, forward, plan_norm_backward(*given))
    launches = [launch for plan in plans for launch in plan.launches]
    return dict(zip(names, launches, strict=True))


def _heads_cases() -> Iterator[CompileCase]:
    """Heads on a shelf's features: of a step, of what D is odd, and of all experts' answers."""
    for (n, m, k, c, d), images, dtype in [
        ((256, 256, 2, 100, 512), 4000, FP16),
        ((256, 32, 2, 10, 320), 4000, FP32),
        ((256, 32, 2, 100, 37), 4000, FP16),
        ((256, 32, 32, 100, 768), 4000, FP16),
        ((256, 32, 2, 21843, 768), 4000, FP16),  # ImageNet-21k
    ]:
        size = f"N={n} M={m} K={k} C={c} {_words((d,), dtype)}"
        vec = math.gcd(d, 16)
        features, numbers = _meta(m * images * d, dtype=dtype), _meta(n, dtype=torch.float64)
        parameters, table = _meta(m * c * (d + 1)), _meta(3, m, dtype=torch.int64)
        given = (features, numbers, _integers(n * k), _integers(m + 1), parameters, table)
        forward = plan_heads(*given, c, k, vec, d)
        # Weights and features have D in a row; outputs have C.
        wide = vec == 16 and c % 4 == 0
        yield CompileCase(f"heads forward {size}", forward.launches[0], wide)
        backward = plan_heads_backward(forward.results, *given, _integers(m), c, k, vec, d)
        yield CompileCase(f"heads backward {size}", backward.launches[0], wide)
        update = plan_update(
            *[parameters] * 4, table, _integers(m), _meta(2, m),
            _meta(2, 2, m, dtype=torch.float64), _meta(2), 0.9, 0.999, 1e-8, c, vec, d, 0.1, 0.0,
        )  # fmt: skip
        for name, launch in zip(("count", "update"), update.launches, strict=True):
            wide = name == "update" and vec == 16
            yield CompileCase(f"heads {name} {size}", launch, wide)


def _words(trailing: tuple[int, ...], dtype: torch.dtype) -> str:
    return f"{'x'.join(map(str, trailing))} {str(dtype).removeprefix('torch.')}"
