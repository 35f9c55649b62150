"""Signals to a whole process group, workers included: the run saves and resumes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch
from support.training import Stream, make
from support.waiting import LIMIT, has_text, wait_until
from torch import nn
from torch.utils.data import DataLoader

from hubpath_fast.data import ImageDataset, TrainStream, images, open_images, train_transform

SCRIPT = """
import sys, time
import torch
from torch import nn
torch.set_num_threads(1)
from hubpath_fast.data import *
from hubpath_fast.tasks import Classification
from hubpath_fast.training import Reporting, SingleObjective, Trainer, TrainerConfig

task = Classification(("a", "b", "c"))

class Slow(SingleObjective):
    def __call__(self, model, x, y):
        time.sleep(0.05)
        return super().__call__(model, x.float(), y)

splits = open_images(sys.argv[1])
stream = TrainStream(ImageDataset(splits.train, train_transform(8)), 4, workers=2)
model = nn.Sequential(nn.Flatten(), nn.Linear(192, 3))
config = TrainerConfig(steps=2000, batch_size=4, lr_expert=1e-3, log_every=2)
trainer = Trainer(model, Slow(task.loss), stream, config, sys.argv[2], task=task,
                  reporting=Reporting(tensorboard=False))
result = trainer.fit()
print("interrupted" if result.interrupted else "done", result.steps)
"""


def test_a_sigterm_to_the_process_group_saves_and_stops(animals, tmp_path):
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(animals), str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    log = out / "log.jsonl"
    wait_until(lambda: process.poll() is not None or has_text(log), "the first line of the log")
    os.killpg(process.pid, signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    assert "interrupted" in output
    assert "Traceback" not in output
    assert (out / "last" / "model.safetensors").is_file()


class Breaking:
    """A stream whose third batch fails, after asking the trainer to stop if it is told to."""

    def __init__(self, stop):
        self.stop, self.trainer = stop, None

    def batches(self, start_step):
        for step in range(start_step, start_step + 3):
            if step == 2:
                if self.stop:
                    self.trainer.stop()
                raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
            yield torch.randn(4, 6), torch.arange(4) % 3


def trainer_of(stream, out, **options):
    stream.trainer = make(nn.Linear(6, 3), out, stream, steps=9, **options)
    return stream.trainer


def test_a_stream_that_breaks_while_stopping_is_the_stop(tmp_path):
    result = trainer_of(Breaking(stop=True), tmp_path / "stopped").fit()
    assert (result.interrupted, result.steps) == (True, 2)
    assert (tmp_path / "stopped" / "last" / "model.safetensors").is_file()
    with pytest.raises(RuntimeError, match="exited unexpectedly"):
        trainer_of(Breaking(stop=False), tmp_path / "broken").fit()


def test_an_evaluation_that_breaks_while_stopping_is_done_after_resuming(tmp_path):
    class Validation:
        def __init__(self, trainer):
            self.trainer = trainer

        def __iter__(self):
            if self.trainer is not None:
                self.trainer.stop()
                raise RuntimeError("DataLoader worker (pid 7) exited unexpectedly")
            yield torch.randn(4, 6), torch.arange(4) % 3

    validation = Validation(None)
    first = trainer_of(Stream(), tmp_path, validation=validation)
    validation.trainer = first
    result = first.fit()
    assert (result.interrupted, result.steps, result.best_metric) == (True, 9, None)
    again = trainer_of(Stream(), tmp_path, validation=Validation(None), resume=True).fit()
    assert (again.interrupted, again.steps) == (False, 9)
    assert again.best_metric is not None


def test_a_worker_outlives_sigterm_for_a_while_and_then_ends_without_an_error(animals):
    """torch raises in the main process, wherever it is, if a worker ends with an error."""
    dataset = ImageDataset(open_images(animals).train, train_transform(8))
    signals = partial(images._set_signals, grace_seconds=1)
    loader = DataLoader(dataset, 4, num_workers=1, worker_init_fn=signals, persistent_workers=True)
    iterator = iter(loader)
    assert len(list(iterator)) == 4
    [worker] = iterator._workers
    os.kill(worker.pid, signal.SIGTERM)
    worker.join(0.3)
    assert worker.is_alive()
    worker.join(20)
    assert worker.exitcode == 0


def test_default_workers_leave_a_core_for_training(monkeypatch):
    for cores, expected in ((1, 1), (2, 1), (8, 7), (64, 12)):
        monkeypatch.setattr(images.os, "sched_getaffinity", lambda _, n=cores: set(range(n)))
        assert images.default_workers() == expected
    stream = TrainStream(range(10), 2, workers=None)
    assert stream.workers == 12
    with pytest.raises(ValueError, match=r"prefetch: .* got 0"):
        TrainStream(range(10), 2, prefetch=0)


def test_ranks_on_one_machine_share_its_cores(monkeypatch):
    monkeypatch.setattr(images, "usable_cores", lambda: 32)
    for ranks, expected in [(1, 12), (4, 7), (20, 1), (64, 1)]:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert images.default_workers() == expected
