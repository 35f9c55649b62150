"""The heads of all experts as one flat tensor, for kernels that serve all of them in a launch.

Parameters stay what they are, ``expert.layer.weight`` and ``bias``, in state dicts, checkpoints and
optimizers; their memory is views of the flat tensor. That one is the leaf of autograd: hundreds of
leaves would cost the host a millisecond a step. What arrives at it is given to the parameters as
views, and an expert without rows has no gradient, as with every executor. Which experts had rows is
known on the device alone: the hook reads it, once a backward pass, unless an optimizer's steps are
those of ``updates``, which need not know.

So gradients come by ``backward()``. ``torch.autograd.grad`` finds no path to the parameters.

Letters: M experts, D_i features of expert i, C outputs, N samples, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter, is_, itemgetter
from types import ModuleType

import torch
from torch import Tensor, nn

from ..executors import RowSource
from .parts import FeatureHead
from .placing import pack, placed_features

_layer, _weight, _bias = itemgetter("layer"), itemgetter("weight"), itemgetter("bias")
_placed = attrgetter("placed")


class HeadBank:
    """The heads of these experts, moved into one tensor.

    ``flat``: all weights [C, D_i], one behind the other, then the biases [M, C]. ``touched``: int32
    [M], 1 for each expert with rows since it was set to 0. ``delivers``: whether gradients go to
    the parameters, else they stay in ``flat.grad``.

    ops: the kernels. Raises ValueError for heads that differ in C, dtype or device.
    """

    @torch.inference_mode(False)
    @torch.no_grad()
    def __init__(self, heads: Sequence[FeatureHead], ops: ModuleType):
        self.heads, self.delivers, self._ops = list(heads), True, ops
        self._layers = [head.layer for head in heads]
        self.weights = [layer.weight for layer in self._layers]
        self.biases = [layer.bias for layer in self._layers]
        first = self.weights[0]
        for i, weight in enumerate(self.weights):
            for what in ("dtype", "device"):
                if getattr(weight, what) != getattr(first, what):
                    raise ValueError(
                        f"experts[{i}]: expected a head of {what} {getattr(first, what)} as the "
                        f"first, got {getattr(weight, what)}; move all experts with model.to()"
                    )
            if len(weight) != len(first):
                raise ValueError(
                    f"experts[{i}]: expected {len(first)} outputs as of the first, got "
                    f"{len(weight)}; all experts need the same C"
                )
        self.flat = torch.cat([p.detach().flatten() for p in (*self.weights, *self.biases)])
        self._parameters = (*self.weights, *self.biases)
        for p, view in zip(self._parameters, self.views(self.flat), strict=True):
            p.data = view
        self._addresses = [p.data_ptr() for p in self._parameters]
        self._modules = [head._modules for head in heads]
        self._held = [layer._parameters for layer in self._layers]
        self.features = placed_features(heads, first.device)
        self._placed = [head.placed for head in heads]
        starts = [0] * len(heads)
        if self.features is not None:
            starts = [head.placed.storage_offset() for head in heads]
        widths = [weight.shape[1] for weight in self.weights]
        self._host_table = ops.head_table(starts, widths, len(first))
        self.table = self._host_table._replace(table=self._host_table.table.to(first.device))
        self.touched = torch.zeros(len(heads), dtype=torch.int32, device=first.device)
        self.flat.requires_grad_().register_post_accumulate_grad_hook(self._deliver)

    def holds(self, experts: Sequence[nn.Module]) -> bool:
        """Whether it is of these experts, as they are now."""
        # Hundreds of experts, at every step: all of it without a step of the interpreter for each.
        own = experts._modules.values() if isinstance(experts, nn.ModuleList) else experts
        return (
            len(own) == len(self.heads)
            and all(map(is_, own, self.heads))
            and all(map(is_, map(_layer, self._modules), self._layers))
            and all(map(is_, map(_weight, self._held), self.weights))
            and all(map(is_, map(_bias, self._held), self.biases))
            and all(map(is_, map(_placed, self.heads), self._placed))
            and self.is_in_place
        )

    @property
    def is_in_place(self) -> bool:
        """Whether the memory of all parameters is still that of ``flat``."""
        return list(map(Tensor.data_ptr, self._parameters)) == self._addresses

    def views(self, flat: Tensor) -> list[Tensor]:
        """Of a tensor like ``flat``: the part of each weight, then that of each bias."""
        shapes = [p.shape for p in self._parameters]
        parts = flat.split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def outputs(self, source: RowSource) -> Tensor:
        """[R, C] of the rows of a batch of numbers [N]."""
        routing, features, numbers = source.routing, self.features, source.x
        table = self.table
        if features is None:
            host = self._host_table
            features, packed = pack(self.heads, host.table, host.vec, source.x, routing)
            numbers, table = None, table._replace(table=packed)
        trained = torch.is_grad_enabled() and any(p.requires_grad for p in self._parameters)
        return self._ops.feature_heads(
            self.flat if trained else self.flat.detach(),
            features,
            numbers,
            routing.rows,
            routing.offsets,
            routing.k,
            table,
            self.touched,
        )

    @torch.no_grad()
    def _deliver(self, flat: Tensor) -> None:
        if not self.delivers:
            return
        gradient, flat.grad = flat.grad, None
        touched = self.touched.tolist()
        self.touched.zero_()
        parameters = zip(self._parameters, self.views(gradient), strict=True)
        for (p, view), has_rows in zip(parameters, 2 * touched, strict=True):
            if has_rows and p.requires_grad:
                p.grad = view if p.grad is None else p.grad.add_(view)
