"""Launches of kept plans against Triton's own, up to where either hands them to the driver.

    python tests/kernels/direct_cases.py      # from the repository's top: fails where a case does

Triton must not be interpreting, so this is a program of its own. Nothing is run, no GPU is needed.
Every operation that a case calls is called three times: with ``JITFunction.run`` replaced, so that
it plans and Triton chooses; as it is, which may keep the plan; and again. All three must launch the
same compiled kernels, over the same grids, with the same arguments.
"""

from __future__ import annotations

import gc
import sys
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path[:0] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]
from hubpath_fast.kernels import _launch  # noqa: E402
from support import norm_cases  # noqa: E402
from support.operations import JOINING, SUPERVISED, aggregated, combined_with_loss  # noqa: E402
from support.output_cases import SMALL, SMALL_LAST, SMALL_MAPS, Case, leaves, make  # noqa: E402

from bench.stubbed import Stub, launches_end_here, planned_each_time  # noqa: E402
from hubpath_fast import kernels  # noqa: E402

CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
PAPER = Case("", n=48, c=100, c_out=100)
MANY = Case("few experts with many rows: shares", n=2000, m=2, k=1, c=40, c_out=9)


@dataclass
class Launched:
    """A launch as the driver would be given it; addresses are told apart, not kept."""

    kernel: Stub
    grid: tuple[int, ...]
    arguments: list


class Compared:
    """Carries out every operation three times, see above; ``kept`` counts those from a plan."""

    def __init__(self) -> None:
        self.launches: list[tuple] = []
        self.kept = 0

    def take(self, *launch) -> None:
        self.launches.append(launch)

    @contextmanager
    def operations(self) -> Iterator[None]:
        call, carry_out = _launch.Operation.__call__, _launch.Operation._carry_out
        planned = []

        def counted(operation, *rest):
            planned.append(operation)
            return carry_out(operation, *rest)

        def three_times(operation, *arguments):
            with replaced(JITFunction, "run", passed_on(JITFunction.run)):
                expected = self._launched(partial(call, operation), arguments)
            self._launched(partial(call, operation), arguments)
            del planned[:]
            found = self._launched(partial(call, operation), arguments)
            self.kept += not planned
            assert not planned, "planned again"
            assert found[1:] == expected[1:], f"{found[1:]}\n is not \n{expected[1:]}"
            return found[0]

        with (
            replaced(_launch.Operation, "__call__", three_times),
            replaced(_launch.Operation, "_carry_out", counted),
        ):
            yield

    def _launched(self, call: Callable, arguments: tuple) -> tuple:
        """(results, what was launched, what the results are)."""
        del self.launches[:]
        results = call(*arguments)
        tensors = results if isinstance(results, tuple) else (results,)
        tensors = [t for t in tensors if t is not None]
        names = {}
        for i, argument in enumerate(arguments):
            if isinstance(argument, Tensor) and argument.numel():
                names.setdefault(argument.data_ptr(), f"argument {i}")
        launches = [
            Launched(stub, grid, named(stub, values, names)) for stub, grid, values in self.launches
        ]
        written = [names.get(t.data_ptr(), "of its own") if t.numel() else "" for t in tensors]
        kinds = [(t.shape, t.stride(), t.dtype) for t in tensors]
        return results, launches, list(zip(kinds, written, strict=True))


def named(stub: Stub, values: tuple, names: dict[int, str]) -> list:
    """A launch's arguments, with a name for each address: which argument, or which new tensor."""
    found = []
    for kind, value in zip(stub.source.signature.values(), values, strict=True):
        if kind.startswith("*"):
            address = value.data_ptr() if isinstance(value, Tensor) else value
            new = f"new {len(names)}"
            found.append(names.setdefault(address, new) if address else "nothing")
        else:
            found.append((kind, type(value), value))
    return found


@contextmanager
def replaced(owner, name: str, value) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def passed_on(run: Callable) -> Callable:
    return lambda *arguments, **options: run(*arguments, **options)


def route(n: int, m: int, k: int, eps: str | None = "given", dtype=FP32, halves=True) -> None:
    """A generator's two outputs, with gradients as losses send them back."""
    both = torch.randn(n, 2 * m, dtype=dtype).requires_grad_()
    parts = both.chunk(2, dim=1)
    clean, noise = parts if halves else (part.contiguous() for part in parts)
    given = torch.randn(n, m, dtype=dtype) if eps == "given" else eps
    weights, mean, *_ = kernels.noisy_topk(clean, noise, given, k, False)
    torch.autograd.grad(weights.sum() + mean.square().sum(), both, retain_graph=True)
    torch.autograd.grad(weights, both, torch.randn(k, n, dtype=weights.dtype).T)


