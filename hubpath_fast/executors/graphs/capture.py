"""One module at one size as captured graphs: forward, and in training backward.

Traps that the code below is about:

- Warming up and capturing run the module: BatchNorm's buffers and the random state are put back.
- A captured backward must not reach the live parameters: the node that accumulates a parameter's
  gradient may be alive on another stream (DistributedDataParallel keeps it, and so does a loss that
  the training loop keeps), and to wait for that stream would end the capture. The module is
  captured with stand-ins for its parameters, on the same memory.
- A graph keeps nothing of what it reads but memory of its own pool, and its backward may be
  replayed when the module has other weights or buffers: it reads the old ones, so they are kept.
- The gradients that a captured backward leaves are overwritten by the next replay, and autograd may
  take a gradient it is given as it is: they are copied, once, to a slab of new memory.
- All sizes of a module share one memory pool, and with it the memory of their activations and
  gradients; they share their input, too. A second forward before the backward of the first would
  overwrite all that: ``Pool.busy`` says when the caller must run eagerly, and a backward that comes
  too late raises.
- Rows that a group is padded with must not reach BatchNorm's statistics: how many are valid stands
  in memory that the graphs read, and is written before each replay.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..autograd_graph import leaves_of
from .backend import CudaBackend
from .masked import masked
from .slab import Slab


class _Pending:
    """Lives as long as a forward's activations are needed: until its backward, or its end."""


class Pool:
    """What all graphs of one module share: the memory of their activations and gradients."""

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


