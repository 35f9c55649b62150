"""Real signals: a subprocess trains, is asked to stop, and another goes on."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from support.training import VALIDATION, before_step, make, pathway, records, single
from support.waiting import LIMIT, wait_until

from hubpath_fast.training import Interrupt, find_checkpoint, read_log

HERE = Path(__file__).parent
SCRIPT = """
import sys, time
sys.path.insert(0, {here!r})
import torch
torch.set_num_threads({threads})
from support.training import VALIDATION, Reporting, make, pathway, pathway_objective
out, slow = sys.argv[1], float(sys.argv[2])

def objective(model, x, y):
    time.sleep(slow)
    return pathway_objective(model, x, y)

trainer = make(pathway(), out, objective=objective, steps=60, log_every=4, eval_every=10,
               validation=VALIDATION, reporting=Reporting(tensorboard=False))
result = trainer.fit()
print("interrupted" if result.interrupted else "done", result.steps)
"""


def start(out, slow):
    # As many threads as here: sums are split among them, and runs are compared to the bit.
    script = SCRIPT.format(here=str(HERE.parent), threads=torch.get_num_threads())
    return subprocess.Popen(
        [sys.executable, "-c", script, str(out), str(slow)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_lines(out, count):
    wait_until(lambda: len(read_log(out / "log.jsonl")) >= count, "lines of the log")


def test_a_sigterm_saves_says_how_to_resume_and_loses_nothing(tmp_path):
    process = start(tmp_path, 0.1)
    wait_for_lines(tmp_path, 2)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output
    step = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"]
    last = tmp_path / "last"
    assert "interrupted" in output
    assert f"of 60; saved in {last}. Go on with resume=True" in output
    assert "Stopped by SIGTERM after step" in output
    assert step < 60

    settings = {"steps": 60, "log_every": 4, "eval_every": 10, "validation": VALIDATION}
    resumed = make(pathway(seed=7), tmp_path, resume=True, **settings).fit()
    whole = make(pathway(), tmp_path / "whole", **settings).fit()
    assert records(resumed) == records(whole)


def test_a_second_signal_aborts_at_once(tmp_path):
    process = start(tmp_path, 0.2)
    wait_for_lines(tmp_path, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=LIMIT)
    # Where both fell into the end of one step, the first may already have done its work: the run is
    # saved and the handlers found are back, of which SIGTERM's ends the process before it prints.
    saved = find_checkpoint(tmp_path / "last") is not None
    killed_after = process.returncode == -signal.SIGTERM and saved
    assert process.returncode == 143 or "interrupted" in output or killed_after


def test_handlers_are_installed_and_restored():
    def mine(number, frame):
        raise AssertionError("not while the context lasts")

    previous = signal.signal(signal.SIGTERM, mine)
    try:
        with Interrupt() as interrupt:
            assert interrupt.requested is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert interrupt.requested == "SIGTERM"
            with pytest.raises(SystemExit) as info:
                os.kill(os.getpid(), signal.SIGTERM)
            assert info.value.code == 143
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_ctrl_c_stops_after_the_step(tmp_path):
    trainer = make(single(), tmp_path)
    before_step(trainer, 5, lambda _: os.kill(os.getpid(), signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    result = trainer.fit()
    assert (result.interrupted, result.steps) == (True, 5)
    assert signal.getsignal(signal.SIGINT) is before
    assert make(single(), tmp_path, resume=True).fit().steps == 12


def test_a_signal_during_the_last_save_is_not_lost(tmp_path):
    trainer = make(single(), tmp_path, save_every=0)
    trainer.optimizer.register_state_dict_pre_hook(lambda _: os.kill(os.getpid(), signal.SIGTERM))
    result = trainer.fit()
    assert (result.interrupted, result.steps) == (True, 12)
    assert not make(single(), tmp_path, save_every=0, resume=True).fit().interrupted


def test_training_works_outside_the_main_thread(tmp_path):
    results = []
    thread = threading.Thread(target=lambda: results.append(make(single(), tmp_path).fit()))
    thread.start()
    thread.join()
    assert results[0].steps == 12
