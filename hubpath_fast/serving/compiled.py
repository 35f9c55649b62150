"""A program compiled to machine code by AOTInductor. On a CPU it needs a C++ compiler."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch.export import ExportedProgram

from .errors import ExportError

COMPILERS = ("g++", "clang++", "cl")


def check_compiler() -> None:
    """Raises ExportError where there is no C++ compiler."""
    named = os.environ.get("CXX")
    names = (named,) if named else COMPILERS
    if not any(shutil.which(name) for name in names):
        raise ExportError(
            f"format: aoti compiles C++, and there is no {' or '.join(names)} on this machine; "
            "install one, name one in the environment variable CXX, or take the format pt2"
        )


def write_compiled(program: ExportedProgram, path: Path) -> None:
    """Compiles the program into a package; takes minutes."""
    import torch._inductor

    torch._inductor.aoti_compile_and_package(program, package_path=str(path))
