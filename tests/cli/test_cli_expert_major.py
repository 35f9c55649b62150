"""``--expert-major`` of predict and evaluate: the answers, their order and the errors of batch by
batch, of runs and of saved hubs."""

import csv

import pytest
from support.command import hubpath, refused
from support.digit_runs import draw_digits, fit_digits, save_spread

from hubpath_fast.model import FixedRoutes
from hubpath_fast.recipes import predict as recipe
from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.runs import measure
from hubpath_fast.runs.folder import open_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return draw_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return fit_digits(digits, tmp_path_factory.mktemp("fit") / "run")


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory):
    """The run's, with routes that differ from image to image."""
    return save_spread(run, tmp_path_factory.mktemp("saved") / "hub")


@pytest.fixture
def photos(digits, tmp_path):
    """75 images, which are more than two batches; three are broken, and the last batch's first."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, path in enumerate(sorted(digits.rglob("*.png"))[:75]):
        (folder / f"{i:03}.png").write_bytes(path.read_bytes())
    for name in ("010.png", "034.png", "064.png"):
        (folder / name).write_bytes(b"no image")
    return folder


def rows_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def assert_equal_rows(found, expected) -> None:
    """Text to the letter, numbers to the six digits that are written, and float32's roundings."""
    assert len(found) == len(expected)
    for row, true in zip(found, expected, strict=True):
        assert row.keys() == true.keys()
        for name, value in row.items():
            if name in ("path", "label", "error", "image", "name") or value == "":
                assert value == true[name]
            else:
                assert float(value) == pytest.approx(float(true[name]), rel=1e-5, abs=2e-6)


@pytest.mark.parametrize("source", ["run", "hub"])
def test_answers_and_errors_are_those_of_batch_by_batch(source, photos, tmp_path, request):
    trained = request.getfixturevalue(source)
    options = [trained, photos, "--classes", "--workers", 0]
    plain = hubpath("predict", *options, "--out", tmp_path / "1.csv", status=1)
    found = hubpath("predict", *options, "--out", tmp_path / "2.csv", "--expert-major", status=1)
    assert found.stderr == plain.stderr
    assert found.stderr.endswith("3 of 75 images could not be read\n")
    rows = rows_of(tmp_path / "2.csv")
    assert [row["path"] for row in rows] == [str(path) for path in sorted(photos.iterdir())]
    assert_equal_rows(rows, rows_of(tmp_path / "1.csv"))
    routes = {tuple(row[name] == "0.0" for name in row if "expert:" in name) for row in rows}
    assert source == "run" or len(routes) > 2


def test_many_images_are_answered_in_parts(run, photos, monkeypatch):
    """As many together as memory holds; a part may have no image that can be read."""
    opened, images = open_run(run), sorted(photos.iterdir())
    expected = list(recipe.predict_each(opened, images))
    image = 3 * 32 * 32 + 2 * 10 * 4  # uint8 pixels, and the outputs of two rows
    for count in (1, 20):
        monkeypatch.setattr(measure, "MEMORY", count * image)
        assert measure.images_at_once(opened.model, opened.task, 32) == count
        found = list(recipe.predict_each(opened, images, expert_major=True))
        assert [(p.given, p.label, p.error) for p in found] == [
            (p.given, p.label, p.error) for p in expected
        ]


@pytest.mark.parametrize("options", [[], ["--top-mass", 0.6]])
def test_evaluate_says_the_same(run, hub, digits, options):
    for asked in ([run], [hub, "--data", digits / "test"]):
        plain = hubpath("evaluate", *asked, "--workers", 0, *options).output
        assert plain.count("accuracy") == 1
        assert (
            hubpath("evaluate", *asked, "--workers", 0, *options, "--expert-major").output == plain
        )
    scores, found = evaluate(run, workers=0), evaluate(run, workers=0, expert_major=True)
    assert found.pop("routes") == scores.pop("routes")
    assert found.pop("loss") == pytest.approx(scores.pop("loss"), rel=1e-6)
    assert found == scores


def test_several_crops_are_refused(run):
    said = refused("evaluate", run, "--crops", 5, "--expert-major")
    assert "crops: expected 1 where experts are asked one after another, got 5" in said


def test_fixed_routes_are_kept(run, photos):
    opened = open_run(run)
    opened.model.generator = FixedRoutes([2, 0], [0.75, 0.25], 3)
    images = sorted(photos.iterdir())
    expected = list(recipe.predict_each(opened, images))
    found = list(recipe.predict_each(opened, images, expert_major=True))
    assert [(p.label, dict(p.experts)) for p in found] == [
        (p.label, dict(p.experts)) for p in expected
    ]
