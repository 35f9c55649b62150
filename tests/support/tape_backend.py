"""A stand-in for captured graphs that is as forgetful as they are.

Replays run the operations that were recorded, on the tensors that they were recorded on: what an
expert's Python code would do differently by now does not happen. And memory that the pool could
have given to another graph meanwhile is overwritten with NaN, so that reading it shows.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from support.graphs import FakeBackend


class _Tape(TorchDispatchMode):
    """The operations that compute, with their arguments and the tensors that they created: as they
    were, since views may be changed in place."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if not func.is_view:
            given = {id(tensor) for tensor in _tensors((args, kwargs))}
            created = [_as_it_is(r) for r in _tensors(results) if id(r) not in given]
            indices = [i for i, r in enumerate(_tensors(results)) if id(r) not in given]
            arguments = tree_map(_as_it_is, (args, kwargs))
            self.operations.append((func, *arguments, created, indices))
        return results


class TapeGraph:
    """What was recorded. made: the memory that it allocated. forward: of a backward pass, the graph
    whose activations it reads."""

    def __init__(self, operations, results, forward):
        self.operations, self.forward = operations, forward
        self.kept = set() if forward else {_memory(tensor) for tensor in _tensors(results)}
        self.made, given = {}, set()
        for _, args, kwargs, created, _ in operations:
            given |= {_memory(t) for t in _tensors((args, kwargs)) if _memory(t) not in self.made}
            for tensor in created:
                if tensor.is_floating_point() and _memory(tensor) not in given:
                    self.made.setdefault(_memory(tensor), tensor)

    def run(self):
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            for func, args, kwargs, created, indices in self.operations:
                again = _tensors(func(*args, **kwargs))
                for tensor, index in zip(created, indices, strict=True):
                    tensor.copy_(again[index])

    def forget(self):
        for memory, tensor in self.made.items():
            if memory not in self.kept:
                storage = tensor.untyped_storage()
                torch.empty(0, dtype=tensor.dtype).set_(storage).fill_(float("nan"))


class TapeBackend(FakeBackend):
    def __init__(self, device):
        super().__init__(device)
        self._graphs = {}  # by pool

    def capture(self, function, pool):
        self.captures += 1
        self.held[pool] += 100
        with _Tape() as tape:
            results = function()
        others = self._graphs.setdefault(pool, [])
        last = others[-1] if others else None
        # A forward that records gradients is followed by its backward.
        waiting = last is not None and last.forward is None and last.wants_backward
        graph = TapeGraph(tape.operations, results, last if waiting else None)
        graph.wants_backward = not waiting and results[0].requires_grad
        if waiting:
            last.wants_backward = False
        others.append(graph)

        def replay():
            for other in others:
                if other is not graph and other is not graph.forward:
                    other.forget()
            graph.run()
            if graph.forward is not None:
                graph.forward.forget()

        return replay


def _tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _as_it_is(value):
    return value.detach() if isinstance(value, Tensor) else value


def _memory(tensor):
    return tensor.untyped_storage().data_ptr()
