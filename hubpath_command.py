"""The command ``hubpath``, whose Ctrl-C is no traceback while torch is being imported.

It stands beside the package because importing any part of that imports torch.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """The entry point."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:  # else it is ignored, as under nohup
        signal.signal(signal.SIGINT, _leave)
    from hubpath_fast.cli import main as command

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    command()


def _leave(number: int, frame: object) -> None:
    os.write(2, b"stopped\n")
    os._exit(128 + number)  # nothing is open yet that would have to be closed


if __name__ == "__main__":
    main()
