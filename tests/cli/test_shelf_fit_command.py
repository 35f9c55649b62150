"""``hubpath shelf fit`` as a user types it."""

from __future__ import annotations

import re

import pytest
from support.command import hubpath, refused
from support.shelves import make_shelf

from hubpath_fast.recipes.shelf_fit import collapsed
from hubpath_fast.shelf.run import open_hub, read_result
from hubpath_fast.shelf.settings import ShelfFitSettings

SMALL = ("--set", "batch_size=16", "--set", "generator_width=4", "--steps", 6)


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    return make_shelf(tmp_path_factory.mktemp("command") / "shelf", 4, 3, (30, 15, 15)).folder


def test_options_are_the_settings_that_are_kept_and_resuming_takes_those(shelf):
    asked = ("--k", 1, "--experts", 2, "--router-features", "model3", "--seed", 5)
    told = hubpath("shelf", "fit", shelf, *SMALL, *asked, "--set", "explore=0.25")
    assert "K = 1 of 2 (2 of 3 models" in told.stdout
    assert "router on the features of model3; aggregator: linear" in told.stdout
    assert "with 2 models asked of each" in told.stdout
    assert re.search(r"% of 15 images right, log-loss \d\.\d{3} \(guessing: 1\.099\)", told.stdout)
    assert re.search(r"val accuracy \d+\.\d %", told.stdout)
    held = open_hub(shelf).settings
    assert (held.k, held.experts, held.router) == (1, "2", "features:model3")
    assert (held.explore, held.trainer.seed, held.trainer.steps) == (0.25, 5, 6)
    assert held.trainer.lr_head == ShelfFitSettings().trainer.lr_head
    result = read_result(shelf / "hub")
    hubpath("shelf", "fit", shelf, "--resume")
    assert read_result(shelf / "hub")["test_loss"] == result["test_loss"]
    again = refused("shelf", "fit", shelf, *SMALL)
    assert "error: out: expected a new folder" in again
    assert "--resume" in again
    assert "k: 1 there, 2 now" in refused("shelf", "fit", shelf, "--resume", "--k", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--k", 5), "k: expected an integer in 1..4"),
        (("--experts", "some"), "experts: expected a number of at least 1, or all"),
        (("--router-features", "modl3"), "did you mean model"),
        (("--set", "foo=1"), "unknown setting 'foo'; known: explore, "),
        (("--set", "explor=1"), "unknown setting 'explor'; closest: explore"),
        (("--heads", "old"), "heads: expected one of new, fitted"),
    ],
)
def test_wrong_input_is_a_sentence_and_leaves_nothing(shelf, tmp_path, arguments, message):
    said = " ".join(refused("shelf", "fit", shelf, "--out", tmp_path / "hub", *arguments).split())
    assert message in said
    assert not (tmp_path / "hub").exists()


def test_a_stop_while_experts_are_chosen_says_what_is_kept(shelf, tmp_path, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hubpath_fast.shelf.choice.fit_heads", stop)
    asked = ("--experts", 2, "--out", tmp_path / "hub")
    said = " ".join(hubpath("shelf", "fit", shelf, *SMALL, *asked, status=130).stderr.split())
    assert f"kept in {shelf / 'heads'}, and the same command goes on" in said


def test_unknown_settings_are_told_each_name_once(shelf):
    said = refused("shelf", "fit", shelf, "--set", "foo=1")
    names = said.partition("known: ")[2].split(", ")
    assert len(names) == len(set(names))
    assert not any("." in name for name in names)


@pytest.mark.parametrize(
    ("share", "k", "warned"),
    [
        ([1.0, 0.6, 0.4, *[0.0] * 197], 2, "of 200 experts 3 are asked"),
        ([0.5, 0.5, 0.5, 0.5, *[0.0] * 196], 2, ""),  # two pairs: images differ
        ([0.8, 0.8, 0.2, 0.2, *[0.0] * 196], 2, "of 200 experts 4 are asked"),
        ([0.01] * 200, 2, ""),
        ([1.0, 1.0, 0.0], 2, "of 3 experts 2 are asked"),
        ([1.0, 0.5, 0.5], 2, ""),
        ([1.0, 0.0], 1, "of 2 experts 1 are asked"),
        ([1.0, 1.0], 2, ""),  # nothing to choose
        ([], 2, ""),
    ],
)
def test_a_router_that_hardly_chooses_is_warned_of(share, k, warned):
    assert warned in collapsed(share, k)
    assert bool(warned) == bool(collapsed(share, k))
