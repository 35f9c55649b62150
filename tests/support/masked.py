"""Modules with padded rows beside the same modules on exactly their rows."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hubpath_fast import functional as HF
from hubpath_fast.executors.graphs.masked import masked

JUNK = 1e3  # of padded rows, beside rows of about 1


class Run(NamedTuple):
    """What a step of a module gave: for its rows, of its parameters, in its buffers."""

    outputs: Tensor
    gradients: dict[str, Tensor | None]
    buffers: dict[str, Tensor]


def padded(x: Tensor, capacity: int, junk: bool) -> Tensor:
    """x, then copies of its first row as graphs pad, or numbers of no meaning."""
    more = capacity - len(x)
    last = JUNK * torch.randn(more, *x.shape[1:], dtype=x.dtype, device=x.device) if junk else x[:1]
    return torch.cat([x, last.expand(more, *x.shape[1:])])


def exact_run(module: nn.Module, x: Tensor, d_output: Callable[[Tensor], Tensor]) -> Run:
    """Of a copy of the module, by its own forward on rows x."""
    own = copy.deepcopy(module)
    outputs = own(x)
    (outputs * d_output(outputs)).sum().backward()
    return _run(own, outputs)


def masked_run(
    module: nn.Module,
    x: Tensor,
    count: int,
    d_output: Callable[[Tensor], Tensor],
    fuses: bool = True,
) -> Run:
    """Of a copy of the module, on rows x of which ``count`` are valid."""
    own = copy.deepcopy(module)
    with masked(own, torch.tensor(count, dtype=torch.int32, device=x.device), fuses):
        outputs = own(x)[:count]
        (outputs * d_output(outputs)).sum().backward()
    return _run(own, outputs)


def _run(module: nn.Module, outputs: Tensor) -> Run:
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    return Run(outputs.detach(), gradients, dict(module.named_buffers()))


def some_gradient(outputs: Tensor) -> Tensor:
    """The same for each run, and another one for each element."""
    elements = torch.arange(outputs.numel(), dtype=outputs.dtype, device=outputs.device)
    return torch.cos(elements).view_as(outputs)


def assert_same(run: Run, exact: Run, tolerance: float) -> None:
    """To within the tolerance, relative to the largest of each tensor. A gradient that is zero but
    for roundings, as that of a bias in front of BatchNorm, is held to the largest of all."""
    close(run.outputs, exact.outputs, tolerance)
    largest = max(g.abs().max() for g in exact.gradients.values() if g is not None)
    for name, gradient in exact.gradients.items():
        got = run.gradients[name]
        assert (got is None) == (gradient is None), name
        if gradient is not None:
            scale = max(gradient.abs().max(), 1e-6 * largest)
            assert (got - gradient).abs().max() <= tolerance * scale, name
    for name, buffer in exact.buffers.items():
        close(run.buffers[name], buffer, tolerance, name)


def close(got: Tensor, expected: Tensor, tolerance: float, name: str = "outputs") -> None:
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype), name
    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), name


@contextlib.contextmanager
def counted(monkeypatch) -> Iterator[Counter]:
    """Of the masked BatchNorms within: how many with each (activation, residual or not)."""
    calls, real = Counter(), HF.masked_batch_norm

    def count(*args, **kwargs):
        activation, residual = args[8], args[9]
        calls[activation, residual is not None] += 1
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(HF, "masked_batch_norm", count)
        yield calls


def stirred(module: nn.Module) -> nn.Module:
    """In float64 and training, no dropout, with weights that hide nothing: some networks start
    residual blocks at zero."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.modules.dropout._DropoutNd):
            part.p = 0.0
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return module.double().train()
