"""Runs by name: the paper's settings, in full and in small, and several seeds of one."""

from __future__ import annotations

import json
import statistics

import pytest
import torch
from support.command import hubpath, refused, shown
from torch import nn

from hubpath_fast.compare.settings import make_settings
from hubpath_fast.data import DigitsTask, write_image_folder
from hubpath_fast.hub import HUBS, build_experts, head_parameters
from hubpath_fast.recipes.seeds import summarise
from hubpath_fast.runs.build import draw_head
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.presets import PRESETS, preset
from hubpath_fast.runs.resolve import parse_seeds, settings

QUICK = ["fit", "--preset", "tiny", "--steps", 3, "--crops", 1]


@pytest.mark.parametrize("hub", ["paper-homogeneous", "paper-heterogeneous"])
def test_the_papers_run(hub):
    values = shown("--preset", hub, "--dataset", "cars", "--data-root", "/d", "--seed", 0)
    trainer = values.pop("trainer")
    assert values == {
        **values,
        "data": "/d", "dataset": "cars", "hub": list(HUBS[hub]), "pretrained": True, "k": 2,
        "image_size": 224, "flip": True, "min_area": 0.08, "crops": 10, "head_init": 0.01,
        "aggregator": "linear", "renormalize": False, "label_smoothing": 0.0,
    }  # fmt: skip
    assert trainer == {
        **trainer,
        "steps": 15_000, "batch_size": 48, "optimizer": "sgd", "momentum": 0.9, "nesterov": True,
        "weight_decay": 5e-4, "decay_bias_and_norm": True, "lr_expert": 0.01, "lr_head": 0.01,
        "lr_router": 0.01, "schedule": "steps", "milestones": [6_000, 12_000], "decay": 0.1,
        "warmup_steps": None, "clip_norm": None, "accumulate": 1, "amp": "none", "seed": 0,
    }  # fmt: skip


def test_every_setting_can_be_given_otherwise():
    base = ("--preset", "paper-homogeneous", "--dataset", "cars", "--data-root", "/d")
    plain = shown(*base)
    changed = shown(
        *base, "--lr", 0.005, "--steps", 1500, "--k", 3, "--validation", 0, "--cache", "disk",
        "--set", "momentum=0.8", "--set", "renormalize=true", "--set", "workers=3",
    )  # fmt: skip
    differ = {k: v for k, v in changed.items() if v != plain[k] and k != "trainer"}
    assert differ == {"k": 3, "validation": 0.0, "cache": "disk", "renormalize": True, "workers": 3}
    own, before = changed["trainer"], plain["trainer"]
    assert {k: v for k, v in own.items() if v != before[k]} == {
        "lr_expert": 0.005, "lr_head": 0.005, "lr_router": 0.005, "momentum": 0.8, "steps": 1500,
        "milestones": [600, 1200], "eval_every": 150,
    }  # fmt: skip


def test_a_run_too_short_for_milestones_keeps_its_rate():
    trainer = shown("--preset", "tiny", "--steps", 1)["trainer"]
    assert (trainer["schedule"], trainer["milestones"]) == ("constant", [])
    trainer = shown("--preset", "tiny", "--set", "trainer.schedule=cosine")["trainer"]
    assert (trainer["schedule"], trainer["milestones"]) == ("cosine", [])


def test_data_says_what_it_is(tmp_path):
    assert shown("--preset", "tiny")["dataset"] == "digits"
    assert shown("--preset", "tiny", "--data", tmp_path)["dataset"] == "folder"
    named = shown("--preset", "tiny", "--dataset", "Stanford_Cars", "--data-root", tmp_path)
    assert (named["dataset"], named["data"]) == ("cars", str(tmp_path))
    (tmp_path / "c.json").write_text(json.dumps(named))
    moved = shown("--config", tmp_path / "c.json", "--data-root", "/elsewhere")
    assert (moved["dataset"], moved["data"]) == ("cars", "/elsewhere")


