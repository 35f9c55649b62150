"""The benchmark of faces: its rows, and that other bytes are not timed."""

import json

import pytest
import torch

from bench import faces as bench
from hubpath_fast.tasks.landmarks.windows import Window

SMALL = ["--faces", "6", "--side", "160", "--size", "32", "--batch-size", "4", "--workers", "0"]


def test_rows_of_photographs_and_cache(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    rows = bench.main([*SMALL, "--seconds", "0.05", "--out", str(out)])
    assert [(row["cache"], row["goal"]) for row in rows] == [("none", 130), ("disk", 600)]
    assert all(row["faces_per_second"] > 0 for row in rows)
    assert list(rows[0]["ms"]) == ["decode", "cut", "matrix", "target", "warp", "whole"]
    assert list(rows[1]["ms"]) == ["read", "matrix", "target", "warp", "whole"]
    assert len(capsys.readouterr().out.splitlines()) == 3
    kept = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["side"] for row in kept] == [160, 160]


def test_photographs_are_the_same_each_time(tmp_path):
    one, other = (bench.write_photographs(tmp_path / name, 3, 120) for name in "ab")
    assert torch.equal(one.train.points(), other.train.points())
    assert all(torch.equal(one.train.load(i), other.train.load(i)) for i in range(3))


def test_a_row_with_other_bytes_is_not_timed(tmp_path, monkeypatch):
    splits = bench.write_photographs(tmp_path / "photos", 4, 120)

    def darkened(given, *_):
        class Store:
            def serves(self, *_):
                return True

            def __getitem__(self, place):
                return Window(torch.zeros(3, 40, 40, dtype=torch.uint8), 0, 0, 1)

        train = given.train
        cached = type(train)(train.faces, train.layout, Store(), tuple(range(4)))
        return type(given)(given.layout, cached, given.validation, given.test, False)

    monkeypatch.setattr(bench, "cache_faces", darkened)
    with pytest.raises(RuntimeError, match="cache none, 0 workers: other bytes than decoding"):
        bench.measure(splits, 32, 4, 0, 0.05, tmp_path)
