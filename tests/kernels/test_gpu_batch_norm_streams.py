"""masked_batch_norm on a GPU, given what a CPU refuses, and on several streams at once."""

from __future__ import annotations

import pytest
import torch

from hubpath_fast import functional as HF

pytestmark = pytest.mark.gpu
CAPACITY, CHANNELS = 12, 24


def layer(device, dtype=torch.float32):
    """x, weight, bias, residual, and running statistics."""
    shape = CAPACITY, CHANNELS, 7, 5
    random = torch.Generator(device).manual_seed(0)
    x, residual = (
        torch.randn(shape, generator=random, device=device)
        .to(dtype, memory_format=torch.channels_last)
        .requires_grad_()
        for _ in range(2)
    )
    weight, bias = (
        torch.randn(CHANNELS, generator=random, device=device).requires_grad_() for _ in range(2)
    )
    running = torch.zeros(CHANNELS, device=device), torch.ones(CHANNELS, device=device)
    return [x, weight, bias, residual], running


def count_of(rows, device):
    return torch.tensor(rows, dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda d: str(d)[6:])
def test_a_count_above_the_capacity_is_the_capacity(device, dtype):
    """A captured graph cannot raise; it stays within its memory."""
    found = []
    for rows in (CAPACITY, CAPACITY + 5):
        (x, weight, bias, residual), running = layer(device, dtype)
        y = HF.masked_batch_norm(
            x, count_of(rows, device), weight, bias, *running, activation="silu", residual=residual
        )
        found.append([y, *torch.autograd.grad(y.float().sum(), [x, weight, bias]), *running])
    for whole, beyond in zip(*found, strict=True):
        assert torch.equal(whole, beyond)


def test_layers_on_other_streams_do_not_meet(device):
    """Experts are concurrent: each layer's partial sums are its own."""
    layers = [layer(device) for _ in range(6)]
    counts = [count_of(3 + i, device) for i in range(6)]

    def run(index):
        leaves, running = layers[index]
        x, weight, bias, residual = leaves
        y = HF.masked_batch_norm(x, counts[index], weight, bias, *running, residual=residual)
        return [y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    expected = [run(i) for i in range(6)]
    streams = [torch.cuda.Stream() for _ in range(6)]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                found.append(run(i))
        torch.cuda.synchronize()
        for ours, right in zip(found, expected, strict=True):
            assert all(map(torch.equal, ours, right))