BAD = [
    (
        ["--preset", "paper-homogenous"],
        "preset 'paper-homogenous' is unknown; did you mean paper-homogeneous?",
    ),
    (["--preset", "tiny", "--config", "x.json"], "both are complete settings"),
    (["--data", "x"], "hub: nothing given; use --hub"),
    (["--preset", "paper-homogeneous"], "data: nothing given; use --data FOLDER, or --dataset"),
    (["--preset", "tiny", "--dataset", "cras", "--data-root", "x"], "did you mean cars"),
    (["--preset", "tiny", "--data", "x", "--data-root", "y"], "give one of them"),
    (["--preset", "tiny", "--set", "momentum"], "set: expected KEY=VALUE"),
    (["--preset", "tiny", "--set", "trainer.momntum=1"], "closest: trainer.momentum"),
    (["--preset", "tiny", "--set", "model.k=1"], "unknown setting 'model.k'"),
    (["--preset", "tiny", "--set", "k=two"], "k: expected an integer of at least 1, got 'two'"),
    (["--preset", "tiny", "--seed", "1", "--seeds", "1,2"], "seed and seeds: give one"),
    (["--preset", "tiny", "--set", "seed=1", "--seeds", "1,2"], "seed and seeds: give one"),
    (["--preset", "tiny", "--seeds", "1,1"], "expected different whole numbers"),
    (["--preset", "tiny", "--seeds", "1;2"], "such as 0,1,2, got '1;2'"),
    (["--preset", "tiny", "--dataset", "cars", "--data-root", "/nowhere"], "/nowhere (missing)"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_wrong_input_is_one_clear_message(arguments, message, tmp_path):
    assert message in refused("fit", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_presets_are_whole_and_not_shared():
    for name in PRESETS:
        first = preset(name)
        first["trainer"]["steps"] = 1
        assert preset(name)["trainer"]["steps"] > 1
        config = FitConfig.from_dict({"data": "x", **preset(name)})
        assert len(config.hub) == 5
        assert FitConfig.from_dict(config.to_dict()) == config


def test_heads_are_drawn_from_a_narrow_normal_distribution():
    names = ["test_resnet", "test_convnext", "test_vit"]
    for expert in build_experts(names, 500, pretrained=False, input_size=160):
        before = {name: p.clone() for name, p in expert.module.named_parameters()}
        torch.manual_seed(0)
        draw_head(expert.module, 0.01)
        head = {id(p) for p in head_parameters(expert.module)}
        weights = [p for p in head_parameters(expert.module) if p.ndim == 2]
        assert len(weights) == 1
        # 500 rows of at least 48: a standard deviation of 24,000 draws is off by 0.5 %.
        assert weights[0].std().item() == pytest.approx(0.01, rel=0.03)
        for name, p in expert.module.named_parameters():
            assert (id(p) in head) or torch.equal(p, before[name])
    layer = nn.Module()
    layer.fc = nn.Linear(4, 2)
    draw_head(layer, 0.01)
    assert layer.fc.bias.tolist() == [0, 0]


def test_the_tiny_run_takes_the_papers_path(tmp_path):
    """Files, a cache of them, workers, several crops."""
    out, data = tmp_path / "run", tmp_path / "digits"
    write_image_folder(DigitsTask(0, num_validation=60), data, limit=60)
    result = hubpath(
        "fit", "--preset", "tiny-homogeneous", "--data", data, "--steps", 4, "--out", out,
        "--cache", "disk", "--cache-dir", tmp_path / "cache", "--workers", 1,
    )  # fmt: skip
    assert "60 train, 60 validation, 60 test images at 32 px" in result.output
    assert "cache decoding 180 images into" in result.output
    summary = json.loads((out / "result.json").read_text())
    assert f"{100 * summary['test_accuracy_5_crops']:.1f} % over 5 crops" in result.output
    output = hubpath("evaluate", out).output
    assert f"test: accuracy {summary['test_accuracy']:.4f}" in output
    output = hubpath("evaluate", out, "--crops", 5).output
    assert f"test: accuracy {summary['test_accuracy_5_crops']:.4f}" in output


def test_seeds_give_mean_and_spread_and_go_on(tmp_path):
    out = tmp_path / "run"
    seeds = [*QUICK, "--seeds", "0,1", "--out", out]
    hubpath(*seeds)
    summary = json.loads((out / "result.json").read_text())
    own = [json.loads((out / f"seed-{s}" / "result.json").read_text()) for s in (0, 1)]
    assert [run["seed"] for run in own] == [0, 1]
    values = [run["test_accuracy"] for run in own]
    assert summary["test_accuracy"] == {
        "mean": pytest.approx(sum(values) / 2),
        "std": pytest.approx(abs(values[0] - values[1]) / 2**0.5),
        "values": values,
    }
    assert "holds runs of these seeds (seed-0, seed-1)" in refused(*seeds)

    (out / "seed-1" / "result.json").unlink()
    stamp = (out / "seed-0" / "log.jsonl").stat().st_mtime_ns
    resumed = hubpath("fit", "--resume", "--out", out).output
    assert "seed 0 (1 of 2) is done" in resumed
    assert "(mean and standard deviation of seeds 0, 1)" in resumed
    assert (out / "seed-0" / "log.jsonl").stat().st_mtime_ns == stamp
    again = json.loads((out / "result.json").read_text())
    assert again["test_accuracy"] == summary["test_accuracy"]

    changed = refused(*seeds, "--k", 1, "--resume")
    assert "is a run of other settings (k: 2 there, 1 now)" in changed
    other = [*QUICK, "--seeds", 2, "--out", out]  # its result would stand for all that are there
    assert "holds runs of these seeds (seed-0, seed-1)" in refused(*other)
    assert "(k: 2 there, 1 now)" in refused(*other, "--k", 1, "--resume")
    assert "seed and seeds: give one" in refused("fit", "--resume", "--seed", 7, "--out", out)
    expected = f"a run of several seeds; use that of one seed, in {out}: seed-0, seed-1"
    assert expected in refused("evaluate", out)


def test_summarise():
    runs = [{"test_accuracy": a, "test_loss": 1.0, "best_validation": None} for a in (0.8, 0.9, 1)]
    summary = summarise([0, 1, 2], runs)
    assert summary["test_accuracy"]["mean"] == pytest.approx(0.9)
    assert summary["test_accuracy"]["std"] == pytest.approx(0.1)
    assert statistics.stdev([0.8, 0.9, 1]) == pytest.approx(0.1)  # of a sample: n - 1
    assert "best_validation" not in summary
    assert summarise([5], runs[:1])["test_accuracy"]["std"] == 0.0
    assert parse_seeds("0, 2,7") == (0, 2, 7)


def test_without_validation_all_images_train_and_the_last_step_is_kept(tmp_path):
    out = tmp_path / "run"
    result = hubpath(*QUICK, "--validation", 0, "--out", out)
    assert "300 train, 0 validation" in result.output
    summary = json.loads((out / "result.json").read_text())
    assert (summary["best_validation"], summary["best_step"]) == (None, 3)
    assert not (out / "best").exists()
    assert f"accuracy {summary['test_accuracy']:.4f}" in hubpath("evaluate", out).output


def test_defaults_without_a_preset_are_as_they_were(tmp_path):
    config = settings(tmp_path, False, None, {"data": "x", "hub": ["a"], "k": 1}, {"lr_expert": 1})
    found = (config.dataset, config.crops, config.head_init, config.workers)
    assert found == ("folder", 1, 0.01, 2)
    assert (config.trainer.lr_head, config.trainer.lr_router) == (3, 10)
    assert config.trainer.optimizer == "adamw"


@pytest.mark.parametrize(("head", "router"), [(0.02, 0.04), (None, 0.01)])
def test_a_files_rates_keep_their_proportions(tmp_path, head, router):
    """As those of a preset do; a head without a rate of its own has the experts'."""
    own = {"lr_expert": 0.01, "lr_head": head, "lr_router": router}
    path = tmp_path / "own.json"
    path.write_text(json.dumps({"hub": ["a", "b"], "data": "there", "trainer": own}))
    trainer = settings("", False, path, {}, {"lr_expert": 0.1}).trainer
    assert trainer.lr_head == (None if head is None else pytest.approx(0.2))
    assert trainer.lr_router == pytest.approx(10 * router)
    path.write_text(path.read_text().replace('"lr_expert": 0.01', '"lr_expert": 0'))
    trainer = settings("", False, path, {}, {"lr_expert": 0.1}).trainer  # of bodies held still
    assert (trainer.lr_head, trainer.lr_router) == (head, router)


def begun(tmp_path, *extra, **given):
    top = {"data": "x", "hub": ["a", "b"], **given}
    return settings(tmp_path, False, None, top, {}, extra=extra)


def test_what_a_run_begins_with_is_not_what_presets_and_files_mean(tmp_path):
    made = begun(tmp_path)
    assert (made.head_init, made.router_supervision) == (0.01, 0.1)
    assert (FitConfig.head_init, FitConfig.router_supervision) == (None, 0.0)
    made = begun(tmp_path, "router_supervision=0.5", head_init=0.2)
    assert (made.head_init, made.router_supervision) == (0.2, 0.5)
    assert settings(tmp_path, False, None, {"data": "x"}, {}, "paper-homogeneous") == (
        FitConfig.from_dict({**preset("paper-homogeneous"), "data": "x", "dataset": "folder"})
    )
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({"data": "x", "hub": ["a", "b"]}))
    made = settings(tmp_path, False, file, {}, {})
    assert (made.head_init, made.router_supervision) == (None, 0.0)


def test_one_active_expert_is_not_supervised_unless_asked_for(tmp_path):
    assert begun(tmp_path, k=1).router_supervision == 0.0
    assert begun(tmp_path, "k=1").router_supervision == 0.0
    assert begun(tmp_path, k=1).head_init == 0.01
    with pytest.raises(ValueError, match=r"router_supervision: expected 0 with k=1, got 0.5"):
        begun(tmp_path, "router_supervision=0.5", k=1)


def test_a_comparison_begins_as_a_run_does(tmp_path):
    made = make_settings(str(tmp_path), "a,b", top={"router_temperature": 0.5}).fit
    assert (made.head_init, made.router_supervision, made.router_temperature) == (0.01, 0.1, 0.5)
    assert make_settings(str(tmp_path), "a,b", top={"k": 1}).fit.router_supervision == 0.0
    digits = make_settings("digits", "a,b").fit
    assert (digits.head_init, digits.router_supervision, digits.explore) == (None, 0.1, 1.0)
