"""bench.router measures shares, and says where a goal is missed."""

from __future__ import annotations

import pytest

from bench import jsonl, router


def test_a_row_has_the_shares(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    rows = router.main(["--only", "digits", "--seconds", "0", "--out", str(file)])
    [row] = jsonl.read(file)
    assert [row] == rows
    assert (row["width"], row["stride"]) == (4, 2)
    assert row["flops_share"] == pytest.approx(0.0295, abs=5e-4)
    for name in ("step", "prediction"):
        best, whole = row["seconds"][f"router of a {name}"][0], row["seconds"][name][0]
        assert row[f"{name}_share"] == best / whole
        assert 0 < row[f"{name}_share"] < 1
    assert "width 4, on 16 px" in capsys.readouterr().out


def test_a_share_above_its_goal_is_said():
    row = {
        "hub": "x", "size": 96, "batch": 8, "width": 16, "stride": 1,
        "flops_share": 0.051, "step_share": 0.10, "prediction_share": 0.101,
    }  # fmt: skip
    assert router.missed(row) == ["flops", "prediction"]
    assert router.show(row).endswith("  missed: flops, prediction")
    assert "missed" not in router.show(row | {"flops_share": 0.05, "prediction_share": 0.1})