def move(x: Tensor, dtype: torch.dtype, layout: torch.memory_format, affine=False) -> None:
    """To rows, forward and backward, and into static input buffers."""
    i = make(replace(PAPER, n=len(x), c=2, c_out=2), FP32)
    scale = torch.rand(5, 2 * x.shape[1])[:, : x.shape[1]] if affine else None
    needs_gradient = x.is_floating_point()
    rows = kernels.gather(x.requires_grad_(needs_gradient), i, scale, scale, dtype, layout)
    if needs_gradient:
        torch.autograd.grad(rows, x, torch.randn_like(rows))
    out = torch.empty((5 * len(x), *x.shape[1:]), dtype=dtype).contiguous(memory_format=layout)
    kernels.gather_into(out, x.detach(), i, scale, None)


def moves() -> None:
    for n in (48, 47, 17):
        for dtype in (FP32, BF16):
            move(torch.randn(n, 64), dtype, CONTIGUOUS)
    images = torch.randn(49, 3, 5, 5)
    for x in (images, images.to(BF16), (images * 9).to(torch.uint8)):
        for layout in (CONTIGUOUS, LAST):
            move(x[:48], BF16, layout, affine=True)
            move(x[1:], BF16, layout)  # 75 elements in: not on 16 bytes
            move(x[:48].contiguous(memory_format=LAST), x.dtype, layout)
            move(x[:48].permute(0, 1, 3, 2), x.dtype, layout)  # in neither layout
    move(torch.randn(6, 16, 12, 12), FP32, LAST)


def join(case: Case, dtype: torch.dtype, off_by_one=False) -> None:
    """All that takes the experts' outputs, which may lie one element off 16 bytes."""
    i = make(case, dtype)
    given = shifted(i.outputs) if off_by_one else i.outputs
    outputs, weights, matrix, bias = leaves(given, i.weights, i.matrix, i.bias)
    frozen = outputs.detach(), weights.detach()
    for results in (
        *(operation(outputs, weights, matrix, bias, i) for operation in (*JOINING, *SUPERVISED)),
        aggregated(outputs, weights, matrix, None, i),
        aggregated(outputs, weights, matrix.detach(), None, i),
        aggregated(*frozen, matrix, bias, i),
        combined_with_loss(outputs, weights, matrix, bias, i, smoothing=0.0),
    ):
        sum(result.float().sum() for result in results).backward()


def shifted(x: Tensor) -> Tensor:
    """The same values and strides, one element further on than 16 bytes allow."""
    return x.new_empty(x.numel() + 1).as_strided(x.shape, x.stride(), 1).copy_(x)


def settings() -> None:
    """What is read besides the arguments: a plan that was kept before is not that of another."""
    matmul, knobs = torch.backends.cuda.matmul, triton.knobs
    seen = set()
    for owner, name, values in (
        (matmul, "allow_tf32", (False, True, False)),
        (knobs.runtime, "debug", (False, True, False)),
        (knobs.compilation, "instrumentation_mode", ("", "other", "")),
    ):
        for value in values:
            with replaced(owner, name, value):
                join(SMALL, FP32)
                seen.add((name, value))
    assert len(seen) == 6


JOINED = [
    *((replace(PAPER, n=n), dtype) for n in (48, 47, 17, 1) for dtype in (FP32, BF16, FP16)),
    *((case, FP32) for case in (SMALL, SMALL_MAPS, SMALL_LAST, replace(SMALL, c=40), MANY)),
    (SMALL_LAST, BF16),
    (replace(SMALL_MAPS, trailing=(4, 8)), BF16),
    (replace(SMALL, m=6, scores="gaps"), BF16),
    (MANY, BF16),
]


def joins() -> None:
    for case, dtype in JOINED:
        join(case, dtype)
        join(case, dtype, off_by_one=True)


