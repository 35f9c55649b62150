"""Ranks for tests: processes on the CPU, connected by gloo, that run a function of a test.

They are forked from a server that has imported the package once: importing torch and timm takes a
new process about four seconds, longer than what it does here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from hubpath_fast import parallel
from hubpath_fast.compare.workers import start_server
from hubpath_fast.parallel import Ranks


def server() -> BaseContext:
    """What starts processes that have the package, and nothing that this process has done. There is
    one server, which the package's own commands use too, so it is started as they do."""
    return start_server(threads=1)


def run_ranks(function: Callable, ranks: int, folder: Path, *arguments: Any) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each of so many ranks, through files of
    ``torch.save``. The function is called in new processes with one thread each and a process
    group; it is found again by name, so it stands at the top of a module. Of what this process
    has changed in its environment they see nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    server()
    mp.start_processes(
        _main, (function, ranks, str(folder), arguments), ranks, start_method="forkserver"
    )
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(ranks)]


def connected(how: str | None = None) -> Ranks:
    """The ranks of the process group of ``run_ranks``."""
    return parallel.start(how)


def _main(rank: int, function: Callable, ranks: int, folder: str, arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # what torch is going to take away
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks
    )
    torch.save(function(rank, *arguments), f"{folder}/{rank}.pt")
    dist.barrier()
    parallel.stop()
    dist.destroy_process_group()
