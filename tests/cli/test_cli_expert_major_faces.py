"""``--expert-major`` of `hubpath landmarks`: maps wait to be aggregated, points are the same."""

import csv
import re

import numpy as np
import pytest
from support.command import hubpath
from support.faces import write_own


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    """20 photographs of a face each, which are more than a batch of predictions."""
    root, rng = tmp_path_factory.mktemp("faces"), np.random.default_rng(0)
    eyes = np.array([[70, 50], [110, 50], [90, 90]])
    write_own(root, [(f"{i:02}.jpg", eyes + rng.uniform(-8, 8, (3, 2))) for i in range(20)])
    return root


@pytest.fixture(scope="module")
def run(faces, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    hubpath(
        "landmarks", "fit", "--data", faces / "faces.csv", "--hub",
        "test_resnet,test_efficientnet", "--no-pretrained", "--image-size", 64, "--head-width", 8,
        "--batch-size", 4, "--workers", 0, "--steps", 6, "--out", out,
    )  # fmt: skip
    return out


def points_of(path) -> list[list[str]]:
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_points_and_errors_are_those_of_batch_by_batch(run, faces, tmp_path):
    photos = sorted(faces.glob("*.jpg"))
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    asked = [run, *photos[:17], broken, *photos[17:], "--box", "60,40,120,100"]
    plain = hubpath("landmarks", "predict", *asked, "--out", tmp_path / "1", status=1)
    found = hubpath(
        "landmarks", "predict", *asked, "--out", tmp_path / "2", "--expert-major", status=1
    )
    assert found.stderr == plain.stderr
    assert found.stdout.replace(str(tmp_path / "2"), "") == plain.stdout.replace(
        str(tmp_path / "1"), ""
    )
    head, *rows = points_of(tmp_path / "2/points.csv")
    expected = points_of(tmp_path / "1/points.csv")
    assert [head, len(rows)] == [expected[0], 3 * 20]
    for row, true in zip(rows, expected[1:], strict=True):
        assert row[:2] == true[:2]
        # Pixels are written with three digits, confidences with four.
        assert [float(v) for v in row[2:]] == pytest.approx([float(v) for v in true[2:]], abs=2e-3)


def test_errors_of_all_rows_are_the_same(run, faces):
    def numbers(*options):
        asked = ["landmarks", "evaluate", run, "--jitter", 0.1, "--workers", 0]
        said = hubpath(*asked, "--data", faces / "faces.csv", *options).stdout
        return re.sub(r"[\d.]+", "#", said), [float(v) for v in re.findall(r"\d+\.\d+", said)]

    plain, found = numbers(), numbers("--expert-major")
    assert found[0] == plain[0]
    assert found[1] == pytest.approx(plain[1], abs=0.011)  # percent, of two digits
