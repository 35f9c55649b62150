"""A process that was started for it, and kills itself in the middle of a call."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping

from .processes import server


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(owner, call: str, nth: int, when: str, half: Mapping[str, Callable]) -> None:
    """Makes the ``nth`` call of ``owner.call`` the process's last.

    when: "before" it, "after" it, or in its middle, which ``half`` has by the call's name: it does
    a part and dies.
    """
    original, calls = getattr(owner, call), []

    def deadly(*args, **kwargs):
        calls.append(call)
        if len(calls) == nth and when != "after":
            die() if when == "before" else half[call](*args, **kwargs)
        found = original(*args, **kwargs)
        if len(calls) == nth:
            die()
        return found

    setattr(owner, call, deadly)


def is_killed(function: Callable, *arguments: object) -> bool:
    """Whether a process that calls it dies of SIGKILL. Both must be picklable.

    It is forked from a server that has done nothing yet, and not from the tests' own process: once
    autograd has started a thread there, which it does where backward passes are nested, no fork of
    it may use autograd.
    """
    process = server().Process(target=function, args=arguments)
    process.start()
    process.join()
    return process.exitcode == -signal.SIGKILL
