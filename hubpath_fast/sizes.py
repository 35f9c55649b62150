"""Bytes and counts as people write them: "80GB", "16GiB" or "8000000000"; "50M" or "50000000"."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
UNITS |= {f"{unit}i": 2 ** (10 * power) for power, unit in enumerate("KMGT", 1)}
TEXT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?(?:([KMGT]i?)?B)?")
COUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KMGB]?)")


def parse_bytes(name: str, text: int | str) -> int:
    """Bytes, at least 1, of a number or a text; ValueError, which starts with ``name``, for others.

    GB is 10**9, GiB 2**30; a number without a unit is bytes.
    """
    count = _read(text, TEXT, lambda found: _whole(found[1], found[2] or "", floor=bool(found[2])))
    if count < 1:
        raise ValueError(f"{name}: expected bytes such as '80GB' or '500MiB', got {text!r}")
    return count


def parse_count(name: str, text: int | str) -> int:
    """A count, at least 1, of a number or a text; ValueError, which starts with ``name``, for
    others. K is 10**3, M 10**6, G and B 10**9."""
    count = _read(text, COUNT, lambda found: _whole(found[1], found[2].replace("B", "G")))
    if count < 1:
        raise ValueError(f"{name}: expected a count such as 50000 or '50M', got {text!r}")
    return count


def _read(text: int | str, pattern: re.Pattern, count: Callable[[re.Match], int]) -> int:
    """What ``count`` makes of a text's match, or an integer as it is; 0 of anything else."""
    if isinstance(text, str):
        found = pattern.fullmatch(text.strip())
        return 0 if found is None else count(found)
    return text if isinstance(text, int) and not isinstance(text, bool) else 0


def _whole(number: str, unit: str, floor: bool = False) -> int:
    """So many units; 0 where that is no whole number, unless the rest is to fall away."""
    exact = Fraction(number) * UNITS[unit]
    return int(exact) if floor or exact.denominator == 1 else 0


def bytes_text(count: int) -> str:
    """For people: "1.50 GiB", or MiB of less than one, or KiB."""
    if count >= 2**30:
        return f"{count / 2**30:.2f} GiB"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"
