"""What opening a saved hub costs beside reading its files: ``python -m bench.opening``.

Five ResNet-50 of random weights are saved into a temporary folder. In one process
``from_pretrained`` and ``Path.read_bytes`` of all files take turns, with the files in the page
cache. In another one the hub is opened and every parameter summed up, and the most memory that the
process held is compared with what it held before.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import hubpath_fast as hp

MEBIBYTE = 2**20


def times(folder: Path, rounds: int) -> tuple[float, float]:
    """Median seconds of opening the hub, and of reading the bytes of its files."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    opening, reading = [], []
    for round_ in range(rounds + 1):
        began = time.perf_counter()
        hp.from_pretrained(folder)
        between = time.perf_counter()
        for path in files:
            path.read_bytes()
        ended = time.perf_counter()
        if round_:  # the first one imports, and brings the files into the cache
            opening.append(between - began)
            reading.append(ended - between)
    return statistics.median(opening), statistics.median(reading)


def peak(folder: Path, small: Path) -> float:
    """MiB that opening ``folder`` and summing up every parameter adds to a process that has opened
    ``small``, and so imported what it needs. Linux's own count of resident pages."""
    hp.from_pretrained(small)
    before = _resident("VmRSS")
    model = hp.from_pretrained(folder)
    for parameter in model.parameters():
        parameter.sum()
    return _resident("VmHWM") - before


def _resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) / 1024
    raise ValueError(f"/proc/self/status has no {name}: this needs Linux")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=5)
    parser.add_argument("--name", default="resnet50", help="of timm, for all experts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--memory-of", nargs=2, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.memory_of:
        print(json.dumps(peak(*given.memory_of)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder, small = Path(place, "hub"), Path(place, "small")
        for names, where in (([given.name] * given.experts, folder), (["test_resnet"] * 2, small)):
            hp.create_model(names, 10, pretrained=False).save_pretrained(where)
        size = sum(path.stat().st_size for path in folder.rglob("*.safetensors")) / MEBIBYTE
        opening, reading = times(folder, given.rounds)
        command = [sys.executable, "-m", "bench.opening", "--memory-of", str(folder), str(small)]
        memory = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(
        f"{given.experts} {given.name}, {size:.0f} MiB, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads: opened in {opening:.3f} s, its files read in "
        f"{reading:.3f} s ({opening / reading:.2f}); memory {memory:.0f} MiB "
        f"({memory / size:.2f} of the files)"
    )


if __name__ == "__main__":
    main()
