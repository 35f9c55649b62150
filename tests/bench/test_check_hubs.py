"""The checks of hubs as they are used, on a CPU: right ones pass, and wrong ones are seen."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from support.bench import SMALL_SHELF, chosen_for_cpu, make_hub

import hubpath_fast as hp
from bench import check_draws, check_export, check_models, check_ranks, check_resident, check_shelf
from bench.inputs import Size
from hubpath_fast.parallel import collectives

make = partial(make_hub, budget=10**9)


def test_numbered_noise_is_its_definition(write, interpreted, device):
    sizes = [Size(9, 1, 1, 1), Size(12, 5, 2, 1), Size(7, 18, 3, 1)]
    check_draws.numbered(write, sizes, device.type, "triton")
    assert write.verdicts == [
        (f"numbered {n},{m},{k}", True) for n, m, k in ((9, 1, 1), (12, 5, 2), (7, 18, 3))
    ], write


def test_noise_of_other_numbers_is_seen(write, interpreted, device, monkeypatch):
    monkeypatch.setattr(check_draws, "ROUNDS", 9)
    check_draws.numbered(write, [Size(12, 5, 2, 1)], device.type, "triton")
    [row] = write
    assert not row["ok"]
    assert "have other experts" in row["note"]


def test_philox_gives_the_numbers_of_its_paper():
    """Known answers of Philox4x32-10 for the counter and the key 0."""
    words = check_draws.philox(0, torch.zeros(1, dtype=torch.int64).numpy())
    assert [int(word[0]) for word in words] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@pytest.fixture
def graphs(monkeypatch):
    chosen_for_cpu(monkeypatch)


def test_hubs_as_they_are_asked_are_right(write, graphs):
    check_models.changed(write, ["sequential", "graphs"], "cpu", make)
    check_models.frozen(write, "cpu", make)
    assert write.failed == []
    assert len(write) == 2 * len(check_models.CHANGES) + 2


def test_a_policy_that_is_not_followed_is_seen(write, monkeypatch):
    right = hp.RoutingPolicy.route

    def route(self, clean, *rest):
        return right(self if clean.dtype == torch.float64 else hp.RoutingPolicy(), clean, *rest)

    monkeypatch.setattr(hp.RoutingPolicy, "route", route)
    check_models.changed(write, ["sequential"], "cpu", make)
    assert [row["name"] for row in write.failed] == [
        "sequential dropped slots", "sequential penalty"
    ]  # fmt: skip
    assert "experts get [" in write.failed[0]["note"]


def test_a_frozen_model_without_graphs_is_seen(write):
    check_models.frozen(
        write, "cpu", lambda experts, _, **rest: make(experts, "sequential", **rest)
    )
    assert [row["note"] for row in write] == ["predictions of one image are not captured"] * 2


def test_a_hub_in_its_room_is_right(write):
    check_resident.agreement(write, "cpu", 16)
    assert write.verdicts == [("resident predictions", True), ("resident training", True)], write
    assert "0 groups found" not in write[0]["text"]


def test_a_room_for_all_checks_nothing(write, monkeypatch):
    monkeypatch.setattr(check_resident, "ROOM", 4 * check_resident.M)
    monkeypatch.setattr(check_resident, "STEPS", 2)
    check_resident.agreement(write, "cpu", 16)
    assert all("only 3 experts came" in row["note"] for row in write)


def test_a_shelfs_steps_are_right(write, interpreted, device):
    check_shelf.steps(write, device.type, "triton", {"small": SMALL_SHELF})
    assert len(write) == 4
    assert write.failed == []


def test_updates_with_another_rate_are_seen(write, monkeypatch):
    expected = [list(check_shelf.trained(model, SMALL_SHELF, "cpu", False)) for model in [
        check_shelf.hub_of(SMALL_SHELF).double()
    ]]  # fmt: skip
    monkeypatch.setattr(check_shelf, "RATE", 1.1 * check_shelf.RATE)
    make = partial(check_shelf.hub_of, SMALL_SHELF)
    problem, _ = check_shelf._difference(make, SMALL_SHELF, "cpu", False, *expected)
    assert "step 0: parameters are off by" in problem


def test_heads_that_stay_check_nothing(write, monkeypatch):
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: None)
    check_shelf.steps(write, "cpu", "torch", {"small": SMALL_SHELF})
    assert {row["note"] for row in write} == {"no head has moved: nothing was checked"}


def test_two_ranks_are_one_process(write):
    check_ranks.agreement(write, "cpu", "gloo")
    assert write.verdicts == [
        ("2 ranks ep", True), ("2 ranks dp", True), ("one rank, gloo", True)
    ], write  # fmt: skip


def test_ranks_that_send_other_rows_are_seen(write, monkeypatch):
    right = collectives.exchange_rows
    for module in (collectives, hp.parallel.exchange):
        monkeypatch.setattr(module, "exchange_rows", lambda *args: right(*args).flip(0))
    check_ranks.agreement(write, "cpu", "gloo")
    assert [row["ok"] for row in write] == [False, True, False]
    assert "off by" in write[0]["note"]
    assert "rows are those of the experts" in write[2]["note"]


def test_a_rank_that_fails_is_told(write, monkeypatch):
    monkeypatch.setattr(check_ranks, "LAYOUTS", {})
    check_ranks.agreement(write, "cpu", "no_such_backend")
    assert "rank 0: " in write[0]["note"]
    assert "no_such_backend" in write[0]["note"]


def test_a_package_is_a_line_and_another_form_is_no_success(write, monkeypatch):
    def export(model, path, device, input_size, batch=None, format="pt2"):
        if format == "parts":
            raise ValueError("no room")
        form = "dense" if batch else "sparse"
        about = {"tried": [{"form": "cond", "reason": "it cannot be"}]}
        return SimpleNamespace(form=form, largest_difference=1e-7, about=about)

    monkeypatch.setattr(hp, "export", export)
    check_export.packages(write, "cpu")
    assert write[0] == {"name": "package of any batch", "ok": True, "error": 1e-7}
    assert [row["note"] for row in write.failed] == [
        "it became dense: cond: it cannot be", "ValueError: no room"
    ]  # fmt: skip
