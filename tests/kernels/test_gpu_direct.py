"""Kept plans on a device: the same bits as Triton's own launches, and no CPU tensor's address."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels import aggregate_with_exploit_loss, noisy_topk
from support.output_cases import Case, leaves, make
from triton.runtime.jit import JITFunction

pytestmark = pytest.mark.gpu


def step(i, matrix):
    tensors = leaves(i.outputs, i.weights, matrix, i.bias)
    results = aggregate_with_exploit_loss(*tensors[:2], i, *tensors[2:], i.target, 0.1)
    return *results, *torch.autograd.grad([r.sum() for r in results], tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_the_same_bits(dtype, monkeypatch):
    inputs = make(Case("", n=48, c=100, c_out=100), dtype, "cuda")
    first, kept = step(inputs, inputs.matrix), step(inputs, inputs.matrix)
    run = JITFunction.run
    monkeypatch.setattr(JITFunction, "run", lambda *a, **k: run(*a, **k))
    chosen = step(inputs, inputs.matrix)
    for once, again, general in zip(first, kept, chosen, strict=True):
        assert torch.equal(once, again)
        assert torch.equal(once, general)


def test_a_tensor_of_the_host_is_refused_whatever_was_kept():
    clean, eps = torch.randn(48, 5, device="cuda"), torch.randn(48, 5)
    for _ in range(2):
        noisy_topk(clean, clean, eps.cuda(), 2, False)
        with pytest.raises(ValueError, match="cannot be accessed from Triton"):
            noisy_topk(clean, clean, eps, 2, False)
