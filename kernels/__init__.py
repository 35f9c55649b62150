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
from .feature_heads import HeadTable, feature_heads, head_table
from .fused_loss import aggregate_with_exploit_loss, combine_with_exploit_loss
from .gather import gather, gather_into
from .head_update import update_heads
from .noisy_topk import noisy_topk
from .router_loss import router_loss
from .total_loss import total_loss

__all__ = [
    "HeadTable",
    "aggregate",
    "aggregate_with_exploit_loss",
    "combine",
    "combine_with_exploit_loss",
    "exploit_loss",
    "feature_heads",
    "gather",
    "gather_into",
    "head_table",
    "masked_batch_norm",
    "noisy_topk",
    "router_loss",
    "total_loss",
    "update_heads",
]
