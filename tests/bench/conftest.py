"""What tests of benchmarks share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def tf32():
    """TF32 is on for products, too, as a user may have it."""
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = False
