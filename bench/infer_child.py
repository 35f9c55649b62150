"""Loading and memory of one row of bench.infer, in a process that does nothing else.

    python -m bench.infer_child < JOB.json

JOB: {"row": the fields of ``infer_rows.Row``, "images": a file of uint8 [N, 3, S, S], "device"}. It
prints one line of JSON: seconds of importing, of loading and of the first answer, and the most
memory that the process held, in bytes, once all was imported, after answers about one image, and
after one about all. The files have mostly been read before: loading is from memory, not from disk.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SINGLES = 8  # answers about one image before the memory is read: allocators settle


def measure(
    row: dict, images: Path, device: str, clock=time.perf_counter
) -> dict[str, float | None]:
    """What the line says."""
    start = clock()
    from .infer_rows import KINDS, Row, open_row

    row = Row(**row)
    for library in KINDS[row.kind][1]:
        importlib.import_module(library)
    import torch

    batch = torch.load(images, mmap=True)
    found = {"import_seconds": clock() - start, "memory_imported": peak_memory()}
    start = clock()
    answer = open_row(row, device)
    found["load_seconds"] = clock() - start
    start = clock()
    answer(batch[:1])
    found["first_seconds"] = clock() - start
    for index in range(SINGLES):
        answer(batch[index % len(batch)][None])
    found["peak_memory_1"] = peak_memory()
    answer(batch)
    found[f"peak_memory_{len(batch)}"] = peak_memory()
    if device == "cuda":
        found["device_memory"] = torch.cuda.max_memory_allocated()
    return found


def peak_memory() -> int | None:
    """Bytes of the largest resident set; None where the system does not tell it.

    Not ``ru_maxrss``: on Linux a process takes over what its parent held when it was started.
    """
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(r"^VmHWM:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def ask(row: dict, images: Path, device: str, times: int) -> dict[str, float | None]:
    """The medians over so many processes, one after another.

    Raises RuntimeError with the last line that it printed, where one fails.
    """
    job = json.dumps({"row": row, "images": str(images), "device": device})
    command = [sys.executable, "-m", "bench.infer_child"]
    found = []
    for _ in range(times):
        done = subprocess.run(
            command, input=job, capture_output=True, text=True, cwd=ROOT, check=False
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise RuntimeError(said[-1] if said else f"status {done.returncode}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return {name: middle([one[name] for one in found]) for name in found[0]}


def middle(values: Sequence[float | None]) -> float | None:
    """The median, of an even number the lower of the two; None where one is unknown."""
    known = [value for value in values if value is not None]
    return sorted(known)[(len(known) - 1) // 2] if len(known) == len(values) else None


if __name__ == "__main__":
    given = json.load(sys.stdin)
    print(json.dumps(measure(given["row"], Path(given["images"]), given["device"])))
