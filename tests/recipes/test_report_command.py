"""``hubpath report``: what it says of a run and of a comparison, worked out here once more."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from hubpath_fast.compare import compare
from hubpath_fast.compare.settings import make_settings
from hubpath_fast.data import open_images
from hubpath_fast.data.digits import DigitsTask, write_image_folder
from hubpath_fast.recipes.analysis import report, scores_alone
from hubpath_fast.recipes.fit import fit
from hubpath_fast.runs.build import eval_batches
from hubpath_fast.runs.folder import open_run
from hubpath_fast.runs.resolve import settings as fit_settings
from hubpath_fast.tasks.classification import Classification

QUIET = Console(quiet=True)
HUB = "test_resnet,test_efficientnet"
TOP = {"pretrained": False, "image_size": 32, "workers": 0, "k": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_image_folder(DigitsTask(0, 30), tmp_path_factory.mktemp("data") / "digits", 30)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    top = {**TOP, "data": str(data), "hub": HUB.split(",")}
    fit(fit_settings(out, False, None, top, {"steps": 3, "batch_size": 8}), out, console=QUIET)
    return out


@pytest.fixture(scope="module")
def comparison(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("compare") / "out"
    settings = make_settings(str(data), HUB, top=TOP, trainer={"steps": 2, "batch_size": 8})
    compare(settings, "single,hub-pathway,k-sweep,zoo-tuning", (1,), out, 1, QUIET)
    return out


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with open(folder / "figures" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_of_a_run(run, tmp_path):
    page = report(run)
    assert page == run / "report" / "report.html"
    text = page.read_text()
    assert "Hub-Pathway on digits" in text
    assert "the hub&#39;s own experts" in text
    assert "accuracy_over_k" not in {p.stem for p in (run / "report/figures").iterdir()}
    counts = [list(row.values())[1:] for row in table(page.parent, "confusion")]
    right = sum(int(counts[i][i]) for i in range(10))
    result = json.loads((run / "result.json").read_text())
    assert right / result["test_images"] == pytest.approx(result["test_accuracy"])


@pytest.mark.parametrize(("trained_on", "executor"), [("cpu", "threads"), ("cuda", "auto")])
def test_a_run_keeps_its_executor_on_devices_of_its_kind(run, tmp_path, trained_on, executor):
    copied = shutil.copytree(run, tmp_path / "run")
    record = json.loads((copied / "fit.json").read_text())
    record["config"]["executor"] = "threads"
    record["config"]["trainer"]["device"] = trained_on
    (copied / "fit.json").write_text(json.dumps(record))
    assert open_run(copied, "cpu").model.executor == executor


def test_scores_alone_are_each_experts_own(run):
    opened = open_run(run)
    splits = open_images(opened.config.data, opened.config.validation, 0)
    batches = eval_batches(splits.test, opened.config, opened.image_size)
    found = scores_alone(Classification(tuple(opened.classes)), opened.model, batches, "cpu")
    images = torch.cat([x for x, _ in batches])
    targets = torch.tensor(splits.test.targets)
    model = opened.model
    for i, expert in enumerate(model.experts):
        unit = images.double() / 255
        mean, std = (b[i].double().view(1, -1, 1, 1) for b in (model.input_mean, model.input_std))
        with torch.no_grad():
            own = expert.double()((unit - mean) / std).argmax(dim=1) == targets
        expert.float()
        assert (own == found[i]).float().mean() > 0.95  # float32 may decide near-ties otherwise


def test_of_a_comparison(comparison):
    folder = report(comparison).parent
    outputs = load_file(comparison / "runs/seed-1/pathway/outputs.safetensors")
    shown = {row["expert"]: float(row["mean weight"]) for row in table(folder, "mean_weight")}
    assert list(shown.values()) == pytest.approx(outputs["weights"].mean(dim=0).tolist())
    over_k = table(folder, "accuracy_over_k")
    rows = json.loads((comparison / "table.json").read_text())["rows"]
    by_name = {row["method"]: row for row in rows}
    accuracies = {int(r["K"]): float(r["mean"]) for r in over_k}
    assert accuracies == pytest.approx(
        {1: by_name["hub-pathway"]["mean"], 2: by_name["hub-pathway-k2"]["mean"]}
    )
    alone = torch.stack(
        [
            load_file(comparison / f"runs/seed-1/single-{i}/outputs.safetensors")["test"].argmax(1)
            for i in range(2)
        ]
    )
    targets = load_file(comparison / "runs/seed-1/targets.safetensors")["test"]
    known = (alone == targets).any(dim=0)
    quality = table(folder, "weight_quality")[0]
    assert int(quality["counted"]) == int(known.sum())
    assert "each expert fine-tuned alone" in (folder / "report.html").read_text()


def test_a_comparison_says_whether_routing_pays(comparison):
    result = json.loads((comparison / "runs/seed-1/pathway/result.json").read_text())
    routing = result["routing"]
    assert routing["learned"]["value"] == pytest.approx(
        result["validation"]["accuracy"], abs=1 / routing["images"]
    )
    assert routing["test"]["learned"] == pytest.approx(result["test"]["accuracy"])
    said = f"eed 1: {routing['sentence']}."
    assert said in (comparison / "table.md").read_text()
    assert said in (comparison / "table.html").read_text()
    assert "routing" not in json.loads(
        (comparison / "runs/seed-1/pathway-k2/result.json").read_text()
    )
    page = report(comparison).read_text()
    assert "Does routing pay?" in page
    assert routing["sentence"][1:] in page


def test_into_another_folder(comparison, tmp_path):
    assert report(comparison, tmp_path / "here") == tmp_path / "here" / "report.html"


def test_other_images_are_not_shown_beside_a_comparisons_figures(comparison, data, tmp_path):
    copied = shutil.copytree(comparison, tmp_path / "out")
    other = write_image_folder(DigitsTask(1, 30), tmp_path / "digits", 30)
    text = (copied / "compare.json").read_text()
    (copied / "compare.json").write_text(text.replace(str(data), str(other)))
    with pytest.raises(ValueError, match="the data is not what it was"):
        report(copied)


@pytest.mark.parametrize("text", ["{}", "[]", "5", '{"settings": 5}', '{"settings": '])
def test_a_damaged_comparison_is_named(tmp_path, text):
    (tmp_path / "compare.json").write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        report(tmp_path)


def test_of_nothing(tmp_path, data):
    with pytest.raises(
        ValueError, match="holds neither a run of `hubpath fit` nor one of `hubpath compare`"
    ):
        report(tmp_path)
    out = tmp_path / "out"
    settings = make_settings(str(data), HUB, top=TOP, trainer={"steps": 1, "batch_size": 8})
    compare(settings, "single", (0,), out, 1, QUIET)
    with pytest.raises(ValueError, match="holds no finished Hub-Pathway; compare it as well"):
        report(out)
    (out / "table.json").unlink()
    with pytest.raises(ValueError, match="holds no table yet"):
        report(out)
