"""``hubpath fit --fallback fixed``: what a run keeps, and what is said of its routing."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.checkpoint_files import all_weights
from support.command import hubpath, refused

from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.files import write_json
from hubpath_fast.model import FixedRoutes
from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.recipes.predict import predict
from hubpath_fast.runs.folder import RunFolder, open_run

FIT = [
    "fit", "--hub", "test_resnet,test_efficientnet,test_byobnet", "--no-pretrained",
    "--image-size", 32, "--batch-size", 16, "--workers", 0, "--no-flip", "--steps", 3,
]  # fmt: skip
NAMES = ["test_resnet", "test_efficientnet", "test_byobnet"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_image_folder(DigitsTask(0, 30), tmp_path_factory.mktemp("digits"), limit=30)


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("fit") / "run"
    return out, hubpath(*FIT, "--data", folder, "--out", out).output


@pytest.fixture
def again(run, tmp_path):
    """A copy of the finished run."""
    return shutil.copytree(run[0], tmp_path / "run")


def result_of(out):
    return json.loads((out / "result.json").read_text())


def prefers_fixed(result):
    routing = result["routing"]
    return routing["fixed"]["value"] >= routing["learned"]["value"]


def test_a_run_says_where_images_go_and_whether_that_pays(run):
    out, output = run
    result = result_of(out)
    routing, routes = result["routing"], result["routes"]
    assert sum(routes["share"]) == pytest.approx(2)
    assert routes == evaluate(out)["routes"]
    assert (routing["split"], routing["images"], routing["kept"]) == ("validation", 30, "learned")
    assert routing["learned"]["value"] == pytest.approx(result["best_validation"], abs=1 / 30)
    assert routing["fixed"]["sets"] == 3
    lines = output.splitlines()
    assert f"routing {routing['sentence']}" in lines
    assert f"{routes['sets']} different set" in next(x for x in lines if x.startswith("routes "))
    assert any("the most trusted one has accuracy" in line for line in lines)
    hint = "--resume --fallback fixed keeps" in output
    assert hint == prefers_fixed(result)
    assert not (out / "routes.json").exists()
    record = RunFolder(out).history()[-1]
    assert set(record["routes"]) == {
        "share",
        "sets",
        "mutual_information",
        "weight",
        "entropy_fraction",
    }


def test_a_finished_run_can_be_asked_to_decide_and_opens_as_what_it_keeps(run, again, folder):
    before = result_of(again)
    assert prefers_fixed(before)  # three steps teach no router to do better than its best set
    weights = all_weights(again / "best")
    output = hubpath("fit", "--resume", "--fallback", "fixed", "--out", again).output
    after = result_of(again)
    fixed = after["routing"]["fixed"]
    assert f"kept: {' and '.join(fixed['names'])} for every image, without the router" in output
    assert after["routing"] == {**before["routing"], "kept": "fixed"}
    assert all_weights(again / "best") == weights
    assert RunFolder(again).history() == RunFolder(run[0]).history()
    assert after["routes"]["sets"] == 1
    assert [after["routes"]["share"][i] for i in fixed["experts"]] == [1, 1]

    opened, learned = open_run(again), open_run(run[0])
    assert isinstance(opened.model.generator, FixedRoutes)
    by_hand = learned.model
    by_hand.generator = FixedRoutes(fixed["experts"], fixed["weights"], 3)
    x = torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(opened.model(x), by_hand(x))

    scores = evaluate(again)
    assert scores["accuracy"] == after["test_accuracy"]
    assert scores["routes"] == after["routes"]
    images = sorted((folder / "test").rglob("*.png"))[:5]
    for answer in predict(again, images):
        assert sorted(answer.experts) == sorted(fixed["names"])
    hubpath("report", again)
    page = (again / "report" / "report.html").read_text()
    assert "Does routing pay?" in page
    assert "This run keeps them in place of its router" in page

    # And back: everything is as it was.
    hubpath("fit", "--resume", "--fallback", "none", "--out", again)
    assert not (again / "routes.json").exists()
    assert result_of(again) == before


def test_a_new_run_trains_alike_and_decides_at_its_end(run, folder, tmp_path):
    out = tmp_path / "run"
    hubpath(*FIT, "--data", folder, "--out", out, "--fallback", "fixed")
    weights = [all_weights(place / "best") for place in (out, run[0])]
    assert weights[0] == weights[1]
    result = result_of(out)
    assert result["routing"]["kept"] == "fixed"
    kept = json.loads((out / "routes.json").read_text())
    assert sorted(kept["experts"]) == result["routing"]["fixed"]["experts"]
    accuracy = result["test_accuracy"]
    hubpath("fit", "--resume", "--out", out)  # of a finished run: the same again
    assert result_of(out) == result
    assert accuracy == evaluate(out)["accuracy"]


def test_the_report_has_all_numbers(run):
    hubpath("report", run[0])
    figures, routing = run[0] / "report" / "figures", result_of(run[0])["routing"]
    lines = (figures / "routing.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [
        "learned routes", f"always {' + '.join(routing['fixed']['names'])}", "random routes",
        *(f"{name} alone" for name in NAMES),
    ]  # fmt: skip
    first, fixed = (line.split(",") for line in lines[1:3])
    assert [float(cell) for cell in first[1:4]] == list(routing["learned"].values())
    assert [float(cell) for cell in fixed[4:]] == list(routing["added"]["fixed"].values())
    page = (run[0] / "report" / "report.html").read_text()
    assert "of the validation images); the mutual information of route and class is" in page
    assert (figures / "routing.png").is_file()


def test_without_validation_images_nothing_is_decided(folder, tmp_path):
    source = shutil.copytree(folder, tmp_path / "data")
    shutil.rmtree(source / "val", ignore_errors=True)
    shutil.rmtree(source / "validation", ignore_errors=True)
    out = tmp_path / "run"
    options = [*FIT, "--data", source, "--out", out, "--validation", 0]
    assert (
        "fallback: fixed is decided on validation images, and there are none; give --validation a "
        "share above 0"
    ) in refused(*options, "--fallback", "fixed")
    output = hubpath(*options).output
    assert "routing whether routing pays was not looked at: there are no validation" in output
    routing = result_of(out)["routing"]
    assert (routing["pays"], routing["kept"]) == (None, "learned")
    hubpath("report", out)
    page = (out / "report" / "report.html").read_text()
    assert "Whether routing pays was not looked at" in page


def test_where_all_experts_are_asked_there_is_nothing_to_choose(folder, tmp_path):
    out = tmp_path / "run"
    options = [*FIT, "--data", folder, "--out", out, "--k", 3, "--fallback", "fixed"]
    output = hubpath(*options).output
    assert "routing routing has nothing to choose: all 3 of 3 experts are asked" in output
    assert "kept: the learned routes (there was nothing to choose)" in output
    assert result_of(out)["routing"]["kept"] == "learned"
    hubpath("report", out)
    assert (out / "report" / "figures" / "routing.csv").is_file()


def test_each_seed_decides_for_itself(folder, tmp_path):
    out = tmp_path / "seeds"
    options = [*FIT, "--data", folder, "--out", out, "--seeds", "0,1"]
    hubpath(*options)
    assert not list(out.glob("*/routes.json"))
    output = hubpath(*options, "--resume", "--fallback", "fixed").output
    whole = result_of(out)
    for seed in (0, 1):
        result = result_of(out / f"seed-{seed}")
        assert result == whole["runs"][seed]
        kept = result["routing"]["kept"]
        assert kept == ("fixed" if prefers_fixed(result) else "learned")
        assert (out / f"seed-{seed}" / "routes.json").is_file() == (kept == "fixed")
        words = "these experts for every image" if kept == "fixed" else "the learned routes"
        assert f"seed {seed}: {result['routing']['sentence']}; kept: {words}\n" in output
    assert "over the best fixed experts of each seed, routing is " in output
    again = hubpath(*options, "--resume", "--fallback", "fixed").output
    assert again.count(" is done: ") == 2


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ({"experts": [0, 3], "weights": [0.5, 0.4]}, "experts: expected different numbers in 0..2"),
        ({"experts": [0]}, "is damaged (it lacks 'weights')"),
        ({"experts": 0, "weights": [0.5]}, "experts: expected a list, got 0"),
        ({"experts": [0], "weights": [-1]}, "weights: expected 1 finite numbers above 0"),
    ],
)
def test_damaged_routes_are_named(again, held, text):
    write_json(again / "routes.json", held)
    said = refused("evaluate", again)
    assert str(again / "routes.json") in said
    assert text in said


def test_routes_of_a_deleted_run_are_not_taken_over(folder, tmp_path):
    """Only they are left in the folder, and the new run is stopped before its end."""
    out = tmp_path / "run"
    write_json(out / "routes.json", {"experts": [0], "weights": [0.5]})
    hubpath(*FIT, "--data", folder, "--out", out)
    assert not (out / "routes.json").exists()
