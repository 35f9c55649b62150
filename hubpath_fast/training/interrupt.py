"""SIGTERM and Ctrl-C as a request to stop, so that a run can save before it ends."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """A context in which SIGTERM and SIGINT only set :attr:`requested`, to the signal's name.

    A second signal aborts at once: KeyboardInterrupt for Ctrl-C, SystemExit(143) for SIGTERM. The
    handlers found on entering are restored on leaving; what one within another finds requested is
    requested of it, too. Outside the main thread, where Python delivers no signals, it installs
    nothing.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> Interrupt:
        self.requested = None
        if threading.current_thread() is threading.main_thread():
            for number in self.signals:
                previous = self._previous[number] = signal.signal(number, self._handle)
                outer = getattr(previous, "__self__", None)
                if isinstance(outer, Interrupt):
                    self.requested = self.requested or outer.requested
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            # None stands for a handler that was not set from Python and cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.requested is not None:
            if number == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + number)
        self.requested = signal.Signals(number).name
