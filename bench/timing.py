"""Timing that rows can be compared by: all rows of a table are measured in interleaved rounds.

A machine drifts (clocks, other jobs), so each round measures every function once, in a new order,
and quantiles are taken over the rounds. Two ways of measuring:

- ``interleaved``: host time of back-to-back calls, the device waited for at the end: what eager
  code pays, launches included, as far as the device does not hide it.
- ``replayed`` (GPU): device time of one captured graph, after the cache was overwritten: what is
  left when launches cost nothing and nothing is in the cache.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

Clock = Callable[[], float]
SAMPLE_SECONDS = 1e-3  # calls are repeated until one sample takes this long


@dataclass(frozen=True)
class Times:
    """Quantiles of the seconds of one call, over ``rounds`` samples of ``calls`` calls each."""

    p20: float
    p50: float
    p80: float
    best: float
    rounds: int
    calls: int = 1

    @classmethod
    def of(cls, samples: list[float], calls: int = 1) -> Times:
        if len(samples) == 1:
            return cls(*samples * 4, rounds=1, calls=calls)
        cuts = statistics.quantiles(samples, n=10, method="inclusive")
        return cls(cuts[1], cuts[4], cuts[7], min(samples), len(samples), calls)


def refuse_interpreter() -> None:
    """Raise RuntimeError under Triton's interpreter, which says nothing about the kernels."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET: expected compiled kernels, got 1; unset it")


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str = "cpu",
    seconds: float = 2.0,
    min_rounds: int = 5,
    max_rounds: int = 200,
    calls: int | None = None,
    clock: Clock = time.perf_counter,
) -> dict[str, Times]:
    """Time each function: host seconds of one call, in rounds that run all of them.

    Rounds go on until ``seconds`` are spent, but at least ``min_rounds`` and at most
    ``max_rounds``. The order within a round is shuffled, the same way in each run. calls: that a
    sample is of, one after another without a wait for the device; None: as many as take
    ``SAMPLE_SECONDS``. clock: in seconds.
    """
    refuse_interpreter()
    repeats = {}
    for name, function in functions.items():
        function()  # warm-up: compilation, caches, autotuning
        repeats[name] = calls or _calls_of_a_sample(function, device, clock)
    order, shuffle = list(functions), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in functions}
    start = clock()
    for done in range(max_rounds):
        if done >= min_rounds and clock() - start > seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(_sample(functions[name], repeats[name], device, clock))
    return {name: Times.of(found, repeats[name]) for name, found in samples.items()}


def _calls_of_a_sample(
    function: Callable[[], object], device: torch.device | str, clock: Clock
) -> int:
    return max(1, min(1000, int(SAMPLE_SECONDS / _sample(function, 1, device, clock))))


def _sample(
    function: Callable[[], object], calls: int, device: torch.device | str, clock: Clock
) -> float:
    synchronize(device)
    start = clock()
    for _ in range(calls):
        function()
    synchronize(device)
    return (clock() - start) / calls


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, eq=False)
class Captured:
    """A function as a CUDA graph. It keeps the function, and with it the tensors that replays read:
    a graph knows addresses, and keeps nothing but what was allocated in its capture."""

    graph: torch.cuda.CUDAGraph
    function: Callable[[], object]

    def replay(self) -> None:
        self.graph.replay()


def capture(prepare: Callable[[], Callable[[], object]]) -> Captured:
    """The function that ``prepare`` returns, as a graph. Raises where it waits for the device.

    ``prepare`` is called on the stream that captures: autograd runs backward on the stream of its
    forward, so a forward that is kept must have been on this one.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        function = prepare()
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        function()
    return Captured(graph, function)


def replayed(
    graphs: Mapping[str, Captured],
    seconds: float = 2.0,
    min_rounds: int = 10,
    max_rounds: int = 200,
    kept: dict[str, list[float]] | None = None,
) -> dict[str, Times]:
    """Device seconds of one replay of each graph, by events, the cache overwritten before each.

    kept: is given each graph's samples in the order of the rounds, which tells two speeds that take
    turns from two that follow each other.
    """
    size = max(torch.cuda.get_device_properties(0).L2_cache_size, 1 << 25) * 4
    cache = torch.empty(size, dtype=torch.uint8, device="cuda")
    order, shuffle = list(graphs), random.Random(0).shuffle
    samples: dict[str, list[float]] = {name: [] for name in graphs}
    for graph in graphs.values():
        graph.replay()
    start = time.perf_counter()
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() - start > seconds:
            break
        shuffle(order)
        for name in order:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            cache.fill_(done % 256)
            before.record()
            graphs[name].replay()
            after.record()
            after.synchronize()
            samples[name].append(before.elapsed_time(after) / 1e3)
    if kept is not None:
        kept |= samples
    return {name: Times.of(found) for name, found in samples.items()}


CALLS = 8  # of a large copy or product, one after another: what launching takes is hidden


def copy_rates(
    device: torch.device | str,
    megabytes: int | None = None,
    measure: Callable[..., dict[str, float]] | None = None,
) -> dict[str, float]:
    """Bytes per second of a large copy, bytes read plus bytes written, by what copies.

    ``kernel`` is an elementwise kernel (torch's bitwise_not of int32) that reads and writes each
    byte once, on a GPU also in a captured graph. ``copy_`` is torch's copy, eager: captured, it
    becomes a node that a copy engine may run, slower than kernels are. measure: what times them,
    None for ``seconds_in_a_row``.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = (megabytes or (2048 if on_gpu else 128)) << 20
    source = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)
    ways = {
        "copy_": lambda: target.copy_(source),
        "kernel": lambda: torch.bitwise_not(source, out=target),
    }
    found = (measure or seconds_in_a_row)(ways, device, captured=("kernel",))
    return {way: 2 * size / seconds for way, seconds in found.items()}


