"""How operations reach the GPU: planned and compiled once, from then on launched with addresses.

An operation is a plan, ``plan(*arguments) -> Plan``: what it allocates, and the launches that fill
it. Planning, and Triton's own choice of a compiled kernel for 15 to 30 arguments, cost the host
several times what the launch itself does, and both follow from what stays the same from step to
step. So the outcome is kept, by everything that either looks at: of each tensor shape, strides,
dtype, device and whether its address is a multiple of 16, every other argument, and the settings
read on the way; numbers that change from step to step are handed on as addresses are. A call that
finds its key allocates and launches; any other, and each one while kernels are interpreted or
``JITFunction.run`` is replaced, plans and lets Triton choose.

What is kept holds no tensor. Nothing here waits for the device, so launches may be captured.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from triton.runtime import driver
from triton.runtime.jit import JITFunction

INTERPRETED = triton.knobs.runtime.interpret
KEPT = 1024  # calls of an operation that are kept; each takes some kilobytes
# What the dispatcher passes on as it is: no subclass of a tensor, no symbolic number.
_PLAIN = frozenset((Tensor, Parameter, torch.dtype, bool, int, float, type(None)))
_MISSED = object()
# FRAGMENT: every kernel file adds its own operations to the one namespace.
_LIBRARY = torch.library.Library("hubpath_fast", "FRAGMENT")
_TRITONS_RUN = JITFunction.run  # whoever replaces it gets every launch: tests, bench.precompile


class Launch:
    """A kernel with everything it is launched with; without a device it can still be compiled.

    As in a launch of Triton's, ``arguments`` are the kernel's by name, those in capitals its
    constants (``values``), and num_warps and the like (``options``).
    """

    def __init__(self, kernel: Any, programs: int, **arguments: Any) -> None:
        self.kernel, self.programs = kernel, programs  # nothing runs when programs is 0
        self.values = {name: arguments.pop(name) for name in kernel.arg_names}
        self.options = arguments

    def __call__(self) -> Any:
        """Launch as Triton does, on the current device; the compiled kernel, if there is one."""
        if self.programs == 0:
            return None
        return self.kernel[(self.programs,)](**self.values, **self.options)


@dataclass
class Plan:
    """What one call of an operation does.

    Tensors in ``launches`` are the operation's arguments themselves or new and uninitialised, and
    ``results`` are new: no copies, and no views of others, for later calls allocate these by
    shape and strides. ``finish`` makes of the results what the operation returns, else they are it;
    it may keep numbers, not tensors.
    """

    results: Tensor | tuple[Tensor, ...] | None
    launches: list[Launch]
    finish: Callable[..., tuple[Tensor, ...]] | None = None

    def __call__(self) -> list[Any]:
        """Launch everything; the compiled kernels."""
        return [launch() for launch in self.launches]

    def outcome(self) -> Any:
        return self.results if self.finish is None else self.finish(*self.results)


class _Kept:
    """A plan without its tensors: what to allocate, and compiled kernels with their arguments."""

    def __init__(self, arguments: tuple, plan: Plan, compiled: list[Any], numbers: int) -> None:
        found: list[Any] = [a for a in arguments if isinstance(a, Tensor)]
        found.extend(arguments[len(arguments) - numbers :])
        given = len(found)
        results = plan.results if isinstance(plan.results, tuple) else (plan.results,)
        results = [r for r in results if r is not None]
        constants: list[Any] = []

        def source(value: Any) -> int:
            """Where a launch finds it: among what each call gives (negative: the constants)."""
            at = [i for i, own in enumerate(found) if own is value]
            if isinstance(value, Tensor):
                if value.numel() > 0 or any(value is r for r in results):
                    found.extend(() if at else (value,))
                    return at[0] if at else len(found) - 1
                value = 0  # the address of nothing
            elif at:
                return at[0]
            constants.append(value)
            return -len(constants)

        returned = [source(result) for result in results]
        assert all(at >= given for at in returned), "a result is one of the arguments"
        sources = [
            [source(launch.values[name]) for name in launch.kernel.arg_names]
            for launch in plan.launches
        ]
        device = found[0].device
        self._blanks = [
            partial(torch.empty_strided, t.shape, t.stride(), dtype=t.dtype, device=device)
            for t in found[given:]
        ]
        self._constants = constants[::-1]
        self._launches = [
            (_launcher(kernel, launch.programs), operator.itemgetter(*at))
            for launch, kernel, at in zip(plan.launches, compiled, sources, strict=True)
            if launch.programs
        ]
        self._results = [at - given for at in returned]
        self._is_tuple = isinstance(plan.results, tuple)
        self._finish = plan.finish

    def __call__(self, given: list[Any], stream: int) -> Any:
        """given: the addresses of the tensors among the arguments, then their numbers."""
        blanks = [blank() for blank in self._blanks]
        values = [*given, *[blank.data_ptr() for blank in blanks], *self._constants]
        for launch, arguments in self._launches:
            launch(stream, arguments(values))
        results = [blanks[at] for at in self._results]
        if self._finish is not None:
            return self._finish(*results)
        if self._is_tuple:
            return tuple(results)
        return results[0] if results else None


def _launcher(kernel: Any, programs: int) -> Callable[[int, tuple], None]:
    """Hands a compiled kernel to the driver, given a stream and all its arguments.

    Where nobody hooked into launches the driver is not told of any hooks: Triton's, without one,
    are empty chains that it would call twice, and write what they are told down for.
    """
    hooked, run = kernel[(programs, 1, 1)], kernel.run
    function, packed, runtime = kernel.function, kernel.packed_metadata, triton.knobs.runtime

    def launch(stream: int, arguments: tuple) -> None:
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        if getattr(enter, "calls", enter) or getattr(leave, "calls", leave):
            hooked(*arguments, stream=stream)
        else:
            run(programs, 1, 1, stream, function, packed, None, None, None, *arguments)

    return launch


class Operation:
    """Carries out a plan, see the module's docstring; the first argument is a tensor.

    ``settle(*arguments)`` gives the arguments in the layouts that the plan takes, itself where they
    are so already. ``settings()`` is what the plan reads besides its arguments. The last
    ``numbers`` arguments are floats that the plan hands to launches and looks at nowhere.
    """

    def __init__(
        self,
        plan: Callable[..., Plan],
        settle: Callable[..., tuple] | None = None,
        settings: Callable[[], Any] = bool,
        numbers: int = 0,
    ) -> None:
        self._plan, self._settle, self._settings = plan, settle, settings
        self._numbers = numbers
        self._kept: dict[tuple, _Kept] = {}

    def __call__(self, *arguments: Any) -> Any:
        found = self.kept(arguments)
        if found is not _MISSED:
            return found
        device = device_of(arguments[0])
        if device < 0 or INTERPRETED:
            return self._carry_out(self._settled(arguments))
        if device != driver.active.get_current_device():
            with torch.cuda.device(device):  # Triton launches on the current one
                return self(*arguments)
        if not _is_direct():
            return self._carry_out(self._settled(arguments))
        settled = self._settled(arguments)
        if any(a is not b for a, b in zip(settled, arguments, strict=True)):
            return self(*settled)
        key, _ = _look(arguments, driver.active, self._settings(), self._numbers)
        return self._carry_out(arguments, key)

    def kept(self, arguments: tuple) -> Any:
        """What the plan kept for these arguments gives; ``_MISSED`` where there is none to take."""
        device = device_of(arguments[0])
        if device < 0 or INTERPRETED:
            return _MISSED
        active = driver.active
        if device != active.get_current_device() or not _is_direct():
            return _MISSED
        key, given = _look(arguments, active, self._settings(), self._numbers)
        plan = self._kept.get(key)
        return _MISSED if plan is None else plan(given, active.get_current_stream(device))

    def _settled(self, arguments: tuple) -> tuple:
        return arguments if self._settle is None else self._settle(*arguments)

    def _carry_out(self, arguments: tuple, key: tuple | None = None) -> Any:
        """Plan and launch, and keep it under ``key``, if there is one."""
        if key is not None:
            # One tensor given for two arguments must not be taken for one argument used twice.
            # Nor one number, or an equal constant: each is an object of its own, to be found again.
            fixed = len(arguments) - self._numbers
            given, numbers = arguments[:fixed], arguments[fixed:]
            arguments = (
                *(a.detach() if isinstance(a, Tensor) else a for a in given),
                *(number * 1.0 for number in numbers),
            )
        plan = self._plan(*arguments)
        compiled = plan()
        if key is not None and _are_launchable(plan, compiled):
            if len(self._kept) >= KEPT:
                self._kept.clear()
            self._kept[key] = _Kept(arguments, plan, compiled, self._numbers)
        return plan.outcome()


device_of: Callable[[Tensor], int] = Tensor.get_device


def _is_direct() -> bool:
    """Whether nothing stands between an operation and Triton that has to see its launches.

    Hooks on all launches, as profilers set, do not: Triton calls them for a compiled kernel too.
    One kernel's own (``add_pre_run_hook``) is called where Triton chooses the kernel only.
    """
    if JITFunction.run is not _TRITONS_RUN:
        return False
    return getattr(triton.knobs.runtime, "add_stages_inspection_hook", None) is None


def _look(arguments: tuple, active: Any, settings: Any, numbers: int) -> tuple[tuple, list[Any]]:
    """Everything that the choice of a kernel follows from; the tensors' addresses and the numbers.

    A tensor whose memory is not what it says (negated, or all zeros without any) has a key of its
    own. Nothing is kept under it: such a tensor comes here before the dispatcher has seen it only.
    """
    knobs = triton.knobs
    mode = getattr(knobs.compilation, "instrumentation_mode", None)
    key, given = [active, settings, knobs.runtime.debug, mode], []
    fixed = len(arguments) - numbers
    for argument in arguments[:fixed]:
        if isinstance(argument, Tensor):
            pointer = argument.data_ptr()
            given.append(pointer)
            key += (
                argument.shape,
                argument.stride(),
                argument.dtype,
                argument.get_device(),
                pointer % 16 == 0 if pointer and not argument.is_neg() else None,
            )
        else:
            key.append(argument)
    given += arguments[fixed:]
    return tuple(key), given


def _are_launchable(plan: Plan, compiled: list[Any]) -> bool:
    """A hook may have kept Triton from compiling: it then launches nothing, and gives None."""
    pairs = zip(plan.launches, compiled, strict=True)
    return all(launch.programs == 0 or kernel is not None for launch, kernel in pairs)


def register(
    schema: str,
    plan: Callable[..., Plan],
    fake: Callable,
    settle: Callable[..., tuple] | None = None,
    settings: Callable[[], Any] = bool,
    numbers: int = 0,
) -> Any:
    """Define ``hubpath_fast::<schema>``, carried out by ``plan`` and traced through ``fake``.

    Derivatives come from a ``torch.autograd.Function`` around the operation: this costs about
    half of what ``torch.library.custom_op`` with ``register_autograd`` does per call, and still
    passes ``opcheck`` and compiles without a graph break. Returns the callable operation, which
    goes through torch's dispatcher only for who could tell: it takes a third of a call.
    """
    name, operation = schema.split("(", 1)[0], Operation(plan, settle, settings, numbers)
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"hubpath_fast::{name}", fake, lib=_LIBRARY)
    dispatched = getattr(torch.ops.hubpath_fast, name).default

    def call(*arguments: Any) -> Any:
        if _is_watched() or not _PLAIN.issuperset(map(type, arguments)):
            return dispatched(*arguments)
        found = operation.kept(arguments)
        if found is not _MISSED:
            return found
        if any(isinstance(a, Tensor) and _needs_dispatch(a) for a in arguments):
            return dispatched(*arguments)
        return operation(*arguments)

    return call


def _is_traced() -> bool:
    """Whether operations are recorded, by torch.compile or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


