"""A hub of 64 experts with room for four, in a process of its own: what comes out is what comes out
with all in memory, to the bit, and the memory it takes is bounded."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import large_hub

# In units of an expert: room for four, the one that is run, and the one that is read in. What is
# trained takes its gradient too, and SGD's momentum, or AdamW's two moments.
PARTS = {"predictions": 1, "frozen": 1.1, "sgd": 3, "adamw": 4, "killed and resumed": 3}
REST = 5 << 20  # bytes of all that is no expert's: modules, files' headers, what malloc keeps


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    hub = large_hub.save_hub(folder / "hub")
    command = [sys.executable, "-m", "tests.support.large_hub", hub, folder / "out"]
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = large_hub.everything(hub, folder / "whole", None, lambda _: contextlib.nullcontext())
    torch.set_num_threads(threads)
    _, errors = child.communicate()
    assert child.returncode == 0, errors
    return whole, json.loads((folder / "out" / "found.json").read_text())


@pytest.mark.parametrize("part", PARTS)
def test_results_are_those_of_all_in_memory_to_the_bit(found, part):
    whole, mine = found
    assert mine["digests"][part] == whole[part]


@pytest.mark.parametrize("part", PARTS)
def test_memory_is_bounded_by_the_room_and_two_experts(found, part):
    allowed = (large_hub.ROOM + 2) * PARTS[part] * large_hub.expert_bytes() + REST
    assert found[1]["peaks"][part] <= allowed
