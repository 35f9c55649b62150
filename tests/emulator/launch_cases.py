"""Ways in which kernels reach the emulator: by Triton, by address from a kept plan, a command."""

from __future__ import annotations

import contextlib
import io
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from bench import jsonl
from bench.emulated import kernels as command
from bench.emulated.ptx.driver import emulated
from hubpath_fast import kernels, reference

from .planted import BARRIER, found
from .router_cases import normal


def gathered(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows, and what they have to be."""
    scores = normal(len(x), 5, seed=1)
    routing = reference.noisy_topk(scores, scores, 2)
    rows = kernels.gather(x, routing, None, None, x.dtype, torch.contiguous_format)
    return rows, x[routing.rows.long() // 2]


def kept() -> None:
    """From the second call on; with tensors elsewhere in memory."""
    with emulated(keep=True) as device:
        for calls in range(3):
            x = normal(13, 37, seed=calls)
            rows, expected = gathered(x)
            assert torch.equal(rows, expected)
            assert (len(device.launches), device.kept) == (calls + 1, calls)
    with emulated() as device:
        for _ in range(2):
            gathered(normal(13, 37, seed=0))
        assert (len(device.launches), device.kept) == (2, 0)


def shortened(x: Tensor) -> Tensor:
    """A tensor that says it has x's rows, on a storage that lacks the last."""
    x = x.clone()
    x.untyped_storage().resize_(x[:-1].nbytes)
    return x


def kept_but_too_short() -> None:
    """A kept launch is watched as any other."""
    with emulated(keep=True):
        gathered(normal(13, 37, seed=0))
        x = shortened(normal(13, 37, seed=0))
        found("load out of bounds: .* of x_ptr, which has 1776", lambda: gathered(x))


def odd_storage() -> None:
    """A storage that begins 4 bytes behind a multiple of 16, as mapped files do: its loads must not
    be wide, or they would be misaligned."""
    whole = torch.arange(13 * 64 + 20, dtype=torch.float32)
    skip = next(i for i in range(4) if (whole.data_ptr() + 4 * i) % 16 == 4)
    x = torch.from_numpy(whole.numpy()[skip : skip + 13 * 64]).view(13, 64)
    assert x.untyped_storage().data_ptr() % 16 == 4
    rows, expected = gathered(x)
    assert torch.equal(rows, expected)


def without_barriers() -> None:
    """Of a kernel of this package whose warps meet in shared memory."""
    scores = normal(6, 600, seed=0)
    with emulated(edit=lambda text: re.sub(BARRIER, "", text)):
        found(
            "nothing wrote|race: a warp",
            lambda: kernels.noisy_topk(scores, scores, None, 3, False),
        )


def commanded(*only: str) -> tuple[int, list[dict], str]:
    """Exit status, lines as JSON, and what was printed."""
    out = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(out):
        file = Path(folder) / "rows.jsonl"
        status = command.main(["--only", *only, "--json", str(file)])
        return status, jsonl.read(file), out.getvalue()


def command_ok() -> None:
    status, rows, text = commanded("numbered draw 37", "combine+loss 37", "heads' updates")
    assert status == 0, text
    assert all(row["ok"] and row["launches"] for row in rows), text
    assert [row["kept"] for row in rows if row["check"].startswith("combine+loss")] == [0, 3]
    assert "6 checks, 0 failed" in text


def command_fails() -> None:
    """Of a wrong value, and of a fault that the emulator finds: both lines are FAIL."""

    def faulty(write: Callable) -> None:
        gathered(shortened(normal(13, 37, seed=0)))

    def wrong(write: Callable) -> None:
        write("wrong", ok=False, error=0.5, note="y[0] got 1 expected 2 (1 of 2 wrong)")

    with mock.patch.object(command, "checks", return_value={"faulty": faulty, "wrong": wrong}):
        status, rows, text = commanded("faulty", "wrong")
    assert status == 1
    assert [row["ok"] for row in rows] == [False, False], text
    assert "load out of bounds" in rows[0]["note"]
    assert text.count("FAIL") == 2


CASES: dict[str, Callable[[], None]] = {
    "launched from kept plans": kept,
    "launched from a kept plan, out of bounds": kept_but_too_short,
    "launched on a storage at an odd address": odd_storage,
    "launched without barriers": without_barriers,
    "commanded: all well": command_ok,
    "commanded: faults": command_fails,
}
