"""bench.shelf_rank: its plain versions agree, and its row says what a whole shelf would take."""

import json

import pytest

from bench import shelf_rank

SMALL = ["--models", "2", "--images", "80", "--features", "6", "--classes", "3",
         "--source-classes", "4", "--of", "5"]  # fmt: skip


def test_a_row_has_every_score_and_the_plain_versions_agree(tmp_path, capsys):
    row = shelf_rank.main([*SMALL, "--out", str(tmp_path / "rows.jsonl")])
    names = ["h_score", "log_me", "leep", "nce", "knn", "linear"]
    assert list(row["mean"]) == list(row["best"]) == names
    assert all(0 < row["best"][name] <= row["mean"][name] for name in names)
    assert set(row["plain"]) == {"log_me", "linear"}
    assert json.loads((tmp_path / "rows.jsonl").read_text()) == row
    assert "h_score + knn + leep" in capsys.readouterr().out


def test_values_that_differ_from_the_plain_version_are_an_error():
    with pytest.raises(RuntimeError, match="LogME is 2, by the plain version 1"):
        shelf_rank._check("LogME", 1.0, 2.0, 1e-6)
