"""update_heads: AdamW on the heads of all experts, but for those that had no rows.

    p -= lr decay p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2
    p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)      t updates of this parameter

An expert without rows in a step stays as it is, moments and t included, as torch's optimizers leave
a parameter that has no gradient; which these are is known on the device alone. So the first of two
launches counts updates, and the second one goes over the elements. An expert's weight and bias have
a t each: one may have been frozen before. Powers b^t are kept in float64 from step to step:
computed anew in float32, 1 - b2^t would lose 4 of its 7 digits at the start.

Letters as in feature_heads.py.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ._common import TRITON_DTYPE, accumulator, cdiv, next_power_of_2
from ._launch import Launch, Plan, register
from .feature_heads import HeadTable

_BLOCK = 1024
# No block of experts is smaller: of fewer than threads some have copies, and one warp would read
# what another one has written.
_SMALLEST = 512


@triton.jit
def _count_updates(
    touched_ptr,  # [M] int32, becomes 0
    steps_ptr,  # [2, M] float32, updated: of weights, of biases
    powers_ptr,  # [2, 2, M] float64, updated: b1^t, b2^t
    corrections_ptr,  # [3, 2, M], written: whether there is an update, 1/(1 - b1^t), sqrt(1 - b2^t)
    M: tl.constexpr,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Grid: 1."""
    i = tl.arange(0, BLOCK_M)
    mask = i < M
    touched = tl.load(touched_ptr + i, mask=mask, other=0)
    tl.store(touched_ptr + i, tl.zeros_like(touched), mask=mask)
    for part in tl.static_range(2):
        at = part * M + i
        step = tl.load(steps_ptr + at, mask=mask, other=0.0) + touched.to(tl.float32)
        power1 = tl.load(powers_ptr + at, mask=mask, other=0.0)
        power2 = tl.load(powers_ptr + 2 * M + at, mask=mask, other=0.0)
        power1 = tl.where(touched != 0, power1 * BETA1, power1)
        power2 = tl.where(touched != 0, power2 * BETA2, power2)
        tl.store(steps_ptr + at, step, mask=mask)
        tl.store(powers_ptr + at, power1, mask=mask)
        tl.store(powers_ptr + 2 * M + at, power2, mask=mask)
        # Without any update yet a power is 1, and nothing is divided by what is left.
        first = 1 / tl.where(touched != 0, 1 - power1, 1)
        second = tl.sqrt(1 - power2)
        tl.store(corrections_ptr + at, touched.to(COMPUTE), mask=mask)
        tl.store(corrections_ptr + 2 * M + at, first.to(COMPUTE), mask=mask)
        tl.store(corrections_ptr + 4 * M + at, second.to(COMPUTE), mask=mask)


