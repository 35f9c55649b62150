"""The files of a run that are damaged, and the memory of one."""

from __future__ import annotations

import json

import pytest
import torch

from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.folder import RunFolder
from hubpath_fast.runs.measure import PeakMemory


@pytest.mark.parametrize("content", ["{", "[1]", "{}", '{"config": {}}'])
@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("fit.json", lambda path: RunFolder(path.parent).record()),
        ("seeds.json", lambda path: RunFolder(path.parent).seeds()),
    ],
)
def test_a_damaged_file_is_named(name, read, content, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name} is damaged"):
        read(tmp_path / name)


@pytest.mark.parametrize("content", ["{", "[1]", "null"])
def test_a_file_without_settings_is_named(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(ValueError, match=r"c\.json holds no settings of a run"):
        FitConfig.load(tmp_path / "c.json")


def test_memory_is_that_of_the_runs_own_device(monkeypatch):
    allocated = {torch.device("cuda:1"): 2**20}
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", allocated.__getitem__)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    memory = PeakMemory("cuda:1")
    allocated[torch.device("cuda:1")] = 3 * 2**20
    assert memory.mebibytes() == 2


WHOLE = {"config": {"data": "x", "hub": ["test_resnet", "test_vit"]}, "classes": ["a"]}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("fit.json", {"config": 5, "image_size": 32}, "expected settings by their names, got 5"),
        ("fit.json", {"config": {"data": "x", "hub": ["test_resnet"], "epoch": 3},
                      "image_size": 32}, "unknown setting 'epoch'"),
        ("fit.json", {"classes": 5, "image_size": 32}, "classes: expected a list of names, got 5"),
        ("fit.json", {"classes": [1], "image_size": 32}, "classes: expected a list of names"),
        ("fit.json", {"image_size": "32"}, "image_size: expected an integer of at least 1, got '3"),
        ("fit.json", {"image_size": 0}, "image_size: expected an integer of at least 1, got 0"),
        ("seeds.json", {"seeds": "12"}, "seeds: expected a list of integers, got '12'"),
        ("seeds.json", {"seeds": [0.5]}, "seeds: expected a list of integers"),
    ],
)  # fmt: skip
def test_what_is_wrong_in_a_file_is_named_with_the_file(name, content, words, tmp_path):
    (tmp_path / name).write_text(json.dumps(WHOLE | content))
    folder = RunFolder(tmp_path)
    with pytest.raises(ValueError, match=rf"{name}: {words}"):
        folder.record() if name == "fit.json" else folder.seeds()


def test_a_result_that_is_none_is_named(tmp_path):
    (tmp_path / "result.json").write_text("5")
    with pytest.raises(ValueError, match=r"result\.json holds no result; delete it"):
        RunFolder(tmp_path).result()


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "fit.json").touch()
    monkeypatch.setattr("pathlib.Path.read_text", refused)
    for read in (RunFolder(tmp_path).record, lambda: FitConfig.load(tmp_path / "c.json")):
        with pytest.raises(ValueError, match=r"json cannot be read: Permission denied$"):
            read()
