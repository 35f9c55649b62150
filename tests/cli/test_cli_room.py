"""``--room`` of predict and evaluate: the answers of all experts in memory, by experts that rest in
their files; with ``--expert-major`` each comes in once."""

import re

import pytest
import torch
from support.command import hubpath, refused
from support.digit_runs import draw_digits, fit_digits, save_spread

from hubpath_fast.data import load_image
from hubpath_fast.data.transforms import eval_transform
from hubpath_fast.model import FixedRoutes
from hubpath_fast.runs.folder import RunFolder, open_run


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return draw_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    more = "--hub", "test_resnet,test_vit,test_resnet,test_efficientnet", "--k", 1
    return fit_digits(digits, tmp_path_factory.mktemp("fit") / "run", *more)


@pytest.fixture(scope="module")
def hub(run, tmp_path_factory):
    """The run's, with routes that differ from image to image."""
    return save_spread(run, tmp_path_factory.mktemp("saved") / "hub")


def split(output: str) -> tuple[list[str], list[int]]:
    """What is printed but for the room; and of that: bytes, groups that found their expert in
    memory, those that did not."""
    lines = output.splitlines()
    notes = [line for line in lines if line.startswith("note room for ")]
    numbers = [int(text.replace(",", "")) for text in re.findall(r"[\d,]*\d", " ".join(notes))]
    return [line for line in lines if line not in notes], numbers[:3]


@pytest.mark.parametrize("source", ["run", "hub"])
def test_predictions_are_those_of_all_experts_in_memory(source, digits, request):
    asked = [request.getfixturevalue(source), digits / "test", "--workers", 0]
    plain = hubpath("predict", *asked)
    found = hubpath("predict", *asked, "--room", 1)
    assert found.stdout == plain.stdout
    kept, (room, *_) = split(found.stderr)
    assert kept == plain.stderr.splitlines()
    assert room > 0


def test_expert_by_expert_each_expert_comes_in_once(hub, digits):
    asked = ["evaluate", hub, "--data", digits / "test", "--workers", 0]
    plain, unused = split(hubpath(*asked).output)
    batches, often = split(hubpath(*asked, "--room", 1).output)
    experts, once = split(hubpath(*asked, "--room", 1, "--expert-major").output)
    assert plain == batches == experts
    assert unused == []
    shares = torch.tensor(open_run(hub).model.route(_images(digits)).counts())
    assert once[2] == (shares > 0).sum() > 2
    assert often[2] > once[2]


def _images(digits) -> torch.Tensor:
    look = eval_transform(32)
    return torch.stack([look(load_image(p)) for p in sorted((digits / "test").rglob("*.png"))])


def test_a_run_keeps_its_routes_and_its_checkpoints(run, tmp_path):
    RunFolder(run).write_routes(FixedRoutes([2], [1.0], 4))
    try:
        model = open_run(run, room=1).model
        assert isinstance(model.generator, FixedRoutes)
        assert hubpath("evaluate", run, "--workers", 0, "--room", 1).output.count("note room") == 1
    finally:
        RunFolder(run).write_routes(None)
    best = open_run(run / "best", room="1GB").model
    assert all(
        torch.equal(a, b)
        for a, b in zip(best.parameters(), open_run(run / "best").model.parameters(), strict=True)
    )


def test_a_room_that_is_none_is_refused(run, digits):
    photo = next(digits.rglob("*.png"))
    said = refused("predict", run, photo, "--room", "many")
    assert "room: expected bytes such as '8GB'" in said
    said = refused("evaluate", run, "--room", "10KB")
    assert re.search(r"room: expected at least [\d,]+ bytes", said)