def routes() -> None:
    sizes = [(48, 5, 2), (47, 5, 2), (1, 5, 2), (64, 4, 1), (65, 5, 2), (512, 16, 2)]
    for size in (*sizes, (513, 5, 2), (4097, 6, 2), (30, 1000, 3)):
        for eps in ("given", "draw", None):
            route(*size, eps)
    route(48, 5, 2, halves=False)
    route(48, 4, 2, halves=False)
    route(48, 4, 2)
    route(48, 5, 2, dtype=BF16)
    route(48, 5, 2, dtype=torch.float64)


def norms() -> None:
    """BatchNorm in both layouts and neither, with all that may be left out there and left out."""
    small = norm_cases.Case("", c=16, trailing=(4, 4), activation="relu", residual=True)
    for layout in ("contiguous", "last", "permuted"):
        for dtype in (FP32, BF16):
            norm(replace(small, layout=layout), dtype)
            norm(replace(small, layout=layout, c=7, trailing=(3, 5)), dtype)
    for options in (
        {"running": False, "weight": False},
        {"bias": False, "momentum": None},
        {"residual": False, "activation": "silu"},
        {"trailing": (), "activation": None},
    ):
        norm(replace(small, **options), FP16)
    norm(replace(small, capacity=4096, trailing=(2, 2)), FP32)


def norm(case: norm_cases.Case, dtype: torch.dtype) -> None:
    norm_cases.outcome(case, norm_cases.make(case, dtype), "kernels")


def in_comparison(case: Callable[[], None]) -> None:
    compared = Compared()
    with launches_end_here(compared.take), compared.operations():
        case()
    assert compared.kept > 10


def another_driver() -> None:
    """Kernels are loaded by a driver: those of one are not launched for the next."""
    for _ in range(2):
        launches = []
        with launches_end_here(lambda *launch, into=launches: into.append(launch)):
            for _ in range(2):
                kernels.noisy_topk(torch.rand(4, 3), torch.rand(4, 3), None, 1, False)
        assert len(launches) == 2


def one_tensor_twice() -> None:
    """A plan made where two arguments were one tensor fits where they are two."""
    pointers = []
    with launches_end_here(lambda stub, grid, values: pointers.append(values[:2])):
        x, y = torch.rand(4, 3), torch.rand(4, 3)
        kernels.noisy_topk(x, x, None, 1, False)
        kernels.noisy_topk(x, y, None, 1, False)
    assert pointers[1] == (x.data_ptr(), y.data_ptr())


def numbers_that_change() -> None:
    """Are given to launches as they are, in float64, by one plan; constants are none of them."""
    planned, launches = [], []
    carry_out = _launch.Operation._carry_out

    def counted(operation, *rest):
        planned.append(operation)
        return carry_out(operation, *rest)

    def taken(stub, grid, values) -> None:
        kinds = stub.source.signature
        found = zip(kinds, kinds.values(), values, strict=True)
        launches.append([(name, value) for name, kind, value in found if kind == "fp64"])

    mean, exploit = (torch.rand(shape, dtype=torch.float64) for shape in (3, ()))
    prediction = torch.rand(4, 5, dtype=torch.float64, requires_grad=True)
    table = kernels.head_table([0, 0], [2, 3], 4)
    flat, counts = torch.rand(4 * (2 + 3 + 2)), torch.ones(2, 2)
    with launches_end_here(taken), replaced(_launch.Operation, "_carry_out", counted):
        # First one object for two numbers, and for the smoothing, which is a constant.
        for weight, bias_decay in ((0.1, 0.1), (0.3, 0.0), (1.0, 2.0)):
            target = torch.zeros(4, dtype=torch.int64)
            total, *_ = kernels.total_loss(prediction, target, mean, exploit, weight, 0.1)
            total.backward()
            kernels.update_heads(
                flat, flat, flat, flat, table, counts[0].int(), counts,
                torch.ones(2, 2, 2, dtype=torch.float64), torch.rand(2), (weight, bias_decay),
                (0.9, 0.999), 1e-8,
            )  # fmt: skip
            forward, backward, count, update = launches[-4:]
            assert forward == backward == [("weight", weight)]
            assert count == []
            assert update == [("decay", weight), ("bias_decay", bias_decay), ("eps", 1e-8)]
    assert len(planned) == 3


def nothing_is_held() -> None:
    with launches_end_here():
        x = torch.rand(4, 3)
        found = [x, *kernels.noisy_topk(x, x, None, 1, False)]
        alive = [weakref.ref(tensor) for tensor in found]
        del x, found
        gc.collect()
        assert not any(reference() is not None for reference in alive)


