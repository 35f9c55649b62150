"""One expert at one size as captured graphs: forward, and in training backward.

Traps that the code below is about:

- Warming up and capturing run the expert: BatchNorm's buffers and the random state are put back.
- A captured backward must not reach the live parameters: the node that accumulates a parameter's
  gradient may be alive on another stream (DistributedDataParallel keeps it, and so does a loss that
  the training loop keeps), and to wait for that stream would end the capture. The expert is
  captured with stand-ins for its parameters, on the same memory.
- The gradients that a captured backward leaves are overwritten by the next replay, and autograd may
  take a gradient it is given as it is: they are copied, once.
- All sizes of an expert share one memory pool, and with it the memory of their activations and
  gradients; they share their input, too. A second forward before the backward of the first would
  overwrite all that: ``Pool.busy`` says when the caller must run eagerly, and a backward that comes
  too late raises.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .autograd_graph import leaves_of
from .backend import Backend


class _Pending:
    """Lives as long as a forward's activations are needed: until its backward, or its end."""


class Pool:
    """What all graphs of one expert share: the memory of their activations and gradients."""

    def __init__(self, handle: object):
        self.handle = handle
        self.memory = 0  # bytes
        self.generation = 0
        self._pending: weakref.ref | None = None

    @property
    def busy(self) -> bool:
        """Whether a forward waits for its backward. One whose output was dropped does not."""
        return self._pending is not None and self._pending() is not None

    def claim(self) -> _Pending:
        self.generation += 1
        pending = _Pending()
        self._pending = weakref.ref(pending)
        return pending


class CapturedExpert:
    """Graphs of ``expert`` at one size. Call it with at most that many rows, while not ``busy``.

    Made without gradients, or of an expert without any, it is the forward alone.

    rows: some that it is warmed up with. inputs: [size, ...], which it reads from then on; rows
    that it is called with are copied there, if they are not there already.
    draws: whether the expert draws random numbers.
    """

    def __init__(
        self, expert: nn.Module, rows: Tensor, inputs: Tensor, pool: Pool, backend: Backend
    ):
        self.pool, self.size = pool, len(inputs)
        enabled = torch.is_grad_enabled()
        with (
            torch.inference_mode(False),  # its tensors are written outside of it, too
            torch.set_grad_enabled(enabled),
            backend.undisturbed(),
            # Some experts keep statistics in parameters, or write to their weights.
            _untouched([*expert.buffers(), *expert.parameters(), inputs.data], backend),
            _own_casts(rows.device.type),
        ):
            self._capture(expert, rows, inputs, backend)
        pool.memory = backend.memory(pool.handle)

    def _capture(self, expert: nn.Module, rows: Tensor, inputs: Tensor, backend: Backend) -> None:
        self._input = inputs.data  # detach() would count others' writes to their places as its own
        self._fill(rows.detach())
        self._input.requires_grad_(rows.requires_grad)
        self.parameters = [p for p in expert.parameters() if p.requires_grad]
        aliases = [nn.Parameter(p.detach()) for p in self.parameters]
        stand_ins = dict(zip(self.parameters, aliases, strict=True))
        leaves = [self._input] * rows.requires_grad + aliases

        def run() -> Tensor:
            with _replaced(expert, stand_ins):
                output = expert(self._input)
            if not isinstance(output, Tensor):
                raise TypeError(f"gives a {type(output).__name__}, not a tensor")
            return output

        def gradients(output: Tensor, d_output: Tensor) -> list[Tensor | None]:
            # A backward pass is run outside of autocast, whatever its forward pass was. It may call
            # the expert again: checkpoints do.
            with _replaced(expert, stand_ins), torch.autocast(output.device.type, enabled=False):
                return list(torch.autograd.grad(output, leaves, d_output, allow_unused=True))

        def warm() -> None:
            output = run()
            if output.requires_grad:
                _check_leaves(output, leaves)
                gradients(output, torch.zeros_like(output))

        state = backend.random_state()
        backend.warm_up(warm)
        self.draws = not torch.equal(state, backend.random_state())
        for alias, parameter in zip(aliases, self.parameters, strict=True):
            if alias.data_ptr() != parameter.data_ptr():
                raise TypeError("moves its parameters to other memory")
        kept: dict[str, Tensor] = {}

        def forward() -> list[Tensor]:
            kept["output"] = run()
            return [kept["output"]]

        self._forward = backend.capture(forward, self.pool.handle)
        output = kept["output"]
        self._output = output.detach()
        self._backward = None
        if not output.requires_grad:
            return
        self._d_output = torch.zeros_like(self._output)
        found: list[Tensor | None] = []

        def backward() -> list[Tensor | None]:
            found[:] = gradients(kept["output"], self._d_output)
            return list(found)

        self._backward = backend.capture(backward, self.pool.handle)
        # The memory of activations and gradients goes back to the pool, for the other sizes. The
        # gradients are read right after a replay, before another one can overwrite them.
        self._gradients = [None if g is None else backend.borrow(g) for g in found]
        self._leaves = [self._input] * rows.requires_grad + self.parameters
        kept.clear()
        found.clear()

    def __call__(self, rows: Tensor) -> Tensor:
        if self._backward is None:
            self._replay_forward(rows)
            return self._output[: len(rows)].clone()
        return _Replay.apply(self, rows, *self.parameters)

    def _replay_forward(self, rows: Tensor) -> None:
        self._fill(rows)
        self._forward()

    def _replay_backward(self, d_output: Tensor) -> list[Tensor | None]:
        """The gradients of the rows, if they require one, and of the parameters: copies."""
        self._d_output[: len(d_output)].copy_(d_output)
        self._d_output[len(d_output) :].zero_()  # padded rows give no gradient
        self._backward()
        copies = [
            None if gradient is None else torch.empty_like(leaf)
            for gradient, leaf in zip(self._gradients, self._leaves, strict=True)
        ]
        if any(copy is not None for copy in copies):
            torch._foreach_copy_(
                [copy for copy in copies if copy is not None],
                [gradient for gradient in self._gradients if gradient is not None],
            )
        return copies

    def _fill(self, rows: Tensor) -> None:
        """The rows, then the first of them again: what is finite for a row is so for its copy."""
        with torch.no_grad():
            static = self._input.detach()
            if rows.data_ptr() != static.data_ptr():
                static[: len(rows)].copy_(rows)
            if len(rows) < self.size:
                static[len(rows) :].copy_(rows[:1].expand(self.size - len(rows), *rows.shape[1:]))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured: CapturedExpert, rows: Tensor, *parameters: Tensor) -> Tensor:
        ctx.captured, ctx.count, ctx.wants_rows = captured, len(rows), rows.requires_grad
        ctx.pending = captured.pool.claim()
        ctx.generation = captured.pool.generation
        captured._replay_forward(rows)
        return captured._output[: len(rows)].clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_output: Tensor):
        captured = ctx.captured
        # A captured backward overwrites activations that it no longer needs, as a forward does.
        if ctx.pending is None or ctx.generation != captured.pool.generation:
            raise RuntimeError(
                "a second backward through the same forward of a captured expert: its activations "
                'are gone; use executor="sequential" for such training'
            )
        found = captured._replay_backward(d_output)
        ctx.pending = None
        d_rows = found.pop(0) if ctx.wants_rows else None
        return None, None if d_rows is None else d_rows[: ctx.count], *found


