"""A command that is given what another one wrote says what that is, and what takes it; and no
command writes into it, or among images."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from rich.console import Console
from support.atari_folders import asked, write_comparison
from support.body_shelves import make_body_shelf
from support.body_shelves import make_hub as make_body_hub
from support.command import hubpath, refused
from support.shelves import make_hub, make_shelf

from hubpath_fast.data import DigitsTask, open_images, write_image_folder
from hubpath_fast.data.folder import DataError
from hubpath_fast.recipes.fit import fit
from hubpath_fast.recipes.save import save
from hubpath_fast.runs.resolve import settings
from hubpath_fast.written import find_written

QUIET = Console(quiet=True)
HUB = ["test_resnet", "test_efficientnet"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """One of each: data, run, saved, shelf (with its hub), games, game."""
    root = tmp_path_factory.mktemp("folders")
    data = write_image_folder(DigitsTask(0, 30), root / "data", 30)
    top = {"pretrained": False, "image_size": 32, "workers": 0, "k": 1, "data": str(data)}
    run = settings(root / "run", False, None, {**top, "hub": HUB}, {"steps": 1, "batch_size": 8})
    fit(run, root / "run", console=QUIET)
    save(root / "run", root / "saved")
    make_hub(make_shelf(root / "shelf"), (0, 1, 2))
    write_comparison(root / "games", asked(), {})
    few = ("--set", "learn_start=32", "--set", "final_episodes=1", "--set", "eval_episodes=1")
    hubpath("atari", "pretrain", "catch", "--steps", 33, *few, "--out", root / "game")
    return root


# What it is called, and commands that take it.
NAMED = {
    "shelf": ("is a shelf, of `hubpath shelf extract`", "hubpath shelf predict {} ..."),
    "shelf/hub": ("is a routed hub of a shelf", "hubpath shelf predict {shelf} --hub {} ..."),
    "games": ("is a comparison of games", "hubpath atari report {}"),
    "game": ("is a run of `hubpath atari`", "hubpath atari evaluate {}"),
    "game/last": ("is a checkpoint of a run of `hubpath atari`", "hubpath atari evaluate {game}"),
    "run": ("is a run of `hubpath fit`", "hubpath evaluate {}"),
    "run/best": ("is a checkpoint of a run", "the run, {run}"),
    "saved": ("is a saved hub", "hubpath evaluate {} --data OTHER"),
}
OF_RUNS = ("evaluate", "report", "prune", "export", "budget", "landmarks evaluate")
OF_SHELVES = ("shelf rank", "shelf fit", "shelf prune", "shelf unfreeze")
OF_GAMES = ("atari evaluate", "atari report")
TAKEN_BY = {
    "run": OF_RUNS,
    "run/best": set(OF_RUNS) - {"report"},
    "saved": set(OF_RUNS) - {"report"},
    "shelf": OF_SHELVES,
    "games": ("atari report",),
    "game": OF_GAMES,
}


@pytest.mark.parametrize("place", NAMED)
def test_what_it_is_and_what_takes_it(folders, place):
    what, use = NAMED[place]
    known = {name: folders / name for name in ("shelf", "game", "run")}
    use = use.format(folders / place, **known)
    for command in set(OF_RUNS + OF_SHELVES + OF_GAMES) - set(TAKEN_BY.get(place, ())):
        said = refused(*command.split(), folders / place)
        assert f"{folders / place} {what}" in said, command
        assert use in said, command


def test_a_folder_that_is_not_there_is_said_to_be_missing(tmp_path):
    for command in (*OF_RUNS, *OF_SHELVES, *OF_GAMES):
        assert "there is no such folder" in refused(*command.split(), tmp_path / "nowhere"), command
    for command, file in (("evaluate", "fit.json"), ("report", "fit.json, compare.json")):
        assert f"(no {file})" in refused(command, tmp_path)


@pytest.mark.parametrize("file", ["hub.pt2", "hub.onnx"])
def test_a_package_is_named(tmp_path, file):
    (tmp_path / file).write_bytes(b"")
    for command in ("evaluate", "report", "shelf rank", "atari evaluate"):
        said = refused(*command.split(), tmp_path / file)
        assert f"{file} is a package, of `hubpath export`; docs/export.md says" in said


@pytest.mark.parametrize("place", ["shelf", "games", "game", "run", "saved"])
def test_nothing_else_is_written_into_it(folders, place):
    before = sorted((folders / place).rglob("*"))
    found = f"out: {folders / place} {NAMED[place][0]}"
    tried = {
        "run": ("fit", "--data", folders / "data", "--hub", "test_resnet,test_vit", "--k", 1),
        "shelf": ("shelf", "extract", "--data", folders / "data", "--hub", "tiny"),
        "game": ("atari", "pretrain", "catch"),
        "shelf/hub": ("shelf", "fit", folders / "shelf"),
    }
    for own in set(tried) - {place}:
        assert found in refused(*tried[own], "--out", folders / place)
    assert sorted((folders / place).rglob("*")) == before


def test_nothing_is_written_among_images(folders):
    data, run = folders / "data", folders / "run"
    inside = data / "train" / "x"
    for command in (
        ("save", run, inside),
        ("export", run, "--out", inside),
        ("export", run, "--out", data / "train" / "0" / "x.pt2"),
        ("prune", run, "--out", inside),
        ("report", run, "--out", data / "train"),
        ("report", run, "--out", data),
        ("add", run, "test_vit", "--no-pretrained", "--out", inside),
        ("shelf", "extract", "--data", data, "--hub", "tiny", "--out", inside),
    ):
        assert "lies in the data's folder" in refused(*command), command
    assert {path.name for path in (data / "train").iterdir()} == set("0123456789")


def test_nothing_of_a_shelf_is_written_among_its_images(tmp_path):
    shelf = make_body_shelf(tmp_path, limit=10)
    make_body_hub(shelf, shelf.folder / "hub")
    inside = tmp_path / "data" / "train" / "x"
    for command in (
        ("fit", shelf.folder),
        ("prune", shelf.folder),
        ("unfreeze", shelf.folder),
        ("add", shelf.folder, "e"),
    ):
        said = refused("shelf", *command, "--out", inside)
        assert f"out: {inside} lies in the data's folder {tmp_path / 'data'}" in said, command
    assert not inside.exists()


@pytest.mark.parametrize("place", NAMED)
def test_it_is_no_class_of_images(folders, tmp_path, place):
    data = tmp_path / "photos"
    shutil.copytree(folders / "data" / "train", data)
    name = Path(place).name
    shutil.copytree(folders / place, data / name)
    splits = open_images(data)
    assert splits.classes == tuple("0123456789")
    assert any(f"left out: 1 folder that hubpath wrote ({data / name})" in n for n in splits.notes)


def test_it_is_no_data(folders):
    with pytest.raises(DataError, match=r"shelf \(a shelf, of .*\) holds no images"):
        open_images(folders / "shelf")
    (folders / "empty").mkdir()
    with pytest.raises(DataError, match=r"/empty holds no images"):
        open_images(folders / "empty")


def test_a_folder_of_ones_own_is_nothing_that_was_written(tmp_path):
    for file in ("config.json", "compare.json", "hub.json", "fit.json"):
        (tmp_path / file).write_text('{"settings_of_mine": 1, "model": {}}')
    assert find_written(tmp_path) is None
    (tmp_path / "fit.json").write_text("no JSON")
    assert find_written(tmp_path) is None
    assert find_written(tmp_path / "nowhere") is None
