"""The process groups behind ``Ranks``, made once, and the store through which ranks leave words."""

from __future__ import annotations

import atexit
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from ..devices import check_device

SECONDS = 60  # that a rank waits for the others in a step
PATIENT_SECONDS = 7200  # while one may be reading a data set, or writing a checkpoint
SAY_SECONDS = 5  # that one waits for another to print a message


class _Connection:
    def __init__(self) -> None:
        self.store: Any = None
        self.groups: dict[tuple[int, int, str], Any] = {}
        self.ours = False  # whether it was made here, and is to be closed here


_connection = _Connection()


def exists() -> bool:
    """Whether there is a process group, whoever made it."""
    return dist.is_available() and dist.is_initialized()


def connect(device: str, seconds: float) -> None:
    """Connects the processes that torchrun has started, unless they are. Collective.

    Raises ValueError for a device that this process does not see."""
    if exists():
        return
    cuda = device.startswith("cuda")
    if cuda:
        check_device("cuda")
    timeout = timedelta(seconds=seconds)
    store, rank, world = next(dist.rendezvous("env://"))
    store.set_timeout(timeout)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if cuda else "gloo",
        store=dist.PrefixStore("hubpath", store),
        rank=rank,
        world_size=world,
        timeout=timeout,
    )
    _connection.store, _connection.ours = store, True
    # A process that ends with threads of a group running may be aborted.
    atexit.register(close)


def close() -> None:
    """Closes what ``connect`` made."""
    if _connection.ours and exists():
        dist.destroy_process_group()
    _connection.groups.clear()
    _connection.store, _connection.ours = None, False
    atexit.unregister(close)


def store() -> Any:
    """What all ranks can read and write; None of a process group that was made elsewhere."""
    return _connection.store


def group(dp: int, ep: int, name: str) -> Any:
    """See ``ranks.group``."""
    return _connection.groups[dp, ep, name]


def make_groups(rank: int, dp: int, ep: int, seconds: float) -> None:
    """Every rank makes every group, in the same order, as torch asks for."""
    groups = _connection.groups
    if (dp, ep, "patient") in groups:
        return
    members = {
        "ep": [[d * ep + e for e in range(ep)] for d in range(dp)],
        "dp": [[d * ep + e for d in range(dp)] for e in range(ep)],
    }
    for name, lists in members.items():
        for each in lists:
            made = None
            if 1 < len(each) < dp * ep:
                made = dist.new_group(each, timeout=timedelta(seconds=seconds))
            if rank in each:
                groups[dp, ep, name] = made
    patient = timedelta(seconds=PATIENT_SECONDS)
    groups[dp, ep, "patient"] = dist.new_group(backend="gloo", timeout=patient)
