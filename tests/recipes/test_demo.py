"""The demo at its smallest: the files it writes, what is in them, and its cache."""

import io
import json
import re

import pytest
import torch
from rich.console import Console

from hubpath_fast.compare.digits_hub import Pretraining, pretrained_experts
from hubpath_fast.data import RENDERINGS, DigitsTask, TensorBatches
from hubpath_fast.hub import create_model, split_parameters
from hubpath_fast.recipes.demo import DemoSettings, Row, demo, vote_rows
from hubpath_fast.runs.measure import dense_weights, inference_costs

SMALL = DemoSettings(pretraining=Pretraining(epochs=1), epochs=1)


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
    names = ("best_single", "ensemble", "ensemble_top_k", "hub_pathway", "oracle")
    assert all(0 <= summary[name] <= 1 for name in names)
    assert summary["oracle"] >= max(summary["singles"].values()) >= summary["best_single"]
    assert summary["best_single_in_hindsight"] == max(summary["singles"].values())
    assert list(summary["singles"]) == list(RENDERINGS)
    assert summary["seed"] == 0
    assert summary["test_images"] == 797
    assert json.loads((out / "summary.json").read_text()) == summary


def test_the_table_and_the_page_show_the_same_numbers(finished):
    out, summary, printed, _ = finished
    assert re.search(rf"Hub-Pathway +│ +{summary['hub_pathway']:.3f} ", printed)
    assert re.search(rf"oracle +│ +{summary['oracle']:.3f} ", printed)
    page = (out / "report.html").read_text()
    assert f"{summary['hub_pathway']:.1%} of 797 test digits" in page
    assert page.count("<img ") >= 5


def test_a_second_start_uses_the_cache_and_gives_the_same_numbers(finished, tmp_path):
    _, summary, _, cache = finished
    console = quiet()
    again = demo(tmp_path / "again", seed=0, settings=SMALL, console=console, cache=cache)
    assert again["pretrain_seconds"] == 0
    assert "come from the cache" in console.file.getvalue()
    changing = {"seconds", "pretrain_seconds"}
    assert {k: v for k, v in again.items() if k not in changing} == {
        k: v for k, v in summary.items() if k not in changing
    }


def test_a_damaged_cache_is_noticed_and_mended(finished, tmp_path):
    cache = finished[3]
    task, console = DigitsTask(0, 60), quiet()
    make, seconds = pretrained_experts(task, SMALL.pretraining, 10, console, cache)
    assert seconds == 0
    weights = next(cache.glob("digits/edges-*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    again, seconds = pretrained_experts(task, SMALL.pretraining, 10, console, cache)
    assert seconds > 0
    assert "is damaged; pre-training it anew" in " ".join(console.file.getvalue().split())
    assert weights.read_bytes() == whole  # pre-training is reproducible to the bit
    for a, b in zip(make(), again(), strict=True):
        for p, q in zip(split_parameters(a.module)[0], split_parameters(b.module)[0], strict=True):
            assert torch.equal(p, q)


def test_the_best_are_chosen_on_validation_alone():
    """Model 1 is best on validation though model 0 is on test; only "in hindsight" looks there."""
    targets = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    wrong = sure.flip(1)
    half = torch.stack([sure[0], wrong[1], sure[2], wrong[3]])
    probabilities = torch.stack([sure, half, wrong])
    singles = [Row(str(i), p.argmax(1) == targets, 1, 2.0) for i, p in enumerate(probabilities)]
    rows = {row.name: row for row in vote_rows(1, singles, [0.1, 0.9, 0.2], probabilities, targets)}
    assert rows["best single"].accuracy == 0.5
    assert rows["ensemble of the best 1"].accuracy == 0.5
    assert rows["best single, in hindsight"].accuracy == 1.0
    assert rows["oracle"].accuracy == 1.0
    assert [name for name, row in rows.items() if row.bound] == [
        "best single, in hindsight", "oracle",
    ]  # fmt: skip
    assert rows["ensemble, soft vote"].forwards == 3
    assert rows["best single"].seconds == 6.0


def test_dense_weights_are_zero_where_inactive():
    torch.manual_seed(0)
    model = create_model(["test_resnet"] * 3, 10, pretrained=False, input_size=32).eval()
    test = DigitsTask(0).test.subset(torch.arange(5))
    weights = dense_weights(model, TensorBatches(test, batch_size=2), "cpu")
    assert weights.shape == (5, 3)
    assert (weights > 0).sum(dim=1).tolist() == [2] * 5


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
