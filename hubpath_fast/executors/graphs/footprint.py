"""How much memory a captured module will need: what autograd keeps of an eager run, in bytes.

A captured size holds the activations that its backward reads for as long as its graphs live, and
they grow with the rows. An eager run that is on its way anyway tells how fast: each tensor that
autograd saves passes through a hook, which remembers the memory that it lies in.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


class Footprint:
    """``with Footprint(module, rows) as kept: module(rows)``; then ``kept.nbytes``.

    nbytes: of all that autograd still keeps at the end of the block, memory that several tensors
    share counted once. Not the module's parameters and buffers, nor the rows, which are there
    anyway; nor autocast's copies of the parameters, which do not grow with the rows. Not seen: what
    a function keeps of its own accord (``ctx.x = x``), sparse tensors, and what passes through
    hooks that the module sets itself (checkpoints keep nothing there but their inputs).

    The results of the run, and of its backward pass, are what they would be without it. It is for
    an occasional run: each saved tensor costs the host some microseconds.

    rows: [n, ...], of which the first dimension tells a copy of a parameter from an activation.
    """

    def __init__(self, module: nn.Module, rows: Tensor):
        tensors = [*module.parameters(), *module.buffers(), rows]
        self._known = {_address(tensor) for tensor in tensors if tensor.layout == torch.strided}
        self._shapes = {(tuple(sorted(p.shape)), p.dtype) for p in module.parameters()}
        self._count = len(rows)
        self._saved: list[weakref.ref[Tensor]] = []
        self._hooks = saved_tensors_hooks(self._pack, _unpack)
        self.nbytes = 0

    def __enter__(self) -> Footprint:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
        # What was dropped meanwhile, such as an output that nothing used, is kept by nobody.
        kept = (t.untyped_storage() for saved in self._saved if (t := saved()) is not None)
        self.nbytes = sum({memory.data_ptr(): memory.nbytes() for memory in kept}.values())
        self._saved.clear()

    def _pack(self, tensor: Tensor) -> tuple[Tensor, int]:
        packed = tensor.detach()  # itself would keep the graph alive that it is saved in
        if (
            tensor.layout == torch.strided
            and _address(tensor) not in self._known
            and not self._is_cast(tensor)
        ):
            self._saved.append(weakref.ref(packed))
        return packed, tensor._version

    def _is_cast(self, tensor: Tensor) -> bool:
        """Whether it is a parameter, perhaps transposed, in another precision."""
        if tensor.dim() and len(tensor) == self._count:
            return False
        shape = tuple(sorted(tensor.shape))
        return any(shape == own and tensor.dtype != dtype for own, dtype in self._shapes)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    tensor, version = packed
    if tensor._version != version:  # torch does not look where there are hooks
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace "
            f"operation: {list(tensor.shape)} is at version {tensor._version}, expected {version}"
        )
    return tensor
