"""The emulated device's library: C++ against the headers of the torch that is installed.

It is compiled once for each torch and each state of the source, into the user's cache folder. torch
itself is not imported here: the library must be there before ``torch.cuda`` is.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent / "source"
COMPILER = os.environ.get("CXX", "g++")


def what_is_missing() -> str | None:
    """Why the library cannot be built here, in a sentence; None if it can."""
    if not sys.platform.startswith("linux"):
        return f"the emulated device needs Linux, got {sys.platform}"
    if importlib.util.find_spec("torch") is None:
        return "the emulated device needs torch; install it"
    if not (_torch() / "include" / "ATen").is_dir():
        return f"the emulated device needs torch's headers, which {_torch()} lacks"
    if shutil.which(COMPILER) is None:
        return f"the emulated device needs a C++ compiler, and there is no {COMPILER}; install g++"
    return None


def build() -> Path:
    """The library, compiled if it is not yet; RuntimeError with the reason if it cannot be."""
    if reason := what_is_missing():
        raise RuntimeError(reason)
    library = _cache() / f"libemulated-{_key()}.so"
    if library.exists():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    torch = _torch()
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        command = [
            *(COMPILER, "-std=c++20", "-O1", "-fPIC", "-shared", "-w"),
            *(f"-I{torch / 'include'}", str(SOURCE / "emulated.cpp"), "-o", str(built)),
            *(f"-L{torch / 'lib'}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch / 'lib'}"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the emulated device was not compiled: {done.stderr[-2000:]}")
        built.replace(library)
    return library


def _torch() -> Path:
    return Path(importlib.util.find_spec("torch").submodule_search_locations[0])


def _key() -> str:
    found = hashlib.sha256(f"{importlib.metadata.version('torch')} {COMPILER}".encode())
    for path in sorted(SOURCE.iterdir()):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "hubpath_fast" / "emulated"
