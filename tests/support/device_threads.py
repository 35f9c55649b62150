"""Two threads that use the emulated device at once: prints what came out, as JSON.

``python -m bench.emulated -m support.device_threads``; tests/emulated/test_device_threads.py judges
it. A process that waits for itself ends with the stacks of all threads.
"""

from __future__ import annotations

import faulthandler
import json
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from bench.emulated.device import counts
from hubpath_fast import functional as HF

CUDA = torch.device("cuda")
SECONDS = 120  # what takes five where nothing waits for itself
PASSES, MANY = 150, 20


def copies_and_streams() -> list[float]:
    """Values that late copies brought to the host. What such a copy holds is let go when it is
    done, which takes Python's lock; another thread makes streams meanwhile, which takes the
    device's while Python's is held."""
    found: list[float] = []
    stream = torch.cuda.Stream()
    for number in range(PASSES):
        with torch.cuda.stream(stream):
            there = torch.full((8,), float(number), device=CUDA)
            kept, *dropped = (torch.empty(8, pin_memory=True) for _ in range(MANY))
            for here in (kept, *dropped):
                here.copy_(there, non_blocking=True)
            del here, dropped
        begun, ended = threading.Event(), threading.Event()

        def wait(begun: threading.Event = begun, ended: threading.Event = ended) -> None:
            begun.wait()
            stream.synchronize()
            ended.set()

        def make_streams(begun: threading.Event = begun, ended: threading.Event = ended) -> None:
            while not ended.is_set():
                torch.cuda.Stream()
                begun.set()

        _at_once(wait, make_streams)
        found.append(kept[0].item())
    return found


def launches() -> list[bool]:
    """Whether kernels that two threads launch, forward and backward, return what one launches."""
    alone = [_routings(seed) for seed in range(2)]
    together: dict[int, list[Tensor]] = {}

    def run(seed: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            together[seed] = _routings(seed)

    _at_once(lambda: run(0), lambda: run(1))
    return [
        torch.equal(ours, expected)
        for seed in range(2)
        for ours, expected in zip(together[seed], alone[seed], strict=True)
    ]


def _routings(seed: int) -> list[Tensor]:
    random, found = torch.Generator().manual_seed(seed), []
    for _ in range(6):
        clean, noise, eps = torch.randn(3, 40, 5, generator=random).to(CUDA)
        clean = clean.requires_grad_()
        routing = HF.noisy_topk(clean, noise, 2, eps)
        routing.weights.square().sum().backward()
        found += [routing.experts.cpu(), routing.weights.detach().cpu(), clean.grad.cpu()]
    return found


def _at_once(*functions: Callable[[], None]) -> None:
    failed: list[BaseException] = []

    def run(function: Callable[[], None]) -> None:
        try:
            function()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


def main() -> None:
    faulthandler.dump_traceback_later(SECONDS, exit=True)
    parts = (copies_and_streams, launches)
    found = {part.__name__: part() for part in parts}
    print(json.dumps({**found, "passes": PASSES, "races": counts.take_races()}))


if __name__ == "__main__":
    main()
