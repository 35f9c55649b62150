"""What tests of benchmarks share."""

from __future__ import annotations

# Triton decides where it is imported whether it interprets, and tests here unset TRITON_INTERPRET:
# whichever of them imports it first must not decide for all.
import hubpath_fast.kernels  # noqa: F401
import pytest
import torch


@pytest.fixture
def tf32():
    """TF32 is on for products, too, as a user may have it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
