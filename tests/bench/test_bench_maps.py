"""bench.maps: what it counts as memory, what it calls wrong, and its goals."""

from __future__ import annotations

import pytest
import torch

from bench import jsonl, maps
from bench.counting import allocated_peak
from bench.inputs import Size

SIZE = Size(6, 3, 2, 8, trailing=(32, 32))
MAP = 8 * 32 * 32 * 4  # bytes of one map in float32


@pytest.fixture(autouse=True)
def one_thread():
    yield
    torch.set_num_threads(1)


def test_the_peak_is_counted_to_the_byte():
    def call():
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second, torch.empty(250)

    assert allocated_peak(call) == 6000
    x = torch.ones(1000, requires_grad=True)

    def step():  # backward counts: the gradients of both factors, and two numbers
        return torch.autograd.grad((x * x).sum(), x)

    assert 8000 <= allocated_peak(step) < 8100


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "last"])
def test_forms_agree_and_differ_in_memory(channels_last):
    case = maps.Case(SIZE, channels_last)
    assert all(error < 1e-6 for error in case.errors().values())
    rows = {(r["row"], r["gradients"]): r for r in maps.measure(case, 1, 0.0)}
    assert len(rows) == 6
    peak = {key: row["peak_memory"] for key, row in rows.items()}
    n, rows_of_maps = 6 * MAP, 12 * MAP
    assert n <= peak["by row", "without"] < n + 8192
    assert peak["convolution", "without"] > n + 18 * MAP  # the concatenation
    assert peak["grouped", "without"] > n + rows_of_maps
    # y, the mean's two gradients of its size, the rows'.
    assert peak["by row", "with"] < 3 * n + rows_of_maps + 16384
    assert rows["convolution", "with"]["memory_share"] == 1
    share = peak["by row", "with"] / peak["convolution", "with"]
    assert rows["by row", "with"]["memory_share"] == pytest.approx(share)
    assert maps.show(rows["by row", "with"]).split()[:4] == ["1", "with", "by", "row"]


def test_a_wrong_form_is_noted_and_not_timed(monkeypatch):
    forms = maps.FORMS | {"by row": lambda *given: maps.grouped(*given) * 1.001}
    monkeypatch.setattr(maps, "FORMS", forms)
    rows = maps.measure(maps.Case(SIZE), 1, 0.0)
    noted = [row for row in rows if "note" in row]
    assert [row["row"] for row in noted] == ["by row"]
    assert "p50" not in noted[0]
    assert maps.missed(rows) == [f"by row: {noted[0]['note']}"]


def test_goals():
    row = {"row": "by row", "threads": 2, "gradients": "with", "memory_share": 0.3, "time_share": 1}
    assert maps.missed([row]) == []
    assert maps.missed([row | {"memory_share": 0.31}, row | {"time_share": 1.2}]) == [
        "2 threads, with gradients: 0.31 of the convolution's memory",
        "2 threads, with gradients: 1.20 of the convolution's time",
    ]
    assert maps.missed([row | {"row": "grouped", "memory_share": 0.9}]) == []


def test_the_command_prints_and_keeps_rows(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(maps, "missed", lambda rows: ["something"])
    out = tmp_path / "maps.jsonl"
    arguments = ["--size", "6,3,2,8", "--maps", "32x32", "--threads", "1,2", "--seconds", "0"]
    assert maps.main([*arguments, "--out", str(out)]) == 0
    assert maps.main([*arguments, "--check"]) == 1
    rows = jsonl.read(out)
    assert [row["threads"] for row in rows] == [1] * 6 + [2] * 6
    assert {row["maps"] for row in rows} == {"32x32"}
    assert "missed: something" in capsys.readouterr().out
