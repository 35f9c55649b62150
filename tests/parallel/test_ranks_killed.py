"""A rank that is killed, or that fails alone between two collectives: the others end with one
message, and a run on another number of ranks goes on from the last checkpoint as if nothing had
happened, to 1e-10 in float64 (see ``test_ranks_train``)."""

import os
import random
import signal
import socket
from typing import NamedTuple

import pytest
import torch
from support.dying import die
from support.processes import connected, run_ranks, server
from support.shared_runs import TASK, build, history_of, make, state_of

from hubpath_fast import parallel
from hubpath_fast.training import PathwayObjective, checkpoint, find_checkpoint, load_state

SETTINGS = {"steps": 8, "batch_size": 24, "save_every": 2, "eval_every": 4, "accumulate": 2}
SECONDS = 60  # that the others have


class Killed(NamedTuple):
    rank: int
    when: str  # "forward", "backward", "saving", or "raising" where it is not killed
    step: int  # of it, from 1; when saving the number of the checkpoint


DRAWN = random.Random(21)
CASES = {
    "in a forward": Killed(1, "forward", DRAWN.randint(3, 8)),
    "in a backward, with the store": Killed(0, "backward", DRAWN.randint(3, 8)),
    "while saving": Killed(1, "saving", 2),
    "by an error of its own": Killed(1, "raising", 5),
}
PARTS = SETTINGS["accumulate"]


def deadly(case):
    """An objective in which the process dies."""
    plain, calls = PathwayObjective(TASK.criterion(0.5)), []

    def objective(model, x, y):
        calls.append(1)
        losses = plain(model, x, y)
        if len(calls) == PARTS * case.step:
            if case.when == "raising":
                raise ValueError("these targets are no classes")
            if case.when == "forward":
                die()
            losses.expert_outputs.register_hook(lambda _: die())
        return losses

    return objective


def killed_main(rank, port, case, out):
    """One of two ranks, as torchrun starts it; what ends it goes to a file."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port,
    }  # fmt: skip
    ranks = parallel.start("ep")
    more = {}
    if rank == case.rank and case.when == "saving":
        plain, calls = checkpoint.write_parts, []

        def write_parts(*args, **kwargs):
            calls.append(1)
            return die() if len(calls) == case.step else plain(*args, **kwargs)

        checkpoint.write_parts = write_parts
    elif rank == case.rank:
        more["objective"] = deadly(case)
    try:
        make(build(ranks=ranks), out, ranks, **SETTINGS, **more).fit()
    except Exception as error:
        (out / f"{rank}.txt").write_text(f"{type(error).__name__}: {error}")
        os._exit(3)


def run_killed(case, out):
    """The exit codes of both ranks; None of one that did not end in time."""
    out.mkdir()
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    processes = [
        server().Process(target=killed_main, args=(rank, port, case, out)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[case.rank].join()
    processes[1 - case.rank].join(SECONDS)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    return codes


def resumed_main(rank, folders):
    ranks, found = connected("ep"), {}
    for name, out in folders.items():
        model = build(ranks=ranks)
        result = make(model, out, ranks, resume=True, **SETTINGS).fit()
        found[name] = state_of(model), history_of(result)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """By case: the exit codes, the checkpoint's step, and the state of a run that went on."""
    folder, results = tmp_path_factory.mktemp("killed"), {}
    for i, (name, case) in enumerate(CASES.items()):
        out = folder / str(i)
        codes = run_killed(case, out)
        last = find_checkpoint(out / "last")
        step = load_state(out / "last")["run"]["step"] if last is not None else None
        results[name] = out, codes, step
    folders = {name: out for name, (out, *_) in results.items()}
    resumed = run_ranks(resumed_main, 3, folder / "store", folders)
    return results, resumed


@pytest.mark.parametrize("name", CASES)
def test_the_others_end_with_one_message_that_says_what_is_left(found, name):
    case, (out, codes, step) = CASES[name], found[0][name]
    raising = case.when == "raising"
    assert codes[case.rank] == (3 if raising else -signal.SIGKILL)
    assert codes[1 - case.rank] == 3
    text = (out / f"{1 - case.rank}.txt").read_text()
    said = "rank 1 has ended: these targets" if raising else "another rank has ended without"
    assert text.startswith(f"RankFailure: the run cannot go on: {said}")
    assert f"The checkpoint {out / 'last'} is whole; go on with resume=True" in text
    assert text.endswith("on any number of ranks")
    saved = (case.step if case.when == "saving" else (case.step - 1) // 2 + 1) - 1
    assert step == 2 * saved


@pytest.mark.parametrize("name", CASES)
def test_another_number_of_ranks_goes_on_as_if_nothing_had_happened(found, name, tmp_path):
    model = build()
    history = history_of(make(model, tmp_path, **SETTINGS).fit())
    expected, seen = state_of(model), set()
    for each in found[1]:
        state, its_history = each[name]
        for key, value in state.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-10, msg=key)
            seen.add(key)
        for line, same in zip(its_history, history, strict=True):
            assert line["step"] == same["step"]
            assert line["loss"] == pytest.approx(same["loss"], rel=0, abs=1e-10)
    assert seen == set(expected)
