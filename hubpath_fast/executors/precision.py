"""Rows in autocast's precision, where every expert would cast them to it first of all.

Under autocast a network that begins with a convolution or a linear layer casts its float32 input.
Rows that are gathered in that precision have the same bits, since each is rounded once from float32
either way; they are half the bytes, and the experts' casts fall away. A network that does something
else first (resizes its input, normalises it) would see other values. Which it is is not guessed: in
an expert's first call every operation on its rows is watched, and again after its modules or hooks
have changed. What is not seen: code that asks its input for its dtype, or a setting that is changed
later and makes another operation the first.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import functional as HF
from .structure import Structure
from .torch_private import is_compiled


class RowPrecision:
    """What is known of experts: whether all that they do with their rows is to cast them."""

    def __init__(self):
        self._known: WeakKeyDictionary[nn.Module, _Known] = WeakKeyDictionary()

    def __reduce__(self):
        return RowPrecision, ()  # of other modules, nothing is known

    def rows_dtype(
        self, experts: Sequence[nn.Module], x: Tensor, dtype: torch.dtype
    ) -> torch.dtype:
        """The dtype to gather rows of ``x`` in, which the experts would get as ``dtype``."""
        target = HF.autocast_dtype(x.device.type)
        if (
            target is None
            or dtype != torch.float32
            or (x.requires_grad and torch.is_grad_enabled())
        ):
            return dtype
        known = map(self._known.get, experts)
        pairs = zip(experts, known, strict=True)
        if all(of is not None and of.only_casts(e.training, target) for e, of in pairs):
            return target
        return dtype

    @contextlib.contextmanager
    def watch(self, expert: nn.Module, rows: Tensor) -> Iterator[None]:
        """Around a call of ``expert`` on ``rows``: looks at what it does with them, once."""
        target = HF.autocast_dtype(rows.device.type)
        if target is None or rows.dtype != torch.float32 or torch.compiler.is_compiling():
            yield
            return
        known = self._known.get(expert)
        if known is None or not known.holds():
            known = self._known[expert] = _Known(expert)
        if (expert.training, target) in known.answers:
            yield
        elif is_compiled(expert):  # what a compiler made of it cannot be watched
            known.answers[expert.training, target] = False
            yield
        else:
            watch = _Watch(rows, target)
            with watch:
                yield
            known.answers[expert.training, target] = watch.casts and not watch.others


class _Known:
    """Of one expert. answers: by training mode and precision, whether it only casts its rows."""

    def __init__(self, expert: nn.Module):
        modules = list(expert.modules())
        self._structure = Structure(modules)
        self._hooks = [module._forward_pre_hooks for module in modules]
        self._hooked = list(map(len, self._hooks))
        self.answers: dict[tuple[bool, torch.dtype], bool] = {}

    def holds(self) -> bool:
        return self._structure.unchanged() and self._hooked == list(map(len, self._hooks))

    def only_casts(self, training: bool, target: torch.dtype) -> bool:
        return self.answers.get((training, target), False) and self.holds()


class _Watch(TorchDispatchMode):
    """casts: whether the rows were cast to ``target``; others: what else was done with them."""

    def __init__(self, rows: Tensor, target: torch.dtype):
        super().__init__()
        self._memory, self._target = rows.untyped_storage().data_ptr(), target
        self.casts, self.others = False, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not func.is_view and any(map(self._reads, tree_leaves((args, kwargs)))):
            if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") == self._target:
                self.casts = True
            else:
                self.others = True
        return func(*args, **kwargs)

    def _reads(self, value: object) -> bool:
        return (
            isinstance(value, Tensor)
            and value.layout == torch.strided
            and value.untyped_storage().data_ptr() == self._memory
        )