@triton.jit
def _adamw(
    p_ptr, g_ptr, m_ptr, v_ptr, at, mask, lr, decay, eps, first, second,
    BETA1: tl.constexpr, BETA2: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    p = tl.load(p_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    g = tl.load(g_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    m = tl.load(m_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    v = tl.load(v_ptr + at, mask=mask, other=0.0).to(COMPUTE)
    p -= lr * tl.full([], decay, dtype=COMPUTE) * p
    m += (1 - BETA1) * (g - m)
    v = BETA2 * v + (1 - BETA2) * g * g
    p -= lr * first * m / (tl.sqrt(v) / second + tl.full([], eps, dtype=COMPUTE))
    tl.store(p_ptr + at, p, mask=mask)
    tl.store(m_ptr + at, m, mask=mask)
    tl.store(v_ptr + at, v, mask=mask)


@triton.jit
def _update(
    parameters_ptr, gradient_ptr, m_ptr, v_ptr,  # flat, as of feature_heads
    first_bias,
    table_ptr,  # [3, M]
    corrections_ptr,  # [3, 2, M]
    rates_ptr,  # [2]: of weights, of biases
    decay: tl.float64, bias_decay: tl.float64, eps: tl.float64,
    M: tl.constexpr, C: tl.constexpr, VEC: tl.constexpr, WIDEST: tl.constexpr,
    BETA1: tl.constexpr, BETA2: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid: experts x (blocks of C * WIDEST weights, then blocks of C biases). Those beyond an
    expert's weights, and of experts without an update, end at once."""
    of_weights: tl.constexpr = (C * WIDEST + BLOCK - 1) // BLOCK
    blocks: tl.constexpr = of_weights + (C + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    expert, block = (pid // blocks).to(tl.int64), pid % blocks
    if tl.load(corrections_ptr + expert) != 0:
        if block < of_weights:
            size = tl.load(table_ptr + 2 * M + expert) * VEC * C
            inner = block * BLOCK + tl.arange(0, BLOCK)
            at = tl.load(table_ptr + M + expert) * VEC + inner
            first = tl.load(corrections_ptr + 2 * M + expert)
            second = tl.load(corrections_ptr + 4 * M + expert)
            rate = tl.load(rates_ptr)
            _adamw(parameters_ptr, gradient_ptr, m_ptr, v_ptr, at, inner < size, rate,
                   decay, eps, first, second, BETA1, BETA2, COMPUTE)  # fmt: skip
        else:
            c = (block - of_weights) * BLOCK + tl.arange(0, BLOCK)
            of_bias = first_bias + expert * C + c
            first = tl.load(corrections_ptr + 3 * M + expert)
            second = tl.load(corrections_ptr + 5 * M + expert)
            rate = tl.load(rates_ptr + 1)
            _adamw(parameters_ptr, gradient_ptr, m_ptr, v_ptr, of_bias, c < C, rate,
                   bias_decay, eps, first, second, BETA1, BETA2, COMPUTE)  # fmt: skip


def plan_update(
    parameters, gradient, m, v, table, touched, steps, powers, rates, beta1, beta2, eps, c, vec,
    widest, decay, bias_decay,
) -> Plan:  # fmt: skip
    num_experts = table.shape[1]
    compute = accumulator(parameters.dtype)
    corrections = parameters.new_empty(3, 2, num_experts, dtype=compute)
    count = Launch(
        _count_updates,
        1,
        touched_ptr=touched,
        steps_ptr=steps,
        powers_ptr=powers,
        corrections_ptr=corrections,
        M=num_experts,
        BETA1=beta1,
        BETA2=beta2,
        COMPUTE=TRITON_DTYPE[compute],
        BLOCK_M=max(next_power_of_2(num_experts), _SMALLEST),
    )
    update = Launch(
        _update,
        num_experts * (cdiv(c * widest, _BLOCK) + cdiv(c, _BLOCK)),
        parameters_ptr=parameters,
        gradient_ptr=gradient,
        m_ptr=m,
        v_ptr=v,
        first_bias=parameters.numel() - num_experts * c,
        table_ptr=table,
        corrections_ptr=corrections,
        rates_ptr=rates,
        decay=decay,
        bias_decay=bias_decay,
        eps=eps,
        M=num_experts,
        C=c,
        VEC=vec,
        WIDEST=widest,
        BETA1=beta1,
        BETA2=beta2,
        COMPUTE=TRITON_DTYPE[compute],
        BLOCK=_BLOCK,
    )
    return Plan(None, [count, update])


_update_heads = register(
    "update_heads(Tensor(a!) parameters, Tensor gradient, Tensor(b!) m, Tensor(c!) v, Tensor table,"
    " Tensor(d!) touched, Tensor(e!) steps, Tensor(f!) powers, Tensor rates, float beta1,"
    " float beta2, float eps, int c, int vec, int widest, float decay, float bias_decay) -> ()",
    plan_update,
    lambda *arguments: None,
    numbers=2,
)


def update_heads(
    parameters: Tensor,
    gradient: Tensor,
    m: Tensor,
    v: Tensor,
    table: HeadTable,
    touched: Tensor,
    steps: Tensor,
    powers: Tensor,
    rates: Tensor,
    decay: tuple[float, float],
    betas: tuple[float, float],
    eps: float,
) -> None:
    """One update of AdamW, in place, of the experts that were touched since the last.

    Args:
        parameters, gradient, m, v: flat, as of ``feature_heads``; m and v are the moments.
        table, touched: as of ``feature_heads``; ``touched`` becomes 0.
        steps: [2, M] float32, updates of each expert, twice: of its weight and of its bias, for
            each of which an optimizer has a number of its own. powers: [2, 2, M] float64, either
            beta to them.
        rates: [2], the learning rates of weights and of biases. decay: of either.
    """
    _update_heads(parameters, gradient, m, v, table.table, touched, steps, powers, rates, *betas,
                  eps, table.c, table.vec, table.widest, *map(float, decay))  # fmt: skip
