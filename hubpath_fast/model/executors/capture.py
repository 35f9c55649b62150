"""One expert at one size as captured graphs: forward, and in training backward.

Traps that the code below is about:

- Warming up and capturing run the expert: BatchNorm's buffers and the random state are put back.
- The gradients that a captured backward leaves lie in buffers that the next replay overwrites, and
  autograd may take a gradient it is given as it is: they are copied.
- All sizes of an expert share one memory pool, and with it the memory of their activations; they
  share their input and their gradients, too. A second forward before the backward of the first
  would overwrite all that: ``Pool.busy`` says when the caller must run eagerly, and a backward that
  comes too late raises.
"""

from __future__ import annotations

import contextlib
import math
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from .backend import Backend


class _Pending:
    """Lives as long as a forward's activations are needed: until its backward, or its end."""


class Pool:
    """What all graphs of one expert share: the memory of their activations, and the gradients."""

    def __init__(self, handle: object):
        self.handle = handle
        self.memory = 0  # bytes
        self.gradients: Gradients | None = None
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


class Gradients:
    """Where captured backwards leave an expert's gradients: one buffer for each dtype.

    So that handing them out is one copy, not one for each of hundreds of parameters.
    """

    ALIGN = 64  # elements: vectorised optimizers want their gradients aligned

    def __init__(self, parameters: Sequence[Tensor]):
        ends: dict[torch.dtype, int] = {}
        self._parts = []
        for parameter in parameters:
            dtype, begin = parameter.dtype, ends.get(parameter.dtype, 0)
            dense = torch.empty_like(parameter, device="meta")  # strides without gaps
            self._parts.append((dtype, dense.shape, dense.stride(), begin))
            ends[dtype] = begin + math.ceil(dense.numel() / self.ALIGN) * self.ALIGN
        device = parameters[0].device
        self._buffers = {d: torch.zeros(end, dtype=d, device=device) for d, end in ends.items()}
        self._views = self._views_of(self._buffers)

    def _views_of(self, buffers: dict[torch.dtype, Tensor]) -> list[Tensor]:
        return [buffers[d].as_strided(shape, stride, at) for d, shape, stride, at in self._parts]

    def write(self, found: Sequence[Tensor | None]) -> None:
        """Takes the gradients of the parameters, in their order; None leaves a place as it is."""
        pairs = [(view, g) for view, g in zip(self._views, found, strict=True) if g is not None]
        if pairs:
            torch._foreach_copy_(*map(list, zip(*pairs, strict=True)))

    def fresh(self) -> list[Tensor]:
        """A copy of them, for each parameter: views of new buffers."""
        return self._views_of({dtype: flat.clone() for dtype, flat in self._buffers.items()})


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
            _untouched([*expert.buffers(), inputs.data], backend),
            _own_casts(rows.device.type),
        ):
            before = backend.memory()
            self._capture(expert, rows, inputs, backend)
            pool.memory += max(0, backend.memory() - before)

    def _capture(self, expert: nn.Module, rows: Tensor, inputs: Tensor, backend: Backend) -> None:
        self._input = inputs.data  # detach() would count others' writes to their places as its own
        self._fill(rows.detach())
        self._input.requires_grad_(rows.requires_grad)
        self.parameters = [p for p in expert.parameters() if p.requires_grad]
        leaves = [self._input] * rows.requires_grad + self.parameters

        def run() -> Tensor:
            output = expert(self._input)
            if not isinstance(output, Tensor):
                raise TypeError(f"gives a {type(output).__name__}, not a tensor")
            return output

        def gradients(output: Tensor, d_output: Tensor) -> list[Tensor | None]:
            # A backward pass is run outside of autocast, whatever its forward pass was.
            with torch.autocast(output.device.type, enabled=False):
                return list(torch.autograd.grad(output, leaves, d_output, allow_unused=True))

        def warm() -> None:
            output = run()
            if output.requires_grad:
                gradients(output, torch.zeros_like(output))

        state = backend.random_state()
        backend.warm_up(warm)
        self.draws = not torch.equal(state, backend.random_state())
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
        if self.pool.gradients is None and self.parameters:
            self.pool.gradients = Gradients(self.parameters)
        self._gradients = self.pool.gradients
        self._d_output = torch.zeros_like(self._output)
        self._d_input: list[Tensor] = []

        def backward() -> list[Tensor]:
            found = gradients(kept["output"], self._d_output)
            # These are kept: an expert's rows seldom require a gradient. The rest is freed.
            self._d_input = [g for g in found[: rows.requires_grad] if g is not None]
            own = found[rows.requires_grad :]
            self._given = [g is not None for g in own]
            if own:
                self._gradients.write(own)
            return self._d_input

        self._backward = backend.capture(backward, self.pool.handle)
        kept.clear()  # the activations' memory goes back to the pool, for the other sizes

    def __call__(self, rows: Tensor) -> Tensor:
        if self._backward is None:
            self._replay_forward(rows)
            return self._output[: len(rows)].clone()
        return _Replay.apply(self, rows, *self.parameters)

    def _replay_forward(self, rows: Tensor) -> None:
        self._fill(rows)
        self._forward()

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
        ctx.captured, ctx.count = captured, len(rows)
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
        captured._d_output[: ctx.count].copy_(d_output)
        captured._d_output[ctx.count :].zero_()  # padded rows give no gradient
        captured._backward()
        ctx.pending = None
        d_rows = captured._d_input[0][: ctx.count].clone() if captured._d_input else None
        fresh = captured._gradients.fresh() if captured.parameters else []
        given = zip(fresh, captured._given, strict=True)
        return None, d_rows, *(grad if there else None for grad, there in given)


@contextlib.contextmanager
def _untouched(tensors: list[Tensor], backend: Backend) -> Iterator[None]:
    """Buffers, inputs (rows may lie there already) and random state are afterwards as they were."""
    kept = [(tensor, tensor.clone()) for tensor in tensors]
    state = backend.random_state()
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)
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
