"""Samples out to the rows of their K experts, each row normalised as its expert wants it.

    out[r] = x[n] * scale[i] + shift[i],   row r = positions[n, j] of sample n, expert i

One launch: each sample is read once and written K times, in the result's dtype and memory layout.
Backward sums over the K rows of a sample in a fixed order, without atomics.

Changing the layout on the way takes a two-dimensional tile, turned over in shared memory; with the
few channels of an image a tile's stores could not be 128 bits wide, so there the result is written
in order and the loads are narrow, which L1 absorbs: K stores weigh more than one load.

The rows can also go to static input buffers, which do not move with the other experts' counts:
``gather_into`` gives each expert ``capacity`` rows of a given tensor, where a captured graph reads.

Shapes: N samples, M experts, K active experts per sample, R = N*K rows, C channels (dimension 1).
Offsets are 64 bits wherever they can pass 2^31 elements.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, RowPlan, accumulator, cdiv, next_power_of_2
from ._launch import Launch, Plan, apply, once_differentiable, register
from ._layout import empty, has_layout, is_channels_last, settle
from ._tiles import FEW_CHANNELS, TILE, channel_sizes, expert_of, per_channel, tile_of, tile_walk


@triton.jit
def _target_row(position, expert, offsets_ptr, mask, capacity):
    """Where row ``position`` is written: there, or in its expert's part of ``capacity`` rows."""
    row = position
    if capacity is not None:
        begin = tl.load(offsets_ptr + expert, mask, other=0)
        row = expert.to(tl.int32) * capacity + (position - begin)
    return row.to(tl.int64)


