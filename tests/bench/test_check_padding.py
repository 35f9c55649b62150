"""The checks of padded graphs on a CPU, with a stand-in for what captures, and wrong ones seen."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.bench import chosen_for_cpu, make_hub, normed_expert, small_padding
from torch import nn

from bench import check_padding
from hubpath_fast import functional as HF
from hubpath_fast.executors.graphs import capacities

make = partial(make_hub, budget=10**9)  # 64 pixels: the rows alone would fill the stand-in's


@pytest.fixture(autouse=True)
def graphs_are_stand_ins(monkeypatch):
    chosen_for_cpu(monkeypatch)
    small_padding(monkeypatch)


SMALL = {"small": normed_expert}


@pytest.mark.parametrize("title", check_padding.NETWORKS)
def test_padded_networks_agree(title, write, monkeypatch):
    monkeypatch.delitem(check_padding.FLOOR, "bf16")
    check_padding.agreement(write, "cpu", make, {title: check_padding.NETWORKS[title]})
    assert write.verdicts == [(f"padded {title} float32", True)], write


def test_padded_networks_agree_in_both_precisions(write):
    check_padding.agreement(write, "cpu", make, SMALL)
    assert write.verdicts == [("padded small float32", True), ("padded small bf16", True)], write


def test_what_draws_is_finite(write):
    check_padding.drawing(write, "cpu", make)
    assert write.verdicts == [("padded stochastic depth", True), ("padded dropout", True)], write


def test_statistics_of_all_rows_are_seen(write, monkeypatch):
    """As if the count were the capacity: padded rows are then rows like others."""
    right = HF.masked_batch_norm
    monkeypatch.setattr(
        HF, "masked_batch_norm",
        lambda x, count, *rest, **options: right(
            x, torch.full_like(count, len(x)), *rest, **options
        ),
    )  # fmt: skip
    check_padding.agreement(write, "cpu", make, SMALL)
    assert [row["ok"] for row in write] == [False, False]
    assert "off by" in write[0]["note"]


def test_running_statistics_that_stay_are_seen(write, monkeypatch):
    right = HF.masked_batch_norm
    monkeypatch.setattr(
        HF, "masked_batch_norm",
        lambda x, count, weight, bias, mean, var, *rest, **options: right(
            x, count, weight, bias, mean.clone(), var.clone(), *rest, **options
        ),
    )  # fmt: skip
    check_padding.agreement(write, "cpu", make, SMALL)
    assert "buffers off by" in write[0]["note"]


def test_a_group_that_comes_often_and_is_never_captured_is_named(write, monkeypatch):
    for rule, never in (("OFTEN", 99.0), ("MOVED", -99.0)):
        monkeypatch.setattr(capacities, rule, never)
    check_padding.agreement(write, "cpu", make, SMALL)
    text = "a group of 24 rows is not replayed when it comes 5 times"
    assert [row.get("note") for row in write] == [text, text]


def test_an_expert_that_is_not_padded_is_named(write):
    class Mixes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = normed_expert()

        def forward(self, x):
            return self.body(x)

    check_padding.agreement(write, "cpu", make, {"mixes": Mixes})
    assert "warm_up: experts are not padded: {0: 'itself (Mixes) may mix rows'" in write[0]["note"]


def test_a_warm_up_that_leaves_something_behind_is_seen(write, monkeypatch):
    warm_up = check_padding.hp.HubPathway.warm_up

    def careless(model, x):
        report = warm_up(model, x)
        model.experts[2][1].running_mean.add_(1)
        torch.rand(1)
        return report

    monkeypatch.setattr(check_padding.hp.HubPathway, "warm_up", careless)
    check_padding.agreement(write, "cpu", make, SMALL)
    assert write[0]["note"] == (
        "warm_up: experts.2.1.running_mean has changed, random numbers were drawn"
    )


def test_what_is_not_finite_is_named(write):
    def broken():
        network = normed_expert()
        network[0].weight.data[0, 0, 0, 0] = float("nan")
        return network

    check_padding.drawing(write, "cpu", make, {"broken": broken})
    assert write[0]["note"] == "step 0: prediction are not all finite"


def test_noise_gives_experts_the_rows_that_were_asked_for():
    model = check_padding.hub_of(normed_expert, "sequential", "cpu", make)
    for seed, counts in enumerate(check_padding.COUNTS):
        x, _, noise = check_padding.batch(counts, seed, "cpu")
        assert model(x, noise).routing.counts() == list(counts)
        assert sum(counts) == check_padding.N
