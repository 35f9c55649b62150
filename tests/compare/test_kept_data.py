"""A comparison whose data changes goes on with the images that it began with."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from safetensors.torch import load_file
from support.compare import EQUAL, QUIET, settings_of
from support.source_trees import image

from hubpath_fast.compare import compare
from hubpath_fast.data.kept import FileList
from hubpath_fast.recipes.analysis import report

METHODS = "single,hub-pathway"


@pytest.fixture
def flat(tmp_path):
    for name in ("blue", "red"):
        for i in range(10):
            image(tmp_path / "data" / name / f"{i}.png")
    return tmp_path / "data"


def said(settings, methods, seeds, out) -> str:
    text = io.StringIO()
    compare(settings, methods, seeds, out, 1, Console(file=text, width=1000))
    return text.getvalue()


def outputs(out):
    return {
        path.relative_to(out): load_file(path)
        for path in sorted(out.glob("runs/seed-*/*/outputs.safetensors"))
    }


def test_what_is_added_is_in_no_run(flat, tmp_path):
    settings, out, whole = settings_of(flat, EQUAL), tmp_path / "out", tmp_path / "whole"
    compare(settings, METHODS, (0, 1), whole, 1, QUIET)
    assert "begun" not in said(settings, "single", (0,), out)
    for name in ("blue", "red"):
        image(flat / name / "new.png")
    note = f"2 images were added to {flat} after this comparison was begun (e.g. blue/new.png)"
    assert said(settings, METHODS, (0, 1), out).count(note) == 1
    expected, found = outputs(whole), outputs(out)
    assert len(expected) == 6
    assert found.keys() == expected.keys()
    for path, tensors in expected.items():
        for name, value in tensors.items():
            assert found[path][name].equal(value), (path, name)
    assert sum(map(len, FileList.read(out / "runs/files.csv.gz").rows.values())) == 20
    notes = []
    report(out, tell=notes.append)
    assert [text.split(":")[0] for text in notes] == [note]
    assert "begun" not in said(settings, METHODS, (0, 1), out)  # nothing is trained


def test_a_comparison_of_a_relative_folder_is_read_from_any_other(flat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "out"
    compare(settings_of("data", EQUAL), METHODS, (0,), out, 1, QUIET)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert report(out).is_file()
    compare(settings_of(flat, EQUAL), METHODS, (0,), out, 1, QUIET)  # the same comparison


def test_what_is_gone_is_refused_before_anything_is_trained(flat, tmp_path):
    settings, out = settings_of(flat, EQUAL), tmp_path / "out"
    compare(settings, "single", (0,), out, 1, QUIET)
    (flat / "red" / "3.png").unlink()
    for seeds in ((0,), (0, 1), (1,)):
        with pytest.raises(
            ValueError, match=r"this comparison was begun: .* 1 gone \(red/3\.png\)"
        ):
            compare(settings, METHODS, seeds, out, 1, QUIET)
    assert not (out / "runs/seed-0/pathway").exists()
    compare(settings, "single", (0,), out, 1, QUIET)  # the table needs no images


def test_a_comparison_of_an_earlier_version_gets_a_list_when_it_goes_on(flat, tmp_path):
    settings, out, files = settings_of(flat, EQUAL), tmp_path / "out", "runs/files.csv.gz"
    compare(settings, "single", (0,), out, 1, QUIET)
    before = (out / files).read_bytes()
    (out / files).unlink()
    compare(settings, METHODS, (0,), out, 1, QUIET)
    assert (out / files).read_bytes() == before
    (out / files).unlink()
    for i in range(10):
        image(flat / "red" / f"new{i}.png")
    with pytest.raises(ValueError, match="the data is not what it was"):
        compare(settings, "single,zoo-tuning", (0,), out, 1, QUIET)
    assert not (out / files).exists()