@triton.jit(do_not_specialize=["N", "capacity"])
def _gather_kernel(
    # inputs
    x_ptr,  # [N, PLANES, INNER]; [N, C, SPATIAL] if TURN
    positions_ptr,  # [N, K] int32
    offsets_ptr,  # [M + 1] int32
    scale_ptr,  # [M, C] or None
    shift_ptr,  # [M, C] or None
    # outputs
    out_ptr,  # [R, PLANES, INNER]; [M * capacity, PLANES, INNER]
    # sizes
    N,
    capacity,  # or None
    PLANES: tl.constexpr, INNER: tl.constexpr, SPATIAL: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, BY_PLANE: tl.constexpr, TURN: tl.constexpr,
    DTYPE: tl.constexpr,
    # tunables
    BITS: tl.constexpr, FEW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid (N * PLANES / BLOCK_P * INNER / BLOCK_I,). A program owns a tile of x and its K copies.

    TURN: x is contiguous and the result channels last, as one plane of SPATIAL * C elements.
    """
    sample, plane, inner, channel, mask_p, mask_i = tile_of(
        N, PLANES, INNER, SPATIAL, C, BLOCK_P, BLOCK_I
    )
    mask = mask_p[:, None] & mask_i[None, :]
    # The next position is on its way while a row is written.
    position = tl.load(positions_ptr + sample * K, mask_p, other=0)
    source = (inner % C) * (INNER // C) + inner // C if TURN else inner
    x = tl.load(x_ptr + (sample * PLANES + plane)[:, None] * INNER + source[None, :], mask, other=0)
    if DTYPE is not None:
        x = x.to(DTYPE)
    for j in range(K):
        following = tl.load(positions_ptr + sample * K + j + 1, mask_p & (j + 1 < K), other=0)
        value = x
        expert = position
        if scale_ptr is not None or shift_ptr is not None or capacity is not None:
            expert = expert_of(position, offsets_ptr, mask_p, M, BITS)
        if scale_ptr is not None:
            scale = per_channel(scale_ptr, expert, plane, channel, mask_p, C, BY_PLANE, FEW)
            value = value * scale.to(DTYPE)
        if shift_ptr is not None:
            shift = per_channel(shift_ptr, expert, plane, channel, mask_p, C, BY_PLANE, FEW)
            value = value + shift.to(DTYPE)
        row = _target_row(position, expert, offsets_ptr, mask_p, capacity)
        target = (row * PLANES + plane)[:, None] * INNER + inner[None, :]
        tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask)
        position = following


@triton.jit(do_not_specialize=["capacity"])
def _gather_turned_kernel(
    # inputs
    x_ptr,  # [N, C, SPATIAL], addressed by X_C and X_S
    positions_ptr,  # [N, K] int32
    offsets_ptr,  # [M + 1] int32
    scale_ptr,  # [M, C] or None
    shift_ptr,  # [M, C] or None
    # outputs
    out_ptr,  # [R, C, SPATIAL], or [M * capacity, ...], addressed by OUT_C and OUT_S
    # sizes
    capacity,  # or None
    SPATIAL: tl.constexpr, C: tl.constexpr, M: tl.constexpr, K: tl.constexpr,
    X_C: tl.constexpr, X_S: tl.constexpr, OUT_C: tl.constexpr, OUT_S: tl.constexpr,
    DTYPE: tl.constexpr,
    # tunables
    BITS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Grid (N * C / BLOCK_C * SPATIAL / BLOCK_S,). A program owns a tile of one sample."""
    CHUNKS_S: tl.constexpr = (SPATIAL + BLOCK_S - 1) // BLOCK_S
    CHUNKS_C: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    sample = (program // (CHUNKS_C * CHUNKS_S)).to(tl.int64)
    # 64 bits: a tile's corner alone can lie 2^31 elements into a sample.
    offs_s = (program % CHUNKS_S).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    offs_c = (program // CHUNKS_S % CHUNKS_C).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_c < C)[:, None] & (offs_s < SPATIAL)[None, :]
    source = sample * (C * SPATIAL) + offs_c[:, None] * X_C + offs_s[None, :] * X_S
    x = tl.load(x_ptr + source, mask, other=0)
    if DTYPE is not None:
        x = x.to(DTYPE)
    for j in range(K):
        position = tl.load(positions_ptr + sample * K + j)
        value = x
        expert = position
        if scale_ptr is not None or shift_ptr is not None or capacity is not None:
            expert = expert_of(position, offsets_ptr, position >= 0, M, BITS).to(tl.int64)
        if scale_ptr is not None:
            scale = tl.load(scale_ptr + expert * C + offs_c, offs_c < C, other=0.0)
            value = value * scale.to(DTYPE)[:, None]
        if shift_ptr is not None:
            shift = tl.load(shift_ptr + expert * C + offs_c, offs_c < C, other=0.0)
            value = value + shift.to(DTYPE)[:, None]
        base = _target_row(position, expert, offsets_ptr, position >= 0, capacity) * (C * SPATIAL)
        target = base + offs_c[:, None] * OUT_C + offs_s[None, :] * OUT_S
        tl.store(out_ptr + target, value.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["N"])
def _gather_backward_kernel(
    # inputs
    grad_ptr,  # [R, PLANES, INNER]
    positions_ptr,  # [N, K] int32
    offsets_ptr,  # [M + 1] int32
    scale_ptr,  # [M, C] or None
    # outputs
    grad_x_ptr,  # [N, PLANES, INNER]
    # sizes
    N,
    PLANES: tl.constexpr, INNER: tl.constexpr, SPATIAL: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, K: tl.constexpr, BY_PLANE: tl.constexpr, DTYPE: tl.constexpr,
    # tunables
    BITS: tl.constexpr, FEW: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    """Grid as _gather_kernel. A program owns a tile of x's gradient and sums its K rows."""
    sample, plane, inner, channel, mask_p, mask_i = tile_of(
        N, PLANES, INNER, SPATIAL, C, BLOCK_P, BLOCK_I
    )
    mask = mask_p[:, None] & mask_i[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_I), DTYPE)
    position = tl.load(positions_ptr + sample * K, mask_p, other=0)
    for j in range(K):
        following = tl.load(positions_ptr + sample * K + j + 1, mask_p & (j + 1 < K), other=0)
        source = (position.to(tl.int64) * PLANES + plane)[:, None] * INNER + inner[None, :]
        grad = tl.load(grad_ptr + source, mask, other=0.0).to(DTYPE)
        if scale_ptr is not None:
            expert = expert_of(position, offsets_ptr, mask_p, M, BITS)
            scale = per_channel(scale_ptr, expert, plane, channel, mask_p, C, BY_PLANE, FEW)
            grad = grad * scale.to(DTYPE)
        total += grad
        position = following
    target = (sample * PLANES + plane)[:, None] * INNER + inner[None, :]
    tl.store(grad_x_ptr + target, total.to(grad_x_ptr.dtype.element_ty), mask)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _launch(x, positions, offsets, scale, shift, out, capacity=None) -> Launch:
    channels_last, dtype = is_channels_last(out), out.dtype
    turned = not has_layout(x, channels_last)
    affine = scale is not None or shift is not None
    computes = affine or dtype != x.dtype
    tensors = {
        "x_ptr": x,
        "positions_ptr": positions,
        "offsets_ptr": offsets,
        "scale_ptr": scale,
        "shift_ptr": shift,
        "out_ptr": out,
        "DTYPE": TRITON_DTYPE[accumulator(x.dtype, dtype)] if computes else None,
        "capacity": capacity,
    }
    channels, spatial = channel_sizes(x)
    if not turned or (channels_last and channels < FEW_CHANNELS):
        programs, sizes = tile_walk(x, positions, offsets, affine, channels_last)
        return Launch(_gather_kernel, programs, **tensors, **sizes, TURN=turned)
    block_c = min(64, next_power_of_2(channels))
    block_s = min(2 * TILE // block_c, next_power_of_2(spatial))
    programs = x.shape[0] * cdiv(channels, block_c) * cdiv(spatial, block_s)
    minor, major = (channels, 1), (1, spatial)  # strides of (SPATIAL, C): channels last, contiguous
    (x_s, x_c), (out_s, out_c) = (major, minor) if channels_last else (minor, major)
    experts = offsets.numel() - 1
    return Launch(
        _gather_turned_kernel, programs, **tensors, SPATIAL=spatial, C=channels, M=experts,
        K=positions.shape[1], X_C=x_c, X_S=x_s, OUT_C=out_c, OUT_S=out_s,
        BITS=(experts - 1).bit_length(), BLOCK_C=block_c, BLOCK_S=block_s,
    )  # fmt: skip


def _fake(x, positions, offsets, scale, shift, dtype, channels_last) -> Tensor:
    return empty(x, positions.numel(), dtype, channels_last=channels_last)


def _settle(x, positions, offsets, scale, shift, dtype, channels_last):
    x = settle(x, channels_last)
    return x, positions, offsets, _contiguous(scale), _contiguous(shift), dtype, channels_last


def plan_forward(x, positions, offsets, scale, shift, dtype, channels_last) -> Plan:
    out = _fake(x, positions, offsets, scale, shift, dtype, channels_last)
    return Plan(out, [_launch(x, positions, offsets, scale, shift, out)])


def _into_settle(out, x, positions, offsets, scale, shift):
    x = settle(x, is_channels_last(out))
    return out, x, positions, offsets, _contiguous(scale), _contiguous(shift)


def plan_into(out, x, positions, offsets, scale, shift) -> Plan:
    capacity = out.shape[0] // (offsets.numel() - 1)
    return Plan(None, [_launch(x, positions, offsets, scale, shift, out, capacity)])


def _backward_fake(grad, positions, offsets, scale, dtype) -> Tensor:
    return empty(grad, positions.shape[0], dtype)


def _backward_settle(grad, positions, offsets, scale, dtype):
    return settle(grad), positions, offsets, _contiguous(scale), dtype


def plan_backward(grad, positions, offsets, scale, dtype) -> Plan:
    out = _backward_fake(grad, positions, offsets, scale, dtype)
    affine, channels_last = scale is not None, is_channels_last(grad)
    programs, sizes = tile_walk(out, positions, offsets, affine, channels_last)
    launch = Launch(
        _gather_backward_kernel, programs, grad_ptr=grad, positions_ptr=positions,
        offsets_ptr=offsets, scale_ptr=scale, grad_x_ptr=out,
        DTYPE=TRITON_DTYPE[accumulator(grad.dtype, dtype)], **sizes,
    )  # fmt: skip
    return Plan(out, [launch])


_forward = register(
    "gather(Tensor x, Tensor positions, Tensor offsets, Tensor? scale, Tensor? shift,"
    " ScalarType dtype, bool channels_last) -> Tensor",
    plan_forward,
    _fake,
    _settle,
)
_into = register(
    "gather_into(Tensor(a!) out, Tensor x, Tensor positions, Tensor offsets, Tensor? scale,"
    " Tensor? shift) -> ()",
    plan_into,
    lambda *arguments: None,
    _into_settle,
)
_backward = register(
    "gather_backward(Tensor grad, Tensor positions, Tensor offsets, Tensor? scale,"
    " ScalarType dtype) -> Tensor",
    plan_backward,
    _backward_fake,
    _backward_settle,
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, offsets, scale, shift, dtype, channels_last):
        ctx.save_for_backward(positions, offsets, scale)
        ctx.dtype = x.dtype
        return _forward(x, positions, offsets, scale, shift, dtype, channels_last)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return _backward(grad, *ctx.saved_tensors, ctx.dtype), None, None, None, None, None, None


def gather(
    x: Tensor,
    plan: RowPlan,
    scale: Tensor | None,
    shift: Tensor | None,
    dtype: torch.dtype,
    memory_format: torch.memory_format,
) -> Tensor:
    """x [N, ...] to [R, ...] in expert order, of ``dtype`` and ``memory_format``.

    x: any float dtype or uint8, contiguous or channels last (anything else is copied first).
    scale, shift: [M, channels] or None, channels along dimension 1, computed in float32 (float64
    if x or the result is). memory_format: ``torch.contiguous_format`` or ``torch.channels_last``.
    Differentiable: x.
    """
    channels_last = memory_format == torch.channels_last
    out = apply(_Gather, x, plan.positions, plan.offsets, scale, shift, dtype, channels_last)
    # A slot that was dropped for a prediction writes its sample's first row once more. There is
    # room for a row of its own, which nothing is written to.
    rows = plan.rows.numel()
    return out if rows == plan.positions.numel() else out[:rows]


def gather_into(
    out: Tensor,
    x: Tensor,
    plan: RowPlan,
    scale: Tensor | None,
    shift: Tensor | None,
) -> None:
    """``gather`` into out [M * capacity, ...]: the j-th row of expert i at ``i * capacity + j``.

    out: contiguous or channels last, at least as many rows per expert as it is given; the others
    are left as they are. Its dtype and layout say what ``gather`` is told. Not differentiable.
    """
    _into(out, x, plan.positions, plan.offsets, scale, shift)