def plans_are_bounded() -> None:
    planned, operation = [], None
    carry_out = _launch.Operation._carry_out

    def counted(self, *rest):
        nonlocal operation
        operation = self
        planned.append(1)
        return carry_out(self, *rest)

    with (
        launches_end_here(),
        replaced(_launch, "KEPT", 4),
        replaced(_launch.Operation, "_carry_out", counted),
    ):
        for n in (2, 3, 4, 5, 6, 7, 8, 9, 9, 9):
            kernels.noisy_topk(torch.rand(n, 3), torch.rand(n, 3), None, 1, False)
            assert len(operation._kept) <= 4
    assert len(planned) == 8


def what_was_not_compiled() -> None:
    """Triton launches nothing where a hook keeps it from compiling, and chooses again each time."""
    launches = []
    with launches_end_here(lambda *launch: launches.append(launch)):
        call = partial(kernels.noisy_topk, torch.rand(4, 3), torch.rand(4, 3), None, 1, False)
        with replaced(triton.knobs.runtime, "jit_cache_hook", lambda **_: True):
            call()
            call()
        assert launches == []
        call()
        call()
    assert len(launches) == 2


def whoever_replaces_run() -> None:
    """As tests and ``bench.precompile`` do: every launch is theirs, of kept plans too."""
    launches, theirs = [], []
    with launches_end_here(lambda *launch: launches.append(launch)):
        call = partial(kernels.noisy_topk, torch.rand(4, 3), torch.rand(4, 3), None, 1, False)
        call()
        call()
        with replaced(JITFunction, "run", lambda *a, **k: theirs.append(a)):
            call()
        call()
    assert (len(launches), len(theirs)) == (3, 1)


def hooks_see_launches_of_kept_plans() -> None:
    """As a profiler's, which may come and go: with what is known of the launch, and in order."""
    seen, runtime = [], triton.knobs.runtime
    enter, leave = (lambda launch: seen.append(launch.get())), (lambda _: seen.append("left"))
    with launches_end_here(lambda stub, *_: seen.append(stub.source.fn.__name__)):
        call = partial(kernels.noisy_topk, torch.rand(4, 3), torch.rand(4, 3), None, 1, False)
        call()
        for chain, hook in ((runtime.launch_enter_hook, enter), (runtime.launch_exit_hook, leave)):
            chain.add(hook)
        call()
        runtime.launch_enter_hook.remove(enter)
        call()
        runtime.launch_exit_hook.remove(leave)
        call()
    name = seen[0]
    assert seen[1]["name"] == name
    assert seen == [name, seen[1], name, "left", name, "left", name]


def planned_each_time_plans() -> None:
    """As ``bench.host`` compares: plans are made once for kept launches, else at every call."""
    planned, carry_out = [], _launch.Operation._carry_out

    def counted(operation, *rest):
        planned.append(operation)
        return carry_out(operation, *rest)

    with launches_end_here(), replaced(_launch.Operation, "_carry_out", counted):
        call = partial(kernels.noisy_topk, torch.rand(4, 3), torch.rand(4, 3), None, 1, False)
        for _ in range(3):
            call()
        assert len(planned) == 1
        for _ in range(3):
            planned_each_time(call)()
        assert len(planned) == 4


def threads() -> None:
    """Hubs run experts on threads, and autograd has its own."""
    problems, lock = [], threading.Lock()

    def work() -> None:
        try:
            for n in [*range(1, 9)] * 20:
                x = torch.rand(n, 3)
                weights, _, _, _, rows, _ = kernels.noisy_topk(x, x, None, 2, False)
                assert weights.shape == (n, 2)
                assert rows.shape == (2 * n,)
        except Exception:
            with lock:
                problems.append(traceback.format_exc())

    with launches_end_here(), replaced(_launch, "KEPT", 4):
        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not problems, problems[0]


CASES = (
    *(partial(in_comparison, case) for case in (routes, moves, joins, norms, settings)),
    another_driver,
    one_tensor_twice,
    numbers_that_change,
    nothing_is_held,
    plans_are_bounded,
    what_was_not_compiled,
    whoever_replaces_run,
    hooks_see_launches_of_kept_plans,
    planned_each_time_plans,
    threads,
)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in CASES:
        case()