class CapturedModule:
    """Graphs of ``module`` at one size: of an expert, or of a generator, which gives two tensors.
    Call it with at most that many rows, while not ``busy``.

    Made without gradients, or of a module without any, it is the forward alone.

    rows: some that it is warmed up with. inputs: [size, ...], which it reads from then on; rows
    that it is called with are copied there, if they are not there already. masks, fuses: whether it
    pads a module whose layers would take statistics of all rows, and how (see ``masked``).
    draws: whether the module draws random numbers.

    Raises ValueError, when it is called too, for more rows than it has room for.
    """

    def __init__(
        self,
        module: nn.Module,
        rows: Tensor,
        inputs: Tensor,
        pool: Pool,
        backend: CudaBackend,
        masks: bool = False,
        fuses: bool = True,
    ):
        self.pool, self.size, self._fuses = pool, len(inputs), fuses
        self._count: Tensor | None = None
        enabled, kind = torch.is_grad_enabled(), rows.device.type
        with (
            torch.inference_mode(False),  # its tensors are written outside of it, too
            torch.set_grad_enabled(enabled),
            backend.undisturbed(),
            # Some experts keep statistics in parameters, or write to their weights.
            untouched([*module.buffers(), *module.parameters(), inputs.data], backend),
            # Autocast's casts of the weights are part of the graph: replays cast the updated ones.
            torch.autocast(kind, enabled=torch.is_autocast_enabled(kind), cache_enabled=False),
        ):
            if masks:
                self._count = torch.zeros((), dtype=torch.int32, device=inputs.device)
            self._capture(module, rows, inputs, backend)
        pool.memory = backend.memory(pool.handle)

    def _capture(
        self, module: nn.Module, rows: Tensor, inputs: Tensor, backend: CudaBackend
    ) -> None:
        self.inputs = inputs.data  # detach() would count others' writes to that memory as its own
        self._fill(rows.detach())
        self.inputs.requires_grad_(rows.requires_grad)
        self._read = [tensor.detach() for tensor in _tensors_of(module)]
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        aliases = [nn.Parameter(p.detach()) for p in self.parameters]
        stand_ins = dict(zip(self.parameters, aliases, strict=True))
        leaves = [self.inputs] * rows.requires_grad + aliases

        @contextlib.contextmanager
        def prepared() -> Iterator[None]:
            mask = contextlib.nullcontext()
            if self._count is not None:
                mask = masked(module, self._count, self._fuses)
            with _replaced(module, stand_ins), mask:
                yield

        def run() -> list[Tensor]:
            with prepared():
                found = module(self.inputs)
            self._single = isinstance(found, Tensor)
            outputs = [found] if self._single else found
            if not (isinstance(outputs, list | tuple) and all(map(torch.is_tensor, outputs))):
                raise TypeError(f"gives a {type(found).__name__}, not a tensor")
            return list(outputs)

        def gradients(outputs: list[Tensor], d_outputs: list[Tensor]) -> list[Tensor | None]:
            pairs = zip(outputs, d_outputs, strict=True)
            pairs = [(output, d_output) for output, d_output in pairs if output.requires_grad]
            outputs, d_outputs = zip(*pairs, strict=True)
            # A backward pass is run outside of autocast, whatever its forward pass was. It may call
            # the module again: checkpoints do.
            with prepared(), torch.autocast(rows.device.type, enabled=False):
                return list(torch.autograd.grad(outputs, leaves, d_outputs, allow_unused=True))

        def wants_gradients(outputs: list[Tensor]) -> bool:
            # Without gradients, a view of a parameter says that it requires one.
            return torch.is_grad_enabled() and any(output.requires_grad for output in outputs)

        def warm() -> None:
            outputs = run()
            if wants_gradients(outputs):
                _check_leaves(outputs, leaves)
                gradients(outputs, list(map(torch.zeros_like, outputs)))

        state = backend.random_state()
        backend.warm_up(warm)
        self.draws = not torch.equal(state, backend.random_state())
        for alias, parameter in zip(aliases, self.parameters, strict=True):
            if alias.data_ptr() != parameter.data_ptr():
                raise TypeError("moves its parameters to other memory")
        outputs: list[Tensor] = []

        def forward() -> list[Tensor]:
            outputs[:] = run()
            return list(outputs)

        self._forward = backend.capture(forward, self.pool.handle)
        self._outputs = [output.detach() for output in outputs]
        self._backward = None
        if not wants_gradients(outputs):
            return
        self._d_outputs = list(map(torch.zeros_like, self._outputs))
        found: list[Tensor | None] = []

        def backward() -> list[Tensor | None]:
            found[:] = gradients(outputs, self._d_outputs)
            return list(found)

        reached = [set(map(id, leaves_of(output))) for output in outputs]
        # For each leaf, the outputs through which a backward pass comes to it.
        paths = [[i for i, ids in enumerate(reached) if id(leaf) in ids] for leaf in leaves]
        self._paths = paths[1:] if rows.requires_grad else paths
        self._backward = backend.capture(backward, self.pool.handle)
        # The memory of activations and gradients goes back to the pool, for the other sizes. The
        # gradients are read right after a replay, before another one can overwrite them.
        self._gradients = [None if g is None else backend.borrow(g) for g in found]
        self._d_input = self._gradients.pop(0) if rows.requires_grad else None
        with_gradient = zip(self.parameters, self._gradients, strict=True)
        self._slab = Slab(parameter for parameter, g in with_gradient if g is not None)
        outputs.clear()
        found.clear()

    def __call__(self, rows: Tensor) -> Tensor | tuple[Tensor, ...]:
        if self._backward is None:
            outputs = self._replay_forward(rows)
        else:
            outputs = _Replay.apply(self, rows, *self.parameters)
        return outputs[0] if self._single else outputs

    def _replay_forward(self, rows: Tensor) -> tuple[Tensor, ...]:
        self._fill(rows)
        self._forward()
        return tuple(output[: len(rows)].clone() for output in self._outputs)

    def _replay_backward(
        self, d_outputs: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradients of the rows, if they require one, and of the parameters: copies. None for
        those to which nothing leads from an output with a gradient."""
        given = {i for i, d_output in enumerate(d_outputs) if d_output is not None}
        if not given:
            return None, [None] * len(self.parameters)
        count = next(len(d_output) for d_output in d_outputs if d_output is not None)
        for static, d_output in zip(self._d_outputs, d_outputs, strict=True):
            if d_output is None:
                static.zero_()
                continue
            static[:count].copy_(d_output)
            if count < self.size:
                static[count:].zero_()  # padded rows give no gradient
        self._backward()
        copies = self._slab.new(self.inputs.device)
        if copies:
            torch._foreach_copy_(copies, [g for g in self._gradients if g is not None])
        left = iter(copies)
        d_parameters = [None if g is None else next(left) for g in self._gradients]
        if len(given) < len(d_outputs):
            pairs = zip(d_parameters, self._paths, strict=True)
            d_parameters = [None if given.isdisjoint(path) else d for d, path in pairs]
        d_input = self._d_input
        return None if d_input is None else d_input[:count].clone(), d_parameters

    def _fill(self, rows: Tensor) -> None:
        """The rows, then the first of them again: what is finite for a row is so for its copy."""
        if len(rows) > self.size:
            raise ValueError(
                f"rows: expected at most {self.size}, which the captured module has room for, got "
                f"{len(rows)}; capture it at a larger size"
            )
        with torch.no_grad():
            if self._count is not None:
                self._count.fill_(len(rows))
            static = self.inputs.detach()
            if rows.data_ptr() != static.data_ptr():
                static[: len(rows)].copy_(rows)
            if len(rows) < self.size:
                static[len(rows) :].copy_(rows[:1].expand(self.size - len(rows), *rows.shape[1:]))


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, captured: CapturedModule, rows: Tensor, *parameters: Tensor):
        ctx.captured = captured
        ctx.set_materialize_grads(False)
        ctx.pending = captured.pool.claim()
        ctx.generation = captured.pool.generation
        return captured._replay_forward(rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_outputs: Tensor | None):
        captured = ctx.captured
        # A captured backward overwrites activations that it no longer needs, as a forward does.
        if ctx.pending is None or ctx.generation != captured.pool.generation:
            raise RuntimeError(
                "a second backward through the same forward of a captured module: its activations "
                'are gone; use executor="sequential" for such training'
            )
        d_rows, d_parameters = captured._replay_backward(d_outputs)
        ctx.pending = None
        return None, d_rows, *d_parameters


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers, and what is kept as plain attributes."""
    yield from module.parameters()
    yield from module.buffers()
    for part in module.modules():
        yield from (value for value in vars(part).values() if isinstance(value, Tensor))


@contextlib.contextmanager
def _replaced(module: nn.Module, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Iterator[None]:
    """Within, the module and its parts hold the stand-ins of its parameters."""
    parts = list(module.modules())
    slots = [
        (part, name, parameter)
        for part in parts
        for name, parameter in part._parameters.items()
        if parameter in stand_ins
    ]
    recurrent = [part for part in parts if isinstance(part, nn.RNNBase)]
    references = [layer._flat_weight_refs for layer in recurrent]
    try:
        for part, name, parameter in slots:
            setattr(part, name, stand_ins[parameter])  # not its dict: recurrent layers keep lists
        for layer in recurrent:  # or they take the weights to have changed, and move them
            layer._flat_weight_refs = [
                w if w is None else weakref.ref(w) for w in layer._flat_weights
            ]
        yield
    finally:
        for part, name, parameter in slots:
            setattr(part, name, parameter)
        for layer, kept in zip(recurrent, references, strict=True):
            layer._flat_weight_refs = kept


def _check_leaves(outputs: list[Tensor], leaves: list[Tensor]) -> None:
    own = {id(leaf) for leaf in leaves}
    for leaf in leaves_of(*outputs):
        if id(leaf) not in own:
            raise TypeError(
                f"uses a tensor {list(leaf.shape)} that requires a gradient and is not one of its "
                "parameters"
            )


@contextlib.contextmanager
def untouched(tensors: list[Tensor], backend: CudaBackend) -> Iterator[None]:
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
