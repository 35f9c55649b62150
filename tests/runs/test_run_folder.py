"""The files of a run that are damaged, and the memory of one."""

from __future__ import annotations

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