def _is_watched() -> bool:
    """Whether anyone has to see the operation itself: a mode, a transform, a profiler or a trace.
    (``ExecutionTraceObserver`` would like to, too, and cannot be asked for.)"""
    return (
        _is_traced()  # first: torch.compile cannot trace the others
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._ops._len_torch_dispatch_stack_pre_dispatch() > 0
        or torch._C._are_functorch_transforms_active()
        or torch.autograd.profiler._is_profiler_enabled
    )


def _needs_dispatch(tensor: Tensor) -> bool:
    """Whether its memory is not what it says: negated, all zeros without any, or none at all."""
    return tensor.is_neg() or tensor._is_zerotensor() or tensor.is_meta


class _NothingKept:
    """Stands for an autograd function's context where no backward will follow."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply``, or its forward alone if nothing needs a gradient: half the host's time.

    Forward-mode derivatives and function transforms are left to ``apply``, which refuses them.
    """
    if torch.is_grad_enabled():
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.requires_grad:
                return function.apply(*arguments)
    if (
        _is_traced()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    ):
        return function.apply(*arguments)
    return function.forward(_NothingKept(), *arguments)


def once_differentiable(backward: Callable) -> Callable:
    """torch's, which is needed where gradients of gradients are recorded: only there it is paid.

    There every gradient refuses another derivative. Torch's would refuse where incoming gradients
    have one alone, and give none, silently, right behind the mean of a loss: these are numbers.
    """
    refusing = torch.autograd.function.once_differentiable(backward)

    @wraps(backward)
    def called(ctx: Any, *gradients: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *gradients)
        if not _is_traced():
            gradients = tuple(g if g is None else g.detach().requires_grad_() for g in gradients)
        return refusing(ctx, *gradients)

    return called
