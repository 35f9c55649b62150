"""The process of one job: it follows the command, and why it failed is written down."""

from __future__ import annotations

import multiprocessing
import os
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..files import write_json
from ..training import NonFiniteLoss

INTERRUPTED = 130


@contextmanager
def process_of_a_job(failed: Path, threads: int) -> Iterator[None]:
    """Within it a process does its job, and what stops that ends the process.

    The process ends by itself when the one that started it is gone, so that nobody writes into a
    folder that another command took over.

    failed: where a failure is written down, as {"error": ..., "traceback": ...}; of an earlier
    attempt it is deleted. threads: of torch.
    """
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal goes to the command, which hands it on once
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(threads)
    try:
        failed.unlink(missing_ok=True)
        yield
    except InterruptedError:
        os._exit(INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, (ValueError, NonFiniteLoss, OSError))
        text = str(error) if expected else f"{type(error).__name__}: {error}"
        write_json(failed, {"error": text.strip(), "traceback": traceback.format_exc()})
        os._exit(1)
