"""``hubpath predict`` on what people give it: many images, broken ones among them, into files."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import stat
import sys
from itertools import count

import pytest
import torch
from PIL import Image
from support.command import hubpath, refused
from support.digit_runs import draw_digits, fit_digits
from typer.testing import CliRunner

from hubpath_fast.cli import app
from hubpath_fast.data import DataError
from hubpath_fast.hub import expert_names
from hubpath_fast.recipes import predict as recipe
from hubpath_fast.recipes.evaluate import evaluate
from hubpath_fast.recipes.predict import AHEAD, BATCH, predict, predict_each
from hubpath_fast.runs.folder import open_run

NAMES = ["test_resnet #1", "test_vit", "test_resnet #2"]
# Written with six digits of a value below 1.
ROUNDED = 5e-7


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return draw_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return fit_digits(digits, tmp_path_factory.mktemp("fit") / "run")


@pytest.fixture
def photos(digits, tmp_path, monkeypatch):
    """70 images, which are more than two batches; three of them are broken."""
    monkeypatch.chdir(tmp_path)
    images = sorted(digits.rglob("*.png"))
    for i, path in enumerate(images[:70]):
        (tmp_path / "photos" / str(i % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / f"photos/{i % 3}/{i:03}.png").write_bytes(path.read_bytes())
    broken = [tmp_path / "photos" / name for name in ("1/010.png", "1/034.png", "2/068.png")]
    broken[0].write_bytes(b"no image")
    broken[1].write_bytes(broken[1].read_bytes()[:60])  # cut short
    broken[2].write_bytes(b"")
    return tmp_path / "photos"


def rows_of(path) -> list[dict]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_broken_images_do_not_lose_the_others(run, photos):
    result = hubpath("predict", run, "photos", status=1)
    lines = result.stdout.splitlines()
    answered = [line.partition(": ")[0] for line in lines]
    everything = sorted(str(p.relative_to(photos.parent)) for p in photos.rglob("*.png"))
    broken = [os.path.join("photos", *name.split("/")) for name in
              ("1/010.png", "1/034.png", "2/068.png")]  # fmt: skip
    assert answered == [path for path in everything if path not in broken]
    assert all("; experts: " in line for line in lines)
    *named, last = result.stderr.splitlines()
    assert len(named) == 3
    for path, line in zip(broken, named, strict=True):
        assert line.startswith("error: ")
        assert path in line
    assert last == "3 of 70 images could not be read"
    # One alone says the same of itself as among others.
    [line] = hubpath("predict", run, answered[0]).stdout.splitlines()
    assert line == lines[0]


def test_a_run_without_its_best_weights_says_so(run, photos, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    assert hubpath("predict", tmp_path / "copy", "photos/0/000.png").stderr == ""
    shutil.rmtree(tmp_path / "copy/best")
    result = hubpath("predict", tmp_path / "copy", "photos/0/000.png")
    assert result.stderr.startswith(f"note {tmp_path / 'copy/best'} is gone: the weights are")
    assert len(result.stdout.splitlines()) == 1


def test_workers_change_nothing(run, photos):
    opened = open_run(run)
    images = sorted(photos.rglob("*.png"))
    found = [list(predict_each(opened, images, workers)) for workers in (0, 1, 5)]
    assert found[0] == found[1] == found[2]
    assert [p.path for p in found[0]] == images
    assert sum(p.error is None for p in found[0]) == 67


def test_predictions_are_those_of_evaluate(run, digits, tmp_path):
    """Label and probabilities of each image against its class: evaluate's accuracy and loss."""
    out = tmp_path / "answers.csv"
    hubpath("predict", run, digits / "test", "--out", out, "--classes", "--workers", 2)
    rows = rows_of(out)
    truth = [os.path.basename(os.path.dirname(row["path"])) for row in rows]
    right = sum(row["label"] == true for row, true in zip(rows, truth, strict=True))
    losses = [-math.log(float(row[f"class:{true}"])) for row, true in zip(rows, truth, strict=True)]
    scores = evaluate(run)
    assert len(rows) == scores["n"] == 60
    assert right / 60 == scores["accuracy"]
    # Six digits of each probability, and float32 sums of batches of another size.
    assert sum(losses) / 60 == pytest.approx(scores["loss"], rel=1e-5)


