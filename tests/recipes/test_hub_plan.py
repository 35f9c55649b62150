"""``hubpath hub plan``: what it says of a tiny hub is what its parts say."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from hubpath_fast.cli import app
from hubpath_fast.recipes import hub_plan
from hubpath_fast.recipes.hub_plan import load_of, plan_hub

HUB = "test_resnet,test_efficientnet,test_byobnet"


def test_rows_memory_and_work_are_those_of_the_experts():
    found = plan_hub(HUB, 2, batch_size=12, k=2, size=64)
    assert (found.dp, found.ep, found.size) == (1, 2, 64)
    assert found.rows == pytest.approx([8.0] * 3)
    for rank in range(2):
        own = [found.costs[i] for i in found.experts_of(rank)]
        assert found.placed.sizes[rank] == sum(c.training_bytes(8) for c in own)
        assert found.placed.work[rank] == pytest.approx(sum(8 * c.work for c in own))
    assert sorted(found.experts_of(0) + found.experts_of(1)) == [0, 1, 2]


def test_a_mean_rank_sends_what_the_formula_says():
    found = plan_hub(HUB, 2, batch_size=12, k=2, size=64)
    assert found.terms["rows"] == 6 * 3 * 64 * 64  # 6 samples, 12 rows, half of them travel
    assert found.terms["outputs"] == found.terms["gradients"] == 6 * 100 * 4
    assert found.sent == sum(found.terms.values())  # in a ring of two each sum is sent once


def test_replicas_share_the_rows_and_sum_the_experts_they_have_twice():
    found = plan_hub(HUB, 4, batch_size=12, k=2, size=64, parallel="2x2")
    assert found.rows == pytest.approx([4.0] * 3)
    parameters = sum(c.parameters for c in found.costs)
    assert found.terms["expert gradients"] == 4 * (parameters // 2)
    copies = plan_hub(HUB, 4, batch_size=12, k=2, size=64, parallel="dp")
    assert copies.placed.owners == (0, 0, 0)
    assert copies.terms["expert gradients"] == 4 * parameters
    assert copies.sent == round(1.5 * sum(copies.terms.values()))
    assert plan_hub(HUB, 4, batch_size=12, size=64).dp == 4  # by itself: ep would leave one idle


def test_one_process_sends_nothing():
    assert plan_hub(HUB, 1, batch_size=12, size=64).sent == 0


def test_the_log_of_a_run_says_the_load(tmp_path):
    lines = [{"step": 10, "rows": [6, 2, 0]}, {"step": 15}, {"step": 20, "rows": [6, 0, 2]}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert load_of(tmp_path, 3) == [0.75, 0.125, 0.125]
    found = plan_hub(HUB, 3, batch_size=12, k=2, size=64, run=tmp_path)
    assert found.rows == pytest.approx([18, 3, 3])
    with pytest.raises(ValueError, match=r"^run: expected rows of 2 experts .* got 3"):
        load_of(tmp_path, 2)
    with pytest.raises(ValueError, match=r"^run: .* has no log that counts the rows"):
        load_of(tmp_path / "none", 3)


def test_measured_times_place_what_counted_ones_would_not(monkeypatch):
    asked = []

    def time(model, size, rows, device):
        asked.append((model.name, size, rows))
        return {"test_resnet": 1.0, "test_efficientnet": 1.5, "test_byobnet": 3.0}[
            model.name.removeprefix("timm/").partition(".")[0]
        ]

    monkeypatch.setattr(hub_plan, "_time", time)
    found = plan_hub(HUB, 2, batch_size=12, k=2, size=64, measure="cpu")
    assert found.placed.owners == (1, 1, 0)
    assert found.placed.work == (3.0, 2.5)
    assert [rows for *_, rows in asked] == [8, 8, 8]
    plan_hub("test_resnet,test_resnet", 2, batch_size=12, size=64, measure="cpu")
    assert len(asked) == 4  # what is alike is timed once


def test_experts_are_timed_on_their_device():
    found = plan_hub("test_resnet,test_byobnet", 2, batch_size=4, size=32, measure="cpu")
    assert found.measured
    assert all(0 < work < 60_000 for work in found.placed.work)


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (r"^ranks: expected an integer of at least 1, got 0", {"ranks": 0}),
        (r"^k: expected an integer in 1\.\.3", {"k": 4}),
        (r"^batch_size: expected a multiple of the 2 ranks, got 13; take 12", {"batch_size": 13}),
        (
            r"^parallel: .* got 4 ranks for 3 experts: rank 3 would be idle; .*--parallel dp",
            {"ranks": 4, "parallel": "ep"},
        ),
        (r"^memory: expected more than [\d,]+ bytes, which the router", {"memory": 1000}),
        (r"^memory: .* needs?, got [\d,]+; .*are the router's\)$", {"memory": 9_000_000}),
        (r"^device: ", {"measure": "tpu"}),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(words, arguments):
    with pytest.raises(ValueError, match=words):
        plan_hub(**{"names": HUB, "ranks": 2, "batch_size": 12, "size": 64} | arguments)


def test_the_command_shows_ranks_and_refuses_in_one_line():
    words = ["hub", "plan", "--hub", HUB, "--ranks", "3", "--size", "64"]
    shown = CliRunner().invoke(app, [*words, "--memory", "1GB"])
    assert shown.exit_code == 0, shown.output
    for text in ("test_byobnet", "3 ranks: expert parallel", "imbalance: ", "a rank sends "):
        assert text in shown.output
    refused = CliRunner().invoke(app, [*words, "--memory", "much"])
    assert refused.exit_code == 2
    assert "memory: expected bytes such as '80GB'" in refused.output
