"""Kernels whose loops end where an argument says, under every interpreter and numpy."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

if not triton.knobs.runtime.interpret:
    pytest.skip("compiled kernels do not use the interpreter", allow_module_level=True)

from hubpath_fast.kernels import _interpreter
from triton.runtime import interpreter


@triton.jit
def _triangle(out_ptr, end):
    total = 0
    for i in range(tl.program_id(0), end):
        total += i
    tl.store(out_ptr + tl.program_id(0), total)


def triangle(end: int) -> list[int]:
    """Sums over [0, end) and [1, end) of the numbers themselves."""
    out = torch.zeros(2, dtype=torch.int32)
    _triangle[(2,)](out, end)
    return out.tolist()


def test_a_loop_may_end_where_an_argument_says():
    assert triangle(5) == [10, 10]
    assert triangle(0) == [0, 0]


def test_mended_it_counts_the_same(monkeypatch):
    monkeypatch.setattr(_interpreter, "_is_affected", lambda: True)
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", interpreter._patch_lang_tensor)
    before = interpreter._patch_lang_tensor
    _interpreter.mend()
    assert interpreter._patch_lang_tensor is not before
    assert triangle(5) == [10, 10]
    assert "__index__" not in vars(tl.tensor)  # taken off again after the launch


@pytest.mark.parametrize(
    ("version", "refused", "affected"),
    [
        ("3.6.0", True, True),
        ("3.6.0", False, False),
        ("3.8.0", True, False),
        ("3.10.1", True, False),
    ],
)
def test_only_versions_that_do_not_fit_are_mended(monkeypatch, version, refused, affected):
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(_interpreter, "_refused_by_numpy", lambda: refused)
    assert _interpreter._is_affected() is affected
    patch = interpreter._patch_lang_tensor
    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patch)
    _interpreter.mend()
    assert (interpreter._patch_lang_tensor is not patch) is affected
