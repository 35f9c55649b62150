"""What a network gives for images, in evaluation and in training mode, found without changing it.

A network is run on torch's meta device, which computes shapes only. One whose numbers decide what
it does, or that holds tensors which are neither parameters nor buffers, is run on its own device.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

IN_TRAINING = 2  # images: BatchNorm in training refuses a single value a channel


def output_refusal(
    module: nn.Module, expected: Sequence[int], size: int, training: bool = False
) -> str | None:
    """Why a module does not map images [n, 3, size, size] to one floating-point tensor
    [n, *expected] in evaluation or in training mode; None: it does.

    The module stays as it is, its statistics, its modes and its own attributes included, and so do
    the random generators.
    """
    n = IN_TRAINING if training else 1
    try:
        output, _ = run_once(module, n, size, training)
    except Exception as error:  # each architecture has its own way to refuse
        reason = str(error) or type(error).__name__
        return f"in training mode: {reason}" if training else reason
    mode = " in training mode" if training else ""
    if not isinstance(output, Tensor):
        return (
            f"its output{mode} is {describe(output)}, and the task needs one tensor{_way(module)}"
        )
    if tuple(output.shape) != (n, *expected):
        one = output.shape[:1] == (n,)
        found, wanted = list(output.shape), [n, *expected]
        many = "an image" if one else f"a batch of {n}"
        return f"its output for {many}{mode} is {found[one:]}, and the task needs {wanted[one:]}"
    if not output.is_floating_point():
        return f"its output{mode} is {output.dtype}, and the task needs floating-point numbers"
    return None


def _way(module: nn.Module) -> str:
    """How a network that gives several outputs is made to give one."""
    wrap = "wrap it in a module that returns the one that counts"
    if hasattr(module, "aux_logits"):
        return f": build it with aux_logits=False, or {wrap}"
    if hasattr(module, "set_distilled_training"):
        return f": call its set_distilled_training(False), or {wrap}"
    return f": {wrap}"


def describe(output: Any) -> str:
    """An output in words: "[2, 5]", "a tuple of [2, 5], [2, 5]", "a dict of 'out' [2, 5]"."""
    if isinstance(output, Tensor):
        return str(list(output.shape))
    if output is None:
        return "None"
    kind = type(output).__name__
    article = "an" if kind[:1] in "AEIOUaeiou" else "a"
    if isinstance(output, Mapping):
        parts = [f"{key!r} {describe(value)}" for key, value in output.items()]
    elif hasattr(output, "_fields"):  # a named tuple
        pairs = zip(output._fields, output, strict=True)
        parts = [f"{name} {describe(value)}" for name, value in pairs]
    elif isinstance(output, (tuple, list)):
        parts = [describe(value) for value in output]
    elif dataclasses.is_dataclass(output):
        names = [field.name for field in dataclasses.fields(output)]
        parts = [f"{name} {describe(getattr(output, name))}" for name in names]
    else:
        return f"{article} {kind}"
    return f"{article} {kind} of {', '.join(parts) or 'nothing'}"


@torch.no_grad()
def run_once(
    module: nn.Module,
    n: int,
    size: int,
    training: bool = False,
    watch: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> tuple[Any, Any]:
    """What a module gives for grey images [n, 3, size, size], and what ``watch()`` gave as the
    context in which it was run. The module stays as it is.

    Raises whatever the module does.
    """
    tensors = [*module.parameters(), *module.buffers()]
    devices = {tensor.device for tensor in tensors}
    with _generators_kept(devices):
        if torch.device("meta") in devices:
            images = torch.empty(n, 3, size, size, device="meta")
            with watch() as watched:
                return _run(module, {}, images, training), watched
        # The meta device lets some operations mix precisions that no other mixes.
        plain = all(t.dtype == torch.float32 for t in tensors if t.is_floating_point())
        if plain:
            # The module's own exceptions, or for want of numbers.
            with contextlib.suppress(Exception), watch() as watched:
                images = torch.empty(n, 3, size, size, device="meta")
                return _run_copy(module, images, training), watched
        device = next(iter(devices), torch.device("cpu"))
        images = torch.full((n, 3, size, size), 0.5, device=device)
        with watch() as watched:
            return _run_copy(module, images, training), watched


def _run_copy(module: nn.Module, images: Tensor, training: bool) -> Any:
    """Runs a copy, on the images' device; where there can be none, the module on other tensors."""
    named, twins = _twins(module, images.device)
    try:
        module = copy.deepcopy(module, {id(t): twins[name] for name, t in named.items()})
    except Exception:  # a tensor that is computed from others, a lock, an open file
        return _run(module, twins, images, training)
    return _run(module, {}, images, training)


def copy_to(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy on another device; on meta it costs no memory. Raises what copying it raises."""
    named, twins = _twins(module, device)
    return copy.deepcopy(module, {id(t): twins[name] for name, t in named.items()})


def _twins(module: nn.Module, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A module's parameters and buffers, and copies of them on a device, by name."""
    named = dict([*module.named_parameters(), *module.named_buffers()])
    twins = {}
    for name, tensor in named.items():
        twin = tensor.detach().to(device, copy=True)
        parameter = isinstance(tensor, nn.Parameter)
        twins[name] = nn.Parameter(twin, tensor.requires_grad) if parameter else twin
    return named, twins


def _run(module: nn.Module, tensors: Mapping[str, Tensor], images: Tensor, training: bool) -> Any:
    modes = [(part, part.training) for part in module.modules()]
    module.train(training)
    try:
        return torch.func.functional_call(module, dict(tensors), (images,))
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def _generators_kept(devices: set[torch.device]) -> Iterator[None]:
    """Within, Python's, numpy's and torch's generators may be used; after it they are as before."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([d for d in devices if d.type == "cuda"]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
