"""What the kernel files share: sizes of tiles, and cases to compile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


@dataclass(frozen=True)
class CompileCase:
    """One kernel at one representative size, to be compiled for a GPU that need not be there.

    All pointers count as 16-byte aligned, as torch's allocator and Triton's launcher make them.
    """

    name: str
    fn: Any  # the @triton.jit function
    signature: Mapping[str, str]  # run-time argument -> Triton type, such as "*fp32" or "i32"
    constexprs: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 3
    wide: bool = False  # the bulk loads and stores must be 128 bits
    aligned: tuple[str, ...] = field(default=())  # integer arguments that are multiples of 16
    note: str = ""
