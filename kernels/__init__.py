"""Triton kernels of the public operations: plain tensors in, plain tensors out.

Arguments are validated by ``hubpath_fast.functional``; nothing here checks them again.
"""

import triton

if triton.knobs.runtime.interpret:
    from . import _interpreter

    _interpreter.mend()

from .aggregate import aggregate
from .batch_norm import masked_batch_norm
from .combine import combine
from .exploit_loss import exploit_loss
from .fused_loss import aggregate_with_exploit_loss, combine_with_exploit_loss
from .gather import gather, gather_into
from .noisy_topk import noisy_topk
from .router_loss import router_loss

__all__ = [
    "aggregate",
    "aggregate_with_exploit_loss",
    "combine",
    "combine_with_exploit_loss",
    "exploit_loss",
    "gather",
    "gather_into",
    "masked_batch_norm",
    "noisy_topk",
    "router_loss",
]
