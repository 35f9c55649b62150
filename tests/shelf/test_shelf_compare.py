"""``hubpath shelf compare`` on a small shelf: its rows, its hub, and what it writes."""

import json

import pytest
import torch
from support.command import hubpath, refused
from support.shelves import make_shelf
from typer.testing import CliRunner

from hubpath_fast.cli import app
from hubpath_fast.cli.shelf.compare import sentences
from hubpath_fast.recipes.shelf_compare import COMPARE, compare
from hubpath_fast.shelf.heads import fit_heads, outputs
from hubpath_fast.shelf.rivals.of_shelf import problem_of
from hubpath_fast.shelf.rivals.routed import routed
from hubpath_fast.shelf.run import ShelfHub, build
from hubpath_fast.shelf.settings import ShelfFitSettings

ROWS = [
    "single", "static", "random", "uniform", "stacked", "knn_image", "knn_features", "knora_e",
    "meta_des", "hub", "oracle",
]  # fmt: skip


def untrained_hub(shelf, models, router="image", k=2):
    """A hub whose heads are the fitted ones, with a router as it starts."""
    torch.manual_seed(0)
    settings = ShelfFitSettings(k=k, router=router, experts=str(len(models)))
    model = build(shelf, models, settings, fit_heads(shelf, models))
    for parameter in model.generator.parameters():  # scores that differ from image to image
        torch.nn.init.normal_(parameter, std=0.5)
    watched = None if router == "image" else shelf.find(router.partition(":")[2])
    return ShelfHub(shelf.folder, shelf, model.eval(), tuple(models), settings, watched)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return make_shelf(tmp_path_factory.mktemp("compare") / "shelf", sizes=(120, 40, 44))


@pytest.fixture(scope="module")
def result(shelf):
    return compare(shelf.folder)


def test_every_rival_has_a_row_and_the_missing_hub_says_how_to_make_one(result):
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == ROWS
    assert (result["k"], result["split"], result["images"]) == (2, "test", 44)
    assert "hubpath shelf fit SHELF" in rows["hub"]["reason"]
    for name in set(ROWS) - {"hub"}:
        assert rows[name]["reason"] is None, name
        assert 0 <= rows[name]["test"]["accuracy"] <= rows["oracle"]["test"]["accuracy"]
    assert [row["name"] for row in result["rows"] if row["bound"]] == ["oracle"]


def test_costs_are_those_of_the_shelf_and_its_heads(shelf, result):
    rows = {row["name"]: row for row in result["rows"]}
    heads = 3 * (5 + 8 + 6 + 7 + 4)
    assert rows["uniform"]["parameters"] == 1000 * (1 + 2 + 3 + 4) + heads
    assert rows["uniform"]["ms"] == 0.5 * (1 + 2 + 3 + 4)
    forwards = {name: row["forwards"] for name, row in rows.items()}
    assert forwards["single"] == forwards["oracle"] == 1
    assert forwards["static"] == forwards["random"] == forwards["knn_image"] == 2
    assert 2 <= forwards["knn_features"] <= 3
    assert forwards["uniform"] == forwards["stacked"] == forwards["meta_des"] == 4
    assert 1 <= forwards["knora_e"] <= 4


def test_what_is_written_is_what_is_returned(shelf, result):
    assert json.loads((shelf.folder / COMPARE).read_text()) == json.loads(json.dumps(result))


def test_the_problem_is_of_the_splits_and_losses_on_training_images_are_out_of_fold(shelf):
    heads = fit_heads(shelf)
    problem = problem_of(shelf, heads, 2, watched=1)
    for split in ("validation", "test"):
        numbers = shelf.splits[split]
        expected = outputs(shelf, heads, numbers, range(4)).log_softmax(-1)
        torch.testing.assert_close(problem.log_probs[split], expected)
        assert torch.equal(problem.targets[split], shelf.targets[numbers])
        assert torch.equal(problem.looks[1].vectors[split], shelf.features(1)[0, numbers])
    expected = torch.tensor([head.loss for head in heads])
    torch.testing.assert_close(problem.train_losses.mean(0), expected, atol=2e-3, rtol=2e-3)
    assert [look.title for look in problem.looks] == ["the image", "the features of model1"]


@pytest.mark.parametrize("router", ["image", "features:model0"])
def test_the_hub_is_scored_and_counted_as_it_runs(shelf, router):
    hub = untrained_hub(shelf, [3, 1, 2], router)
    problem = problem_of(shelf, fit_heads(shelf), 2)
    answer = routed(problem, hub)
    for split in ("validation", "test"):
        numbers = shelf.splits[split].double()
        expected = hub.model(numbers).softmax(-1)
        torch.testing.assert_close(answer.probabilities[split], expected)
    watching = 0 if router == "image" else 1
    assert (answer.asked.sum(1) == 2 + watching).all()
    experts = hub.model.route(shelf.splits["test"].double()).experts
    for row, active in zip(answer.asked, experts.tolist(), strict=True):
        expected = {(3, 1, 2)[i] for i in active} | ({0} if watching else set())
        assert set(row.nonzero()[:, 0].tolist()) == expected
    assert answer.kept.tolist() == [watching, 1, 1, 1]
    assert answer.extra_parameters == sum(
        p.numel() for p in (*hub.model.generator.parameters(), *hub.model.aggregator.parameters())
    )


