"""The benchmark of the pipeline: a row is right before it is timed, and says how it compares."""

from __future__ import annotations

import json

import pytest

from bench import data as bench
from hubpath_fast.data import images

SMALL = ["--size", "16", "--batch-size", "4", "--seconds", "0.02", "--images", "16"]


def test_rows_of_every_cache_and_number_of_workers(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    rows = bench.main([*SMALL, "--workers", "0,1", "--consumes", "1e9", "--out", str(out)])
    assert [(row["cache"], row["workers"]) for row in rows] == [
        ("none", 0), ("none", 1), ("memory", 0), ("memory", 1), ("disk", 0), ("disk", 1),
    ]  # fmt: skip
    for row in rows:
        assert row["over_consumption"] == row["images_per_second"] / 1e9
        assert (row["cache_seconds"] is None) == (row["cache"] == "none")
    printed = capsys.readouterr().out
    assert printed.count("the step waits") == 6
    assert "the step consumes 1000000000 images/s" in printed
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["workers"] for row in written] == [0, 1, 0, 1, 0, 1]
    assert written[0]["batch_size"] == 4


def test_the_consumption_of_a_hub_is_measured():
    setting = bench.Setting(size=32, batch_size=4, device="cpu", seconds=0.01)
    assert bench.consumption("test_resnet,test_resnet", setting, classes=3) > 0


def test_a_row_with_other_bytes_is_not_timed(tmp_path, monkeypatch):
    cached = bench.cache_splits

    def wrong(splits, side, mode, folder):
        return cached(splits, side + 1, mode, folder)

    monkeypatch.setattr(bench, "cache_splits", wrong)
    monkeypatch.setattr(bench, "images_per_second", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match="cache memory, 0 workers: other bytes than decoding"):
        bench.main([*SMALL, "--workers", "0", "--caches", "none,memory"])


def test_a_set_by_name_and_refused_options(capsys):
    rows = bench.main(["--dataset", "digits", "--size", "16", "--seconds", "0", "--workers", "0",
                       "--caches", "none"])  # fmt: skip
    assert len(rows) == 1
    with pytest.raises(SystemExit):
        bench.parse(["--consumes", "1", "--hub", "tiny"])
    assert bench.parse([]).workers == [0, images.default_workers()]