def test_csv_has_a_row_an_image_with_stable_columns(run, photos):
    images = ["photos", "photos/0/000.png", "nothing.png", "*.gif"]
    result = hubpath("predict", run, *images, "--out", "new/answers.csv", status=1)
    assert result.stdout == "68 of 73 images answered in new/answers.csv\n"
    rows = rows_of("new/answers.csv")
    columns = ["path", "label", "probability", "error", *(f"expert:{name}" for name in NAMES)]
    assert list(rows[0]) == columns
    assert [row["path"] for row in rows[-3:]] == images[1:]
    expected = {p.path: p for p in predict(run, [r["path"] for r in rows if not r["error"]])}
    for row in rows:
        if row["error"]:
            assert {row[name] for name in columns[1:3] + columns[4:]} == {""}
            continue
        found = expected[recipe.Path(row["path"])]
        assert row["label"] == found.label
        assert float(row["probability"]) == pytest.approx(found.probability, abs=ROUNDED)
        for name in NAMES:
            weight = found.experts.get(name, 0)
            assert float(row[f"expert:{name}"]) == pytest.approx(weight, abs=ROUNDED)
    errors = {row["path"]: row["error"] for row in rows if row["error"]}
    assert len(errors) == 5
    assert errors["nothing.png"] == "nothing.png: no such file"
    assert errors["*.gif"] == "*.gif: no file matches this pattern"


def test_json_lines_hold_the_same(run, photos):
    for name in ("a.csv", "a.jsonl"):
        hubpath("predict", run, "photos", "--out", name, "--classes", status=1)
    rows = rows_of("a.csv")
    with open("a.jsonl", encoding="utf-8") as file:
        records = [json.loads(line) for line in file]
    assert len(records) == len(rows) == 70
    for row, record in zip(rows, records, strict=True):
        assert list(record) == ["path", "label", "probability", "error", "experts", "classes"]
        assert (row["path"], row["error"]) == (record["path"], record["error"] or "")
        if record["error"] is not None:
            assert {record[k] for k in ("label", "probability", "experts", "classes")} == {None}
            continue
        assert list(record["experts"]) == NAMES
        assert row["label"] == record["label"] == max(record["classes"], key=record["classes"].get)
        assert float(row["probability"]) == record["probability"] == max(record["classes"].values())
        for kind, values in (("expert", record["experts"]), ("class", record["classes"])):
            assert {n: float(row[f"{kind}:{n}"]) for n in values} == values
        assert sum(record["classes"].values()) == pytest.approx(1, abs=10 * ROUNDED)


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="such names are not allowed there")
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_names_survive(run, digits, tmp_path, monkeypatch, ending):
    monkeypatch.chdir(tmp_path)
    names = ["a, b.png", 'q"u"o.png', "two\nlines.png", "\r.png", "Ä鳥.png", "a[1].png", "= 1;.png"]
    source = next(digits.rglob("*.png")).read_bytes()
    for name in [*names, b"bytes\xff.png"]:
        with open(name, "wb") as file:
            file.write(source)
    # As a shell gives it to Python.
    result = hubpath("predict", run, *names, os.fsdecode(b"bytes\xff.png"), "--out", f"o.{ending}")
    assert "8 of 8" in result.stdout
    if ending == "csv":
        found = [row["path"] for row in rows_of("o.csv")]
        assert found == [*names, "bytes\\udcff.png"]
    else:
        lines = (tmp_path / "o.jsonl").read_bytes().decode("utf-8").split("\n")
        assert [json.loads(line)["path"] for line in lines[:-1]] == [*names, "bytes\udcff.png"]
    shown = hubpath("predict", run, *names, os.fsdecode(b"bytes\xff.png")).stdout.splitlines()
    assert len(shown) == 8
    assert shown[2].startswith("two\\nlines.png: ")
    assert shown[-1].startswith("bytes\\udcff.png: ")


def test_a_list_on_standard_input(run, photos):
    data = b"photos/0/000.png\r\nphotos/1\r\n"
    result = CliRunner().invoke(app, ["predict", str(run), "-"], input=data)
    assert result.exit_code == 1
    assert len(result.stdout.splitlines()) == 1 + 21  # of 23, two of which are broken
    nothing = CliRunner().invoke(app, ["predict", str(run), "-"], input=b"\n")
    assert (nothing.exit_code, nothing.stdout) == (2, "")
    assert "standard input lists no paths" in nothing.stderr


