"""Torch still keeps, under the names it has for itself, what is asked of it there."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from hubpath_fast.executors import torch_private


def test_modes():
    assert not torch_private.has_modes()
    for mode in (TorchFunctionMode(), TorchDispatchMode(), torch.device("cpu")):
        with mode:
            assert torch_private.has_modes()
    assert not torch_private.has_modes()


def test_function_transforms():
    seen = []
    torch.func.vmap(lambda x: seen.append(torch_private.has_function_transforms()) or x)(
        torch.ones(2)
    )
    assert (seen, torch_private.has_function_transforms()) == ([True], False)


def test_saved_tensors_hooks():
    assert not torch_private.has_saved_tensors_hooks()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        assert torch_private.has_saved_tensors_hooks()


def test_whether_a_backward_retains_its_graph():
    x, seen = torch.ones(1, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda _: seen.append(torch_private.backward_retains_graph()))
    y.backward(retain_graph=True)
    y.backward()
    assert seen == [True, False]


def test_backward_passes():
    x, seen = torch.ones(1, requires_grad=True), []
    y = x * 2
    y.register_hook(lambda _: seen.append(torch_private.in_backward()))
    y.backward()
    assert (seen, torch_private.in_backward()) == ([True], False)


def test_compiled_modules():
    module = nn.Linear(1, 1)
    assert not torch_private.is_compiled(module)
    module.compile(backend="eager")
    assert torch_private.is_compiled(module)
