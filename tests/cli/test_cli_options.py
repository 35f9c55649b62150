"""Options made from the fields, and the page of all settings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.command import hubpath, refused, shown

from hubpath_fast.cli.fit import HIDDEN
from hubpath_fast.recipes.fit import busy_note
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.describe import page
from hubpath_fast.training import TrainerConfig

TINY = ("--preset", "tiny")


def test_help_shows_at_most_twelve_options():
    flags = re.findall(r"^  (--[a-z-]+).*  ", hubpath("fit", "--help").output, flags=re.MULTILINE)
    assert {"--data", "--hub", "--k", "--steps", "--out", "--resume", "--set"} <= set(flags)
    assert len(flags) <= 12


@pytest.mark.parametrize("name", HIDDEN)
def test_flags_that_scripts_have_set_their_field(name):
    flag, at = "--" + name.replace("_", "-"), FitConfig
    known = next(s for cls in (TrainerConfig, at) for s in cls.settings() if s.name == name)
    if known.kind is bool:
        given, value = [flag.replace("--", "--no-")], False
    else:
        choices = known.rules.get("choices")
        value = choices[-1] if choices else "x" if known.kind is str else known.kind(1)
        value = 0.5 if name == "validation" else 32 if name == "image_size" else value
        value = {"warm_up": "heads:1", "parallel": "dp"}.get(name, value)
        given = [flag, value]
    if name in ("optimizer", "schedule"):
        given += ["--set", "nesterov=false"]
    values = shown(*TINY, *given)
    assert {**values, **values["trainer"]}[name] == value


def test_a_rate_has_a_short_spelling_and_a_setting_its_last_name():
    assert shown(*TINY, "--lr", 0.02) == shown(*TINY, "--lr-expert", 0.02)
    assert shown(*TINY, "--set", "decay=0.2") == shown(*TINY, "--set", "trainer.decay=0.2")
    assert shown(*TINY, "--set", "executor=threads")["executor"] == "threads"
    nothing = shown("--preset", "tiny", "--set", "head_init=null", "--set", "lr_head=null")
    assert (nothing["head_init"], nothing["trainer"]["lr_head"]) == (None, None)
    assert shown(*TINY, "--amp")["trainer"]["amp"] == "bf16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stepz", 3], "No such option"),
        (["--steps", "many"], "Invalid value for '--steps'"),
        (["--steps", 0], "error: steps: expected an integer of at least 1, got 0\n"),
        (["--set", "dataset=3"], "error: dataset: expected text, got 3\n"),
        (["--set", "decy=1"], "error: unknown setting 'decy'; closest: decay"),
        (["--set", "mixup_alpha=1"], "closest: mixup_prob, mixup, "),  # each name once
        (["--set", "lr=1"], "error: unknown setting 'lr'; closest: "),
        (["--set", "hub=[1]"], "error: hub: expected a list, each text, got [1]\n"),
    ],
)
def test_a_wrong_option_or_value_is_one_message(arguments, message):
    assert message in refused("fit", *TINY, *arguments)


def test_the_default_run_is_the_trainers_default():
    assert shown("--data", "x", "--hub", "a,b")["trainer"] == TrainerConfig().to_dict()


def test_the_page_of_settings_is_what_the_fields_say():
    """Else: python -m hubpath_fast.runs.describe > docs/settings.md"""
    assert (Path(__file__).parents[2] / "docs" / "settings.md").read_text() == page()


def test_a_busy_machine_is_noted_with_what_to_do():
    assert busy_note(2.0, 2, 2) is busy_note(3.1, 2, 1) is None
    assert "the load of this machine is 3.1 on 2 cores" in busy_note(3.1, 2, 2)
    assert "OMP_NUM_THREADS=1" in busy_note(3.1, 2, 2)


def test_compare_takes_any_setting_of_the_run_its_trainer_and_its_own(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setattr("hubpath_fast.compare.compare", lambda s, *rest: taken.append(s) or [])
    texts = (
        "explore=0.25",
        "weight_decay=0.5",
        "fit.trainer.momentum=0.8",
        "digits_rendering=edges",
    )
    sets = [part for text in texts for part in ("--set", text)]
    hubpath("compare", "--data", "digits", "--hub", "tiny", "--steps", 7, *sets, "--out", tmp_path)
    [settings] = taken
    trainer = settings.fit.trainer
    assert (settings.fit.explore, trainer.weight_decay, trainer.momentum) == (0.25, 0.5, 0.8)
    assert (trainer.steps, settings.digits_rendering) == (7, "edges")
    sets = ["--set", "head_init=null", "--set", "trainer.lr_head=null"]  # 0.01 and 0.003 else
    hubpath("compare", "--data", tmp_path, "--hub", "a,b", *sets, "--out", tmp_path)
    assert (taken[1].fit.head_init, taken[1].fit.trainer.lr_head) == (None, None)
    message = refused("compare", "--data", "digits", "--hub", "tiny", "--set", "fallback=fixed")
    assert "fallback: expected none in a comparison, got fixed" in message
    message = refused("compare", "--data", "digits", "--hub", "tiny", "--set", "exploer=1")
    assert "exploer" in message
    assert "explore" in message