def test_a_stop_keeps_what_was_written(run, photos, monkeypatch):
    asked, load = count(), recipe.load_image

    def load_image(path):
        if next(asked) == 2 * BATCH + 3:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(recipe, "load_image", load_image)
    options = ["--out", "a.csv", "--workers", 0]
    said = hubpath("predict", run, "photos", *options, status=130).stderr
    assert f"stopped after {2 * BATCH} of 70 images; a.csv holds their rows" in said
    assert len(rows_of("a.csv")) == 2 * BATCH


@pytest.mark.parametrize("workers", [0, 3])
def test_memory_does_not_grow_with_the_images(run, digits, workers):
    taken, image = count(), next(digits.rglob("*.png"))
    endless = (image for _ in taken)
    predictions = predict_each(open_run(run), endless, workers)
    for _ in range(3 * BATCH):
        assert next(predictions).error is None
    assert next(taken) <= 3 * BATCH + AHEAD + 1
    predictions.close()


def test_a_batch_is_one_forward(run, digits, monkeypatch):
    opened, sizes = open_run(run), []
    opened.model.generator.register_forward_hook(lambda _m, x, _y: sizes.append(len(x[0])))
    images = [next(digits.rglob("*.png"))] * (BATCH + 5)
    images[3] = "nothing.png"
    found = list(predict_each(opened, images))
    assert sizes == [BATCH - 1, 5]
    assert [p.error is None for p in found] == [i != 3 for i in range(BATCH + 5)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png", "also.png"], "nothing to read; nothing.png: no such file, also.png"),
        (["empty"], "empty: a folder without images, at any depth"),
        (["photos/0/000.png", "--out", "a.txt"], "ending in .csv or .jsonl, got a.txt"),
        (["photos/0/000.png", "--out", "a.json"], "ending in .csv or .jsonl, got a.json"),
        (["photos/0/000.png", "--out", "folder.csv"], "folder.csv is a folder"),
        (["photos/0/000.png", "--classes"], "give --out FILE, too"),
        (["photos/1/010.png", "photos/2/068.png"], "2 of 2 images could not be read"),
    ],
)
def test_what_cannot_be_done_has_status_2(run, photos, arguments, message):
    for name in ("empty", "folder.csv"):
        (photos.parent / name).mkdir()
    assert message in refused("predict", run, *arguments)
    assert not (photos.parent / "a.csv").exists()


def test_from_python(run, photos):
    names = expert_names(open_run(run).config.hub)
    [found] = predict(run, [photos / "0/000.png"])
    assert found.path == photos / "0/000.png"
    assert set(found.experts) < set(names)
    assert found.probability == found.probabilities.max().item()
    with pytest.raises(DataError, match=r"010\.png"):
        predict(run, [photos / "0/000.png", photos / "1/010.png"])
    with pytest.raises(ValueError, match="workers: expected an integer of at least 0, got -1"):
        predict(run, [photos / "0/000.png"], workers=-1)


def test_an_image_that_breaks_its_decoder_is_one_broken_image(run, photos, monkeypatch):
    def load_image(path):
        if str(path).endswith("001.png"):
            raise MemoryError
        return Image.new("RGB", (40, 40))

    monkeypatch.setattr(recipe, "load_image", load_image)
    said = hubpath("predict", run, "photos/0/000.png", "photos/1/001.png", status=1)
    assert said.stdout.count("experts:") == 1
    assert "photos/1/001.png (MemoryError)" in said.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="modes are others there")
def test_the_file_has_the_mode_of_the_umask_and_replaces_another(run, photos):
    (photos.parent / "a.csv").write_text("of before\n" * 1000)
    (photos.parent / "a.csv").unlink()
    before = os.umask(0o022)
    try:
        hubpath("predict", run, "photos/0/000.png", "--out", "a.csv")
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat("a.csv").st_mode) == 0o644
    hubpath("predict", run, "photos/0/003.png", "photos/0/000.png", "--out", "a.csv")
    assert len(rows_of("a.csv")) == 2


def test_a_run_trained_in_bf16_predicts_as_it_evaluates(run, digits, tmp_path):
    """evaluate computes in the run's precision, and so does predict."""
    opened, images = open_run(run), sorted((digits / "test").rglob("*.png"))[:8]
    plain = torch.stack([p.probabilities for p in predict_each(opened, images)])
    opened.config = opened.config.replace(trainer=opened.config.trainer.replace(amp="bf16"))
    lower = torch.stack([p.probabilities for p in predict_each(opened, images)])
    assert not torch.equal(plain, lower)
    assert torch.allclose(plain, lower, atol=0.02)
