"""What ``auto`` takes, and what it says of it. CUDA is asked for by name: nothing runs there."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from hubpath_fast.executors import Workload, choose, remembered
from hubpath_fast.executors.choice import refused

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MANY, FEW = "more than 256 samples", "every expert can be captured"
PLAIN = [nn.Linear(3, 2) for _ in range(4)]

pytestmark = pytest.mark.usefixtures("user_cache")


def hooked():
    experts = [nn.Linear(3, 2) for _ in range(4)]
    experts[2].register_forward_hook(lambda *_: None)
    return experts


def marked():
    experts = [nn.Linear(3, 2) for _ in range(4)]
    experts[1].not_captured = "counts its calls"
    return experts


def synchronised():
    return [*PLAIN[:3], nn.Sequential(nn.Linear(3, 2), nn.SyncBatchNorm(2))]


@pytest.mark.parametrize(
    ("samples", "experts", "obstacle", "name", "reason"),
    [
        (48, PLAIN, None, "graphs", FEW),
        (256, PLAIN, None, "graphs", FEW),
        (257, PLAIN, None, "sequential", MANY),
        (None, PLAIN, None, "graphs", FEW),
        (48, hooked(), None, "streams", "experts[2] (Linear) has hooks"),
        (48, marked(), None, "streams", "experts[1] (Linear) counts its calls"),
        (48, synchronised(), None, "streams", "experts[3] (Sequential)"),
        (48, PLAIN, "they need 40 GiB of 24", "sequential", "they need 40 GiB of 24"),
        (257, hooked(), None, "sequential", MANY),  # no launch needs hiding: nothing to run at once
        (257, PLAIN, "too much", "sequential", MANY),
        (48, hooked(), "too much", "streams", "has hooks"),  # the graphs are out in any case
    ],
)
@pytest.mark.parametrize("gradients", [True, False])
def test_on_cuda_it_goes_by_what_is_known_without_a_measurement(
    samples, experts, obstacle, name, reason, gradients
):
    work = Workload(CUDA, samples, gradients)
    found, [why], notes = choose("auto", work, experts, 2, obstacle)
    assert (found, notes) == (name, ())
    assert reason in why


def test_only_the_first_expert_that_cannot_be_captured_is_named():
    experts = hooked()
    experts[3].not_captured = "is never reached"
    assert refused(experts).startswith("experts[2] (Linear) has hooks")
    assert refused(PLAIN) is None


def test_elsewhere_nothing_runs_but_one_after_another():
    found, [why], _ = choose("auto", Workload(torch.device("mps"), 48), PLAIN, 2)
    assert found == "sequential"
    assert "the experts are on mps" in why


@pytest.mark.parametrize("asked", ["sequential", "streams", "graphs"])
def test_what_was_asked_for_is_taken_whatever_is_known(asked):
    assert choose(asked, Workload(CUDA, 1000), hooked(), 2, "too much") == (
        asked, ("it was asked for",), (),
    )  # fmt: skip


def test_an_executor_that_there_is_none_of_is_refused():
    with pytest.raises(ValueError, match=r"executor: expected one of auto, .*'turbo'"):
        choose("turbo", Workload(CPU), PLAIN, 2)


MILLISECONDS = {"sequential": 15.04, "streams": 13.5, "graphs": 12.345}
WORK = Workload(CUDA, 48, True, (3, 8, 8), torch.bfloat16)


@pytest.fixture
def card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card 1")


def remember(executor, work=WORK, experts=PLAIN, times=MILLISECONDS):
    return remembered.remember([remembered.made(work, experts, 2, executor, times)])


def test_what_was_measured_goes_before_the_rule(card):
    found = remembered.made(WORK, PLAIN, 2, "graphs", MILLISECONDS)
    remembered.remember([replace(found, date="2026-11-28")])
    found, [why], notes = choose("auto", WORK, hooked(), 2)
    assert (found, notes) == ("graphs", ())
    assert why == (
        "it was the fastest for 48 samples in `hubpath tune` on 2026-11-28: 12.35 ms against 15.04 "
        "ms (sequential), 13.5 ms (streams)"
    )


def test_a_choice_within_the_noise_is_not_called_the_fastest(card):
    remember("streams", times={"streams": 10.2, "sequential": 10.1})
    _, [why], _ = choose("auto", WORK, PLAIN, 2)
    assert "no other was faster beyond the noise" in why
    assert why.endswith("10.2 ms against 10.1 ms (sequential)")


@pytest.mark.parametrize(
    "work",
    [
        WORK._replace(samples=24),
        WORK._replace(samples=49),
        WORK._replace(gradients=False),
        WORK._replace(shape=(3, 16, 16)),
        WORK._replace(precision=None),
        WORK._replace(device=CPU),
    ],
)
def test_it_holds_for_nothing_else(card, work):
    remember("streams")
    assert "hubpath tune" not in str(choose("auto", work, PLAIN, 2))
    for samples in (25, 48):
        assert choose("auto", WORK._replace(samples=samples), PLAIN, 2)[0] == "streams"
    assert choose("auto", WORK, PLAIN, 1)[0] == "graphs"
    assert choose("auto", WORK, PLAIN[:3], 2)[0] == "graphs"


def test_of_several_sizes_the_nearest_holds(card):
    remember("streams", WORK._replace(samples=60))
    remember("sequential", WORK._replace(samples=40))
    sizes = {n: choose("auto", WORK._replace(samples=n), PLAIN, 2)[0] for n in (35, 40, 41, 60, 61)}
    assert sizes == {
        35: "sequential", 40: "sequential", 41: "streams", 60: "streams", 61: "graphs",
    }  # fmt: skip


def test_before_the_first_batch_the_latest_is_named(card):
    for samples, executor in ((64, "graphs"), (32, "streams"), (16, "sequential")):
        remember(executor, WORK._replace(samples=samples, gradients=samples != 16))
    found, [why], _ = choose("auto", Workload(CUDA), PLAIN, 2)
    assert (found, "for 32 samples" in why) == ("streams", True)
    assert choose("auto", Workload(CUDA), PLAIN, 1)[0] == "graphs"
    assert choose("auto", Workload(CPU), PLAIN, 2)[0] == "sequential"


def test_another_card_knows_nothing_of_it(card, monkeypatch):
    remember("streams")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Card 2")
    assert choose("auto", WORK, PLAIN, 2)[0] == "graphs"


@pytest.mark.parametrize("name", ["threads", "warp"])
def test_an_executor_that_cannot_run_there_is_passed_over_with_a_note(card, name):
    remember(name, times={name: 1.0, "streams": 2.0})
    found, [why], [note] = choose("auto", WORK, PLAIN, 2)
    assert (found, FEW in why) == ("graphs", True)
    assert f"there is no executor '{name}' for cuda" in note


def test_graphs_that_do_not_fit_are_passed_over_with_a_note(card):
    remember("graphs")
    found, _, [note] = choose("auto", WORK, PLAIN, 2, "they need 40 GiB of 24")
    assert found == "sequential"
    assert "they need 40 GiB of 24" in note
    remember("streams")
    assert choose("auto", WORK, PLAIN, 2, "they need 40 GiB of 24")[0] == "streams"