def copy_bandwidth(device: torch.device | str, **options) -> float:
    """The fastest of ``copy_rates``, whose options it takes: the roof of other rows."""
    return max(copy_rates(device, **options).values())


def mixed_rates(
    device: torch.device | str,
    megabytes: int | None = None,
    measure: Callable[..., dict[str, float]] | None = None,
) -> dict[str, dict[str, float]]:
    """As ``copy_rates``, of kernels that write two bytes for each that they read ("1:2"), and of
    those that read two for each that they write ("2:1"): by mix, then by what copies.

    Memory is slower where reads and writes take turns, and caches take what is read or written at
    once: an operation that does not move as much in as out has another roof than a plain copy.
    """
    on_gpu = torch.device(device).type == "cuda"
    size = (megabytes or (2048 if on_gpu else 128)) << 20
    short = torch.randint(2**31 - 1, (size // 4,), dtype=torch.int32, device=device)
    long, other = torch.empty_like(short, dtype=torch.int64), torch.empty_like(short)
    rows = short.view(-1, 1, 256)  # each is written twice in a row: the second read is of a cache
    twice = long.view(torch.int32).view(-1, 2, 256)
    low, high = long.view(torch.int32).chunk(2)
    ways = {
        "1:2": {"widen": lambda: long.copy_(short), "repeat": lambda: twice.copy_(rows)},
        "2:1": {
            "narrow": lambda: other.copy_(long),
            "and": lambda: torch.bitwise_and(low, high, out=other),
        },
    }
    found = {}
    for mix, by_way in ways.items():
        seconds = (measure or seconds_in_a_row)(by_way, device, captured=tuple(by_way))
        found[mix] = {way: 3 * size / each for way, each in seconds.items()}
    return found


def say_share(share: float) -> str:
    """A share of a copy's bandwidth. No silent figure above it: then the copy was not the roof."""
    return f"{share:.0%} of copy" + " (above it)" * (share > 1)


def product_rate(
    device: torch.device | str,
    size: int | None = None,
    measure: Callable[..., dict[str, float]] | None = None,
) -> float:
    """Operations per second of a large bf16 product of random matrices, by torch's library."""
    on_gpu = torch.device(device).type == "cuda"
    size = size or (8192 if on_gpu else 512)
    a, b, c = (torch.randn(size, size, device=device).bfloat16() for _ in range(3))
    ways = {"product": lambda: torch.mm(a, b, out=c)}
    found = (measure or seconds_in_a_row)(ways, device, captured=("product",))
    return 2 * size**3 / found["product"]


def seconds_in_a_row(
    functions: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    captured: Sequence[str],
    clock: Clock = time.perf_counter,
) -> dict[str, float]:
    """Seconds of a call of each, of ``CALLS`` in a row: eager, or on a GPU as a captured graph of
    them, whichever is faster. captured: those that are captured, too."""
    found = interleaved(functions, device, seconds=0.5, calls=CALLS, clock=clock)
    seconds = {name: times.p50 for name, times in found.items()}
    if torch.device(device).type != "cuda":
        return seconds
    replays = {name: capture(lambda name=name: _repeated(functions[name])).replay
               for name in captured}  # fmt: skip
    for name, times in interleaved(replays, device, seconds=0.5, calls=1, clock=clock).items():
        seconds[name] = min(seconds[name], times.p50 / CALLS)
    return seconds


def _repeated(function: Callable[[], object]) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(CALLS):
            function()

    return repeated
