"""Triton kernels of the public operations: plain tensors in, plain tensors out.

Arguments are validated by ``hubpath_fast.functional``; nothing here checks them again.
"""

from .combine import combine
from .exploit_loss import exploit_loss
from .gather import gather
from .noisy_topk import noisy_topk

__all__ = ["combine", "exploit_loss", "gather", "noisy_topk"]
