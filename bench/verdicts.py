"""A line for each check: right, with what was seen, or what is wrong, in words."""

from __future__ import annotations

from collections.abc import Callable

from hubpath_fast.devices import full_float32

from .children import Write, first_line


def write_verdict(write: Write, name: str, judge: Callable[[], tuple[str | None, dict]]) -> None:
    """judge: (what is wrong or None, values of the line); what it raises is wrong, too."""
    try:
        problem, values = judge()
    except Exception as failure:
        problem, values = first_line(failure), {}
    if problem is None:
        write(name, **values)
    else:
        write(name, ok=False, note=problem)


def write_error(write: Write, name: str, judge: Callable[[], tuple[str | None, float]]) -> None:
    """judge: (what is wrong or None, the largest error), computed without TF32."""

    def in_full_precision() -> tuple[str | None, dict]:
        with full_float32():
            problem, error = judge()
        return problem, {"error": error}

    write_verdict(write, name, in_full_precision)
