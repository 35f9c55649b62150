"""A run that is killed at any point of training and saving goes on to the same bits."""

import io
import os

import pytest
import torch
from support.dying import die, die_at, is_killed
from support.training import VALIDATION, assert_same_run, make, noisy_objective, pathway

from hubpath_fast import files
from hubpath_fast.training import checkpoint, find_checkpoint, log
from hubpath_fast.training.trainer import Trainer

SETTINGS = {
    "steps": 12, "log_every": 2, "eval_every": 3, "save_every": 2, "validation": VALIDATION,
    "objective": noisy_objective,
}  # fmt: skip


def half_of_the_weights(tensors, path, metadata):
    save_file(tensors, path, metadata=metadata)
    os.truncate(path, os.path.getsize(path) // 2)
    die()


def half_of_the_state(state, file):
    torch_save(state, buffer := io.BytesIO())
    file.write(buffer.getvalue()[: buffer.tell() // 2])
    file.flush()
    die()


def half_a_line(self, record):
    self._file.write('{"step": 99, "loss": 0.')
    self._file.flush()
    die()


save_file, torch_save = checkpoint.save_file, torch.save
HALF = {"save_file": half_of_the_weights, "save": half_of_the_state, "write": half_a_line}
OWNERS = {
    "_step": Trainer, "_report": Trainer, "write": log.JsonLog, "save_file": checkpoint,
    "save": torch, "sync": checkpoint, "_rename": checkpoint, "rmtree": checkpoint.shutil,
    "replace": files.os,
}  # fmt: skip
# The n-th call of what, and whether it dies before, in midst of, or after it. In the run's order
# last/ is saved at steps 2, 4, ..., and best/ at the evaluations at 3, 6, 9 and 12 that get better.
POINTS = [
    *[("_step", n, "before") for n in (1, 3, 12)],
    *[("_report", n, "after") for n in (1, 7)],
    *[("write", n, when) for n in (1, 5) for when in ("before", "midst", "after")],
    *[("save_file", n, when) for n in (1, 2, 5) for when in ("midst", "after")],
    *[("save", n, "midst") for n in (1, 4)],
    *[("sync", n, "after") for n in (1, 4, 5, 10)],
    *[("_rename", n, when) for n in (1, 3, 4, 5, 6) for when in ("before", "after")],
    *[("rmtree", n, "before") for n in (1, 4, 7, 8, 9)],
    ("replace", 1, "before"),  # of the log, when it is opened
]


def train_and_die(out, call, nth, when):
    """In a process that was started for it: the ``nth`` call is its last."""
    die_at(OWNERS[call], call, nth, when, HALF)
    make(pathway(), out, **SETTINGS).fit()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    trainer = make(pathway(), tmp_path_factory.mktemp("runs") / "whole", **SETTINGS)
    trainer.fit()
    return trainer


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("call", "nth", "when"), POINTS)
def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path, call, nth, when):
    assert is_killed(train_and_die, tmp_path / "run", call, nth, when)
    torch.manual_seed(12345)  # the second process starts from anywhere
    saved = find_checkpoint(tmp_path / "run" / "last") is not None
    model = pathway(seed=7 if saved else 0)  # without a checkpoint it begins as the first did
    trainer = make(model, tmp_path / "run", resume=True, **SETTINGS)
    trainer.fit()
    assert_same_run(whole, trainer)
    for name in ("last", "best"):
        one, two = (t.out_dir / name / "model.safetensors" for t in (whole, trainer))
        assert one.read_bytes() == two.read_bytes()
    left = sorted(path.name for path in trainer.out_dir.iterdir())
    assert [name for name in left if not name.endswith(".part")] == ["best", "last", "log.jsonl"]