def test_the_command_prints_the_table_and_what_was_chosen(shelf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = hubpath("shelf", "compare", shelf.folder, "--k", 3).stdout
    for title in ("best single model", "static best 3", "KNORA-E", "META-DES", "oracle (a bound)"):
        assert title in said
    assert "routed hub: there is none yet: hubpath shelf fit SHELF makes one" in said
    rows = {row["name"]: row for row in json.loads((shelf.folder / COMPARE).read_text())["rows"]}
    count, among = (rows["knn_image"]["chosen"][name] for name in ("neighbours", "models"))
    near = f"{count} neighbour{'s' * (count > 1)}"
    assert f"kNN router on image: {among} models, {near} by the image\n" in said
    stack = rows["stacked"]["chosen"]
    assert (
        f"a {stack['form']} of the models' probabilities, weight decay {stack['decay']:g}" in said
    )
    assert f"best single model: {rows['single']['chosen']['models'][0]}\n" in said
    assert "few images: scores are of 44 test images, one of which is 2.3 points," in said
    assert "few images: all is chosen on 40 validation images, one of which is 2.5 po" in said
    assert "intervals" not in said  # without a hub there are none
    assert "the routed hub chooses among" not in said
    assert "44 test images" in said


@pytest.mark.filterwarnings("ignore:the routing hardly depends")  # of 4 steps
def test_a_fitted_hub_is_a_row_that_the_others_are_measured_against(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", sizes=(60, 30, 40))
    hub = tmp_path / "hub"
    hubpath("shelf", "fit", shelf.folder, "--out", hub, "--steps", 4, "--experts", 3, "--k", 1)
    result = compare(shelf.folder, hub)
    rows = {row["name"]: row for row in result["rows"]}
    assert result["k"] == 1  # the hub's
    assert rows["hub"]["title"] == "routed hub, K = 1"
    assert rows["hub"]["forwards"] == 1
    assert (
        "the routed hub chooses among 3 models, the others among all 4 of the shelf"
        in sentences(result)
    )
    told = json.loads((hub / "result.json").read_text())
    assert rows["hub"]["test"]["accuracy"] == pytest.approx(told["test_accuracy"])
    assert rows["hub"]["ms"] > told["ms"] - told["router_ms"] > 0  # the router is timed again
    for row in rows.values():
        if row["name"] != "hub":
            ahead = rows["hub"]["test"]["accuracy"] - row["test"]["accuracy"]
            assert row["ahead"]["points"] == pytest.approx(100 * ahead, abs=1e-9)
            assert row["ahead"]["interval"][0] <= row["ahead"]["points"]
            assert row["ahead"]["interval"][1] >= row["ahead"]["points"]
    other = make_shelf(tmp_path / "other", sizes=(60, 30, 40), seed=1)
    assert "is of the shelf" in refused("shelf", "compare", other.folder, "--hub", hub).replace(
        "\n", " "
    )


def test_stopped_it_says_what_is_kept(shelf, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hubpath_fast.recipes.shelf_compare.every_rival", stop)
    found = CliRunner().invoke(app, ["shelf", "compare", str(shelf.folder)])
    assert found.exit_code == 130
    assert "stopped; heads that are fitted are kept" in found.output


def test_no_line_is_longer_than_a_terminal(shelf, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    said = hubpath("shelf", "compare", shelf.folder).stdout
    assert max(map(len, said.split("written: ")[0].splitlines())) <= 80
    assert "…" not in said


def test_wrong_input_is_said(shelf, tmp_path):
    assert "is no shelf" in refused("shelf", "compare", tmp_path)
    assert "k: expected an integer in 1..4" in refused("shelf", "compare", shelf.folder, "--k", 5)
    assert "holds no hub of a shelf" in refused("shelf", "compare", shelf.folder, "--hub", tmp_path)
    empty = make_shelf(tmp_path / "shelf", sizes=(60, 0, 10))
    assert "no validation images" in refused("shelf", "compare", empty.folder)


def test_of_one_validation_image_rivals_say_why_they_cannot_answer(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", sizes=(12, 1, 0))
    rows = {row["name"]: row for row in compare(shelf.folder)["rows"]}
    reasons = {name: row["reason"] for name, row in rows.items() if row["reason"]}
    assert set(reasons) == {"stacked", "knora_e", "meta_des", "hub"}
    assert reasons["stacked"].startswith("one validation image is not enough")


def test_a_rival_whose_solver_fails_leaves_the_others_their_rows(shelf, monkeypatch):
    def fails(problem):
        raise RuntimeError("value cannot be converted to type float without overflow")

    monkeypatch.setattr("hubpath_fast.shelf.rivals.stacked", fails)
    rows = {row["name"]: row for row in compare(shelf.folder)["rows"]}
    assert rows["stacked"]["reason"].startswith("it failed: value cannot be converted")
    assert rows["uniform"]["test"] is not None


def test_without_test_images_the_validation_images_are_shown(tmp_path):
    shelf = make_shelf(tmp_path / "shelf", sizes=(60, 30, 0))
    result = compare(shelf.folder)
    assert (result["split"], result["images"]) == ("validation", 30)
    assert all(row["test"] is None for row in result["rows"])
    assert "no test images" in sentences(result)[-1]