@contextlib.contextmanager
def _replaced(expert: nn.Module, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Within, the expert's modules hold the stand-ins of its parameters."""
    modules = list(expert.modules())
    places = [
        (module, name, parameter)
        for module in modules
        for name, parameter in module._parameters.items()
        if parameter in stand_ins
    ]
    recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
    references = [layer._flat_weight_refs for layer in recurrent]
    try:
        for module, name, parameter in places:
            setattr(module, name, stand_ins[parameter])  # not its dict: recurrent layers keep lists
        for layer in recurrent:  # or they take the weights to have changed, and move them
            layer._flat_weight_refs = [
                w if w is None else weakref.ref(w) for w in layer._flat_weights
            ]
        yield
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)
        for layer, kept in zip(recurrent, references, strict=True):
            layer._flat_weight_refs = kept


def _check_leaves(output: Tensor, leaves: list[Tensor]) -> None:
    own = {id(leaf) for leaf in leaves}
    for leaf in leaves_of(output):
        if id(leaf) not in own:
            raise TypeError(
                f"uses a tensor {list(leaf.shape)} that requires a gradient and is not one of its "
                "parameters"
            )


@contextlib.contextmanager
def _untouched(tensors: list[Tensor], backend: Backend) -> Iterator[None]:
    """The tensors (rows may lie in the inputs already) and the random state are afterwards as they
    were."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    state = backend.random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                # Not the tensor itself: its version would end the backward pass of a forward that
                # was run before, and that keeps it (as BatchNorm does its running statistics).
                tensor.data.copy_(value)
        backend.set_random_state(state)


@contextlib.contextmanager
def _own_casts(device: str) -> Iterator[None]:
    """Autocast's casts of the weights are part of the graph: replays cast the updated weights."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)
