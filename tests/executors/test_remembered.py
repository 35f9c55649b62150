"""What ``hubpath tune`` found is in a file that many may write, and that nobody has to trust."""

import json
import subprocess
import sys

import pytest
import torch
from support.models import build
from support.waiting import LIMIT
from torch import nn

from hubpath_fast.executors import Workload, remembered
from hubpath_fast.executors.remembered import Stored, hub_key
from hubpath_fast.locks import locked

CPU = torch.device("cpu")


def hub(*sizes):
    return [nn.Sequential(nn.Linear(3, size), nn.BatchNorm1d(size)) for size in sizes]


def measured(samples=16, executor="threads", experts=None, gradients=True):
    work = Workload(CPU, samples, gradients, (3,))
    times = {"sequential": 2.0, "threads": 1.5}
    return remembered.made(work, experts or hub(2, 4), 1, executor, times)


def test_it_is_there_for_the_next_process(user_cache):
    one, other = measured(), measured(gradients=False, executor="sequential")
    path = remembered.remember([one, other])
    assert path == user_cache / "executors" / "measured.json"
    remembered.read.cache_clear()
    assert remembered.read(path) == Stored((one, other))


def test_a_new_measurement_takes_the_place_of_the_old_one_only(user_cache):
    remembered.remember([measured(), measured(32)])
    remembered.remember([measured(executor="sequential")])
    found = {m.samples: m.executor for m in remembered.stored().measured}
    assert found == {32: "threads", 16: "sequential"}


def test_nothing_is_there_at_first_and_no_folder_is_made(user_cache):
    assert remembered.stored() == Stored(())
    assert remembered.forget() == 0
    assert not user_cache.exists()


def test_a_hub_is_forgotten_or_all(user_cache):
    mine, other = hub(2, 4), hub(5)
    remembered.remember([measured(experts=mine), measured(32, experts=mine)])
    remembered.remember([measured(experts=other)])
    assert remembered.forget(mine) == 2
    assert [m.hub for m in remembered.stored().measured] == [hub_key(other, "training")]
    assert remembered.forget() == 1
    assert remembered.stored() == Stored(())


def good():
    return json.loads(json.dumps({"format": 1, "measured": [vars(measured())]}))


def changed(**values):
    held = good()
    held["measured"][0] |= values
    return json.dumps(held)


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ("", "is damaged"),
        ('{"format": 1, "measured": [', "is damaged"),
        ("[1, 2]", "is damaged"),
        ("null", "is damaged"),
        ('{"format": 1}', "is damaged"),
        ('{"format": 1, "measured": [3]}', "is damaged"),
        ('{"format": 1, "measured": 3}', "is damaged"),
        (changed(samples="many"), "is damaged"),
        (changed(shape=3), "is damaged"),
        (changed(milliseconds={"threads": "fast", "sequential": 1}), "is damaged"),
        (changed(executor="streams"), "is damaged"),  # which has no time there
        (changed(date=None), "is damaged"),
        ('{"format": 2, "choices": {}}', "is of another version (format 2, here 1)"),
        (b"\xff\xfe\x00", "is damaged"),
    ],
)
def test_a_file_that_is_none_is_not_read_and_says_so(user_cache, text, note):
    path = user_cache / "executors" / "measured.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    held, why = remembered.stored()
    assert held == ()
    assert f"{path} {note}" in why
    assert "`hubpath tune`" in why
    report = build().executor_report()
    assert (report.executor, report.notes) == ("sequential", (why,))
    remembered.remember([measured()])
    assert remembered.stored() == Stored((measured(),))


def test_what_was_written_is_what_a_good_file_holds(user_cache):
    assert good()["measured"][0]["milliseconds"] == {"sequential": 2.0, "threads": 1.5}
    path = remembered.remember([measured()])
    assert json.loads(path.read_text()) == good()
    assert not list(path.parent.glob(".*"))  # neither a lock nor unfinished files are left


def test_a_folder_in_the_way_is_no_crash(user_cache):
    (user_cache / "executors" / "measured.json").mkdir(parents=True)
    held, why = remembered.stored()
    assert held == ()
    assert "cannot be read" in why


def test_processes_that_write_at_once_lose_nothing(user_cache):
    code = (
        "import sys, torch; from torch import nn\n"
        "from hubpath_fast.executors import Workload, remembered\n"
        "torch.set_num_threads(1); first = int(sys.argv[1]); print(flush=True); input()\n"
        "for n in range(first, first + 20):\n"
        "    work = Workload(torch.device('cpu'), n, True, (3,))\n"
        "    times = {'sequential': 1.0, 'threads': 2.0}\n"
        "    remembered.remember([remembered.made(work, [nn.Linear(2, 2)], 1, 'threads', times)])\n"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(first)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        for first in (1, 101)
    ]  # fmt: skip
    for process in processes:
        process.stdout.readline()  # it is ready
    for process in processes:
        process.stdin.write(b"\n")
        process.stdin.flush()
    for process in processes:
        process.communicate(timeout=LIMIT)
        assert process.returncode == 0
    sizes = sorted(m.samples for m in remembered.stored().measured)
    assert sizes == [*range(1, 21), *range(101, 121)]


def test_a_lock_that_is_never_given_back_is_an_error(user_cache, monkeypatch):
    monkeypatch.setattr(remembered, "WAIT_SECONDS", 0.1)
    with locked(user_cache / "executors"), pytest.raises(ValueError, match="at work in"):
        remembered.remember([measured()])
    remembered.remember([measured()])
    assert len(remembered.stored().measured) == 1


def test_hubs_are_told_apart_by_what_decides_their_speed():
    hubs = {
        "plain": hub(2, 4),
        "other sizes": hub(2, 5),
        "another order": hub(4, 2),
        "one more": hub(2, 4, 4),
        "one less": hub(2),
        "other classes": [nn.Sequential(*e, nn.ReLU()) for e in hub(2, 4)],
        "another activation": [nn.Sequential(*e, nn.SiLU()) for e in hub(2, 4)],
        "another precision": [e.double() for e in hub(2, 4)],
        "no statistics": [nn.Sequential(e[0], nn.Identity()) for e in hub(2, 4)],
    }
    for use in remembered.USES:
        assert len({hub_key(experts, use) for experts in hubs.values()}) == len(hubs)


def test_what_is_frozen_counts_in_training_alone():
    plain, body, head = hub(2, 4), hub(2, 4), hub(2, 4)
    body[0][0].requires_grad_(False)
    head[0][1].requires_grad_(False)
    assert len({hub_key(experts, "training") for experts in (plain, body, head)}) == 3
    assert len({hub_key(experts, "predictions") for experts in (plain, body, head)}) == 1


def test_a_hub_stays_itself_whatever_its_weights():
    torch.manual_seed(0)
    one = hub(2, 4)
    torch.manual_seed(1)
    for use in remembered.USES:
        key = hub_key(one, use)
        assert hub_key(hub(2, 4), use) == key
        one[0].eval()
        assert hub_key(nn.ModuleList(one), use) == key


def test_the_threads_of_a_processor_are_part_of_its_name():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        two = remembered.device_name(CPU)
        torch.set_num_threads(1)
        one = remembered.device_name(CPU)
    finally:
        torch.set_num_threads(threads)
    assert two.endswith(", 2 threads")
    assert one != two
