"""A run that is killed at any point of training and saving goes on to the same bits."""

import io
import os

import pytest
import torch
from support.checkpoint_files import all_weights
from support.dying import die, die_at, is_killed
from support.training import VALIDATION, assert_same_run, make, noisy_objective, pathway

from hubpath_fast import files
from hubpath_fast.checkpoints import folders, write
from hubpath_fast.training import find_checkpoint, log
from hubpath_fast.training.trainer import Trainer

SETTINGS = {
    "steps": 12, "log_every": 2, "eval_every": 3, "save_every": 2, "validation": VALIDATION,
    "objective": noisy_objective,
}  # fmt: skip


def half_of_the_weights(path, tensors, aliases):
    write_tensors(path, tensors, aliases)
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


write_tensors, torch_save = write.write_tensors, torch.save
HALF = {"write_tensors": half_of_the_weights, "save": half_of_the_state, "write": half_a_line}
OWNERS = {
    "_step": Trainer, "_report": Trainer, "write": log.JsonLog, "write_tensors": write,
    "save": torch, "sync": folders, "_rename": folders, "rmtree": folders.shutil,
    "replace": files.os, "link": files.os,
}  # fmt: skip
# The n-th call of what, and whether it dies before, in midst of, or after it. In the run's order
# last/ is saved at steps 2, 4, ..., and best/ at the evaluations at 3, 6, 9 and 12 that get better.
POINTS = [
    *[("_step", n, "before") for n in (1, 3, 12)],
    *[("_report", n, "after") for n in (1, 7)],
    *[("write", n, when) for n in (1, 5) for when in ("before", "midst", "after")],
    *[("write_tensors", n, when) for n in (1, 2, 5, 9) for when in ("midst", "after")],
    *[("save", n, "midst") for n in (1, 4)],
    *[("sync", n, "after") for n in (1, 4, 5, 16, 30)],
    *[("_rename", n, when) for n in (1, 3, 4, 5, 6) for when in ("before", "after")],
    *[("rmtree", n, "before") for n in (1, 4, 7, 8, 9)],
    ("replace", 1, "before"),  # of the log, when it is opened
]


# Where last/ is saved at the step of the best evaluation, it is made of links to best/.
LINKED = SETTINGS | {"save_every": 3, "steps": 6}


def train_and_die(out, call, nth, when, settings=SETTINGS):
    """In a process that was started for it: the ``nth`` call is its last."""
    die_at(OWNERS[call], call, nth, when, HALF)
    make(pathway(), out, **settings).fit()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("nth", "when"), [(1, "before"), (1, "after"), (4, "after")])
def test_a_run_that_is_killed_between_links_goes_on_to_the_same_bits(tmp_path, nth, when):
    assert is_killed(train_and_die, tmp_path / "run", "link", nth, when, LINKED)
    whole = make(pathway(), tmp_path / "whole", **LINKED)
    whole.fit()
    trainer = make(pathway(), tmp_path / "run", resume=True, **LINKED)
    trainer.fit()
    assert_same_run(whole, trainer)
    for name in ("last", "best"):
        assert all_weights(whole.out_dir / name) == all_weights(trainer.out_dir / name)


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
        assert all_weights(whole.out_dir / name) == all_weights(trainer.out_dir / name)
    left = sorted(path.name for path in trainer.out_dir.iterdir())
    assert [name for name in left if not name.endswith(".part")] == ["best", "last", "log.jsonl"]
