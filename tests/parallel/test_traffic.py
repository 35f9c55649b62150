"""The formula of the bytes of a step, by hand; and the table that is made of it."""

from __future__ import annotations

import pytest

from bench import traffic
from hubpath_fast.parallel.traffic import dp_bytes, ep_bytes, on_the_wire


def test_each_term_of_expert_parallel():
    found = ep_bytes(10, 3 * 32 * 32, 7, 4, 5, 4, 1000, received_rows=12)
    assert found == {
        "rows": 10 * 3072,
        "outputs": 12 * 28,
        "gradients": 10 * 28,
        "counts": 5 * 4 * 3,
        "router gradients": 4000,
        "mean weights": (6 + 5) * 4,
        "agreement": 4 + (4 + 5) * 8,
    }


def test_each_term_of_data_parallel():
    assert dp_bytes(10_000, 5, 4, 1000) == {
        "expert gradients": 40_000,
        "router gradients": 4000,
        "mean weights": 44,
        "agreement": 4 + (4 + 4 * 5) * 8,
    }


def test_sums_travel_in_a_ring_and_rows_once():
    assert on_the_wire({"rows": 100}, 4) == 100
    assert on_the_wire({"router gradients": 100}, 4) == 150
    assert on_the_wire({"router gradients": 100, "rows": 1}, 1) == 1


def test_the_table_has_a_row_for_each_size(capsys):
    rows = traffic.main(
        ["--hub", "test_resnet", "--px", "64", "--experts", "5,16", "--ranks", "2,8"]
    )
    assert [(row["M"], row["ranks"]) for row in rows] == [(5, 2), (5, 8), (16, 2), (16, 8)]
    row = rows[0]
    assert row["rows"] == 48 * 3 * 64 * 64 / 1e6  # half of 96 rows
    parts = ("rows", "outputs and gradients", "router", "counts and agreement")
    assert row["ep"] == pytest.approx(sum(row[name] for name in parts))
    shown = capsys.readouterr().out
    assert "| 5 | 8 (idle ranks in ep) |" in shown
    assert "| 16 | 8 |" in shown
