"""The demo at its smallest: the files it writes, and what is in them."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from hubpath_fast.baselines import SingleModel
from hubpath_fast.baselines.costs import inference_costs
from hubpath_fast.data import RENDERINGS, DigitsTask, TensorBatches
from hubpath_fast.hub import build_experts, create_model
from hubpath_fast.recipes.demo import demo, demo_settings
from hubpath_fast.runs.measure import predict
from hubpath_fast.tasks import Classification

# 8 steps, and a pass over each expert's 700 digits before.
FIT = demo_settings().fit
SMALL = demo_settings().replace(
    fit=FIT.replace(trainer=FIT.trainer.replace(steps=8)), digits_pretrain_epochs=1
)


def quiet():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One demo of a few steps: its folder, its summary, what it printed, and its cache."""
    out, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache")
    console = quiet()
    summary = demo(out, seed=0, settings=SMALL, console=console, cache=cache)
    return out, summary, console.file.getvalue(), cache


def test_the_summary_has_the_promised_keys_and_is_on_disk(finished):
    out, summary, _, _ = finished
    assert set(summary) == {
        "best_single", "ensemble", "ensemble_hard", "ensemble_top_k", "hub_pathway", "oracle",
        "best_single_in_hindsight", "singles", "rates", "networks", "seconds", "pretrain_seconds",
        "seed", "k", "test_images",
    }  # fmt: skip
    assert summary["oracle"] >= max(summary["singles"].values()) >= summary["best_single"]
    assert summary["best_single_in_hindsight"] == max(summary["singles"].values())
    assert list(summary["singles"]) == list(RENDERINGS)
    assert summary["rates"] == {"body": 5e-4, "head": 3e-3, "router": 1e-2}
    assert (summary["seed"], summary["k"], summary["test_images"]) == (0, 2, 797)
    assert summary["pretrain_seconds"] > 0
    assert json.loads((out / "summary.json").read_text()) == summary


def test_the_table_and_the_page_show_the_same_numbers(finished):
    out, summary, printed, _ = finished
    assert re.search(rf"Hub-Pathway +│ +{100 * summary['hub_pathway']:.1f} ", printed)
    assert re.search(rf"oracle +│ +{100 * summary['oracle']:.1f} ", printed)
    page = (out / "report.html").read_text()
    assert f"{summary['hub_pathway']:.1%} of 797 test digits" in page
    assert page.count("<img ") >= 5


def test_a_line_for_every_run_where_there_is_no_terminal(finished):
    lines = [line for line in finished[2].splitlines() if line.startswith("[")]
    assert [line.split("]")[0] for line in lines] == [f"[{i}/11" for i in range(1, 12)]
    runs = sorted(re.search(r"seed 0: (\S+):", line)[1] for line in lines)
    assert runs == [
        "hub-pathway", *(f"pretrain-{i}" for i in range(5)),
        *sorted(f"single:{name}" for name in RENDERINGS),
    ]  # fmt: skip


def test_a_second_start_uses_the_cache_and_gives_the_same_numbers(finished, tmp_path):
    out, summary, _, cache = finished
    again = demo(out, seed=0, settings=SMALL, console=quiet(), cache=cache)
    changing = ("seconds", "pretrain_seconds")
    assert again["pretrain_seconds"] == 0
    assert {**again, **{key: summary[key] for key in changing}} == summary


def test_one_that_was_stopped_goes_on_and_a_finished_one_is_replaced(finished):
    out, summary, _, cache = finished
    run = out / "runs/seed-0/single-3/result.json"
    before = run.stat().st_mtime_ns
    (out / "summary.json").unlink()
    console = quiet()
    demo(out, seed=0, settings=SMALL, console=console, cache=cache)
    assert "6 runs, 6 of them finished" in console.file.getvalue()
    assert run.stat().st_mtime_ns == before
    assert json.loads((out / "summary.json").read_text())["singles"] == summary["singles"]


def test_routing_is_asked_once_and_its_weights_are_zero_where_inactive():
    torch.manual_seed(0)
    model = create_model(["test_resnet"] * 3, 10, pretrained=False, input_size=32).eval()
    test = DigitsTask(0).test.subset(torch.arange(5))
    calls = []
    model.generator.register_forward_hook(lambda *_: calls.append(1))
    task = Classification(test.classes)
    predictions, weights = predict(model, task, TensorBatches(test, batch_size=2), "cpu")
    assert len(calls) == 3  # batches
    assert weights.shape == (5, 3)
    assert (weights > 0).sum(dim=1).tolist() == [2] * 5
    with torch.no_grad():
        assert torch.allclose(predictions, model(test.images).softmax(dim=1), atol=1e-6)
    [expert] = build_experts(["test_resnet"], 10, pretrained=False, input_size=32)
    assert predict(SingleModel(expert), task, TensorBatches(test), "cpu")[1] is None


def test_an_active_expert_is_told_from_the_others_where_its_weight_underflows():
    model = create_model(["test_resnet"] * 3, 10, pretrained=False, input_size=32).eval()
    scores = torch.tensor([[0.0, 500.0, -1.0]])
    model.generator.forward = lambda x: (scores.repeat(len(x), 1), scores.repeat(len(x), 1))
    test = DigitsTask(0).test.subset(torch.arange(4))
    _, weights = predict(model, Classification(test.classes), TensorBatches(test), "cpu")
    assert (weights > 0).tolist() == [[True, True, False]] * 4


def test_costs_are_those_of_the_experts_that_are_asked():
    torch.manual_seed(0)
    model = create_model(["test_resnet"] * 3, 10, pretrained=False, input_size=32, k=2)
    images = DigitsTask(0).test.images[:6]
    costs = inference_costs(model, images)
    assert costs["forwards_per_sample"] == 2
    alone = inference_costs(model.experts[0], images.float())["gflops_per_sample"]
    generator = inference_costs(model.generator, images.float())["gflops_per_sample"]
    aggregation = 2 * 2 * 10 * 10 / 1e9  # two rows of 10 outputs by a 10 x 10 matrix
    rest = costs["gflops_per_sample"] - 2 * alone - generator
    assert 0 <= rest <= 2 * aggregation + 1e-12
    assert costs["milliseconds_per_sample"] > 0


def test_a_folder_with_other_things_is_refused_and_kept(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .*no demo \(thesis\.tex\)"):
        demo(tmp_path, console=quiet())
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    with pytest.raises(ValueError, match="is a file"):
        demo(tmp_path / "thesis.tex", console=quiet())
