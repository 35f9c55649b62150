"""``start=FILE``: a hub that begins with trained heads, its router and its aggregator."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import refused, shown
from support.compare import QUIET

from hubpath_fast.compare.settings import CompareSettings
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.recipes.fit import fit
from hubpath_fast.runs.build import build_seeded
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.start import Start, linear_head
from hubpath_fast.training import load_weights

CLASSES = ("a", "b", "c")
HUB = ("test_resnet", "test_efficientnet", "test_vit?size=160")
STILL = {"lr_expert": 1e-12, "lr_head": 1e-12, "lr_router": 1e-12}  # below a float32's last bit


def config(data="nowhere", seed=0, **options):
    trainer = {"steps": 2, "batch_size": 4, "seed": seed, "save_every": 1, "eval_every": 0, **STILL}
    return FitConfig.from_dict(
        {
            "data": str(data), "hub": HUB, "pretrained": False, "image_size": 32, "workers": 0,
            "validation": 0.25, "generator_width": 4, "trainer": trainer, **options,
        }
    )  # fmt: skip


def built(seed=0, **options):
    return build_seeded(config(seed=seed, **options), PlainTask(len(CLASSES)), 32)


def start_of(model, **changes):
    """What a hub like this one starts with, to say what it says."""
    heads = [linear_head(expert) for expert in model.experts]
    parts = model.generator.state_dict(), model.aggregator.state_dict()
    given = tuple((layer.weight.detach(), layer.bias.detach()) for layer in heads)
    return dataclasses.replace(Start(CLASSES, HUB, given, *parts), **changes)


@pytest.fixture(scope="module")
def trained():
    """A hub that is none of seed 0, in every part."""
    model = built(seed=1)
    torch.manual_seed(2)
    with torch.no_grad():
        for part in (model.generator, model.aggregator):
            for tensor in part.state_dict().values():
                if tensor.is_floating_point():
                    tensor += 0.1 * torch.rand_like(tensor)
    return model


@pytest.fixture(scope="module")
def file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("start") / "start.safetensors"
    start_of(trained).write(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root, random = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in CLASSES:
        (root / "train" / name).mkdir(parents=True)
        for i in range(4):
            pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "train" / name / f"{i}.png")
    return root


def test_a_hub_that_starts_from_a_file_says_what_the_hub_of_the_file_said(trained, file):
    model = built(seed=0)
    with torch.no_grad():  # the same bodies, which a file of heads does not have
        heads = {id(t) for e in model.experts for t in linear_head(e).parameters()}
        for own, other in zip(
            model.experts.parameters(), trained.experts.parameters(), strict=True
        ):
            if id(own) not in heads:
                own.copy_(other)
    x = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    expected = trained.eval().ask_all(x), trained(x)
    assert not torch.allclose(model.eval().ask_all(x), expected[0])
    start = Start.read(file)
    start.check(CLASSES, len(HUB))
    start.load_into(model)
    assert torch.equal(model.ask_all(x), expected[0])
    assert torch.equal(model(x), expected[1])


def test_a_process_loads_the_heads_of_its_own_experts_alone(trained, file):
    model = build_seeded(config(), PlainTask(len(CLASSES)), 32, own={1})
    Start.read(file).load_into(model)
    assert linear_head(model.experts[0]).weight.is_meta
    assert torch.equal(linear_head(model.experts[1]).weight, linear_head(trained.experts[1]).weight)


def test_without_router_and_aggregator_these_start_anew(trained):
    model, new = built(seed=0), built(seed=0)
    start_of(trained, generator={}, aggregator={}).load_into(model)
    for part in ("generator", "aggregator"):
        own, other = (getattr(m, part).state_dict() for m in (model, new))
        assert all(torch.equal(own[name], other[name]) for name in own)
    assert torch.equal(linear_head(model.experts[0]).weight, linear_head(trained.experts[0]).weight)


@pytest.mark.filterwarnings("ignore::hubpath_fast.training.RoutingCollapseWarning")
@pytest.mark.parametrize("room", [None, "3"])
def test_a_run_starts_from_the_file_and_goes_on_without_it(data, file, tmp_path, trained, room):
    copy = shutil.copy(file, tmp_path / "start.safetensors")
    fit(config(data, start=str(copy), room=room), tmp_path / "run", console=QUIET)
    begun = built()
    load_weights(begun, tmp_path / "run" / "last")
    for own, other in zip(begun.experts, trained.experts, strict=True):
        assert torch.equal(linear_head(own).weight, linear_head(other).weight)
    assert torch.equal(begun.generator.clean.weight, trained.generator.clean.weight)
    assert torch.equal(begun.aggregator.weight, trained.aggregator.weight)

    copy.unlink()  # a checkpoint has everything
    chosen = config(data, start=str(copy), room=room)
    result, _ = fit(chosen, tmp_path / "run", resume=True, console=QUIET)
    assert not result.interrupted
    with pytest.raises(ValueError, match=r"of another configuration \(run.fit.start: "):
        fit(chosen.replace(start=None), tmp_path / "run", resume=True, console=QUIET)


def test_the_setting_counts_and_is_kept_with_its_whole_path(tmp_path, monkeypatch):
    assert "start" not in config().identity()  # runs older than the setting go on
    monkeypatch.chdir(tmp_path)
    assert config(start="x.safetensors").identity()["start"] == str(tmp_path / "x.safetensors")
    values = shown("--dataset", "digits", "--hub", "tiny", "--set", "start=x.safetensors")
    assert values["start"] == str(tmp_path / "x.safetensors")


WRONG = {
    "other classes": (
        {"classes": ("a", "x", "c")},
        "expected heads of the classes of the data, got others in FILE (number 1 is 'x' there, "
        "'b' here)",
    ),
    "fewer classes": (
        {"classes": ("a", "b")},
        "expected heads of the 3 classes of the data, got 2 in FILE",
    ),
    "fewer experts": (
        {"experts": HUB[:2], "heads": 2},
        "expected heads of the hub's 3 experts, got 2 in FILE, of test_resnet, test_efficientnet",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_for_another_hub_or_other_classes_is_refused(case, trained, tmp_path, data):
    changes, expected = WRONG[case]
    good = start_of(trained)
    if "heads" in changes:
        changes = {**changes, "heads": good.heads[: changes["heads"]]}
    path = tmp_path / "start.safetensors"
    dataclasses.replace(good, **changes).write(path)
    message = refused(
        "fit", "--data", data, "--hub", ",".join(HUB), "--no-pretrained", "--image-size", 32,
        "--set", f"start={path}", "--out", tmp_path / "run",
    )  # fmt: skip
    assert expected.replace("FILE", str(path)) in message
    assert not (tmp_path / "run" / "last").exists()


def shapes_of_another():
    good = start_of(built(seed=1))
    weight, bias = good.heads[0]
    return {
        "head": (
            {"heads": ((weight[:, :7], bias), *good.heads[1:])},
            r"the head of expert 0 is \[3, 96\] here, and \[3, 7\] in",
        ),
        "router": (
            {"generator": built(generator_width=6).generator.state_dict()},
            r"the router of .* is not as this hub's \(stem.weight: \[6, 3, 3, 3\] there, "
            r"\[4, 3, 3, 3\] here\)",
        ),
        "aggregator": (
            {"aggregator": {"other": torch.zeros(3)}},
            r"the aggregator of .* \(weight: absent there, \[3, 9\] here\)",
        ),
    }


@pytest.mark.parametrize("part", ["head", "router", "aggregator"])
def test_parts_of_another_shape_are_refused_and_nothing_is_loaded(part, trained):
    changes, expected = shapes_of_another()[part]
    model, new = built(seed=0), built(seed=0)
    with pytest.raises(ValueError, match=expected):
        start_of(trained, **changes).load_into(model)
    after, before = model.state_dict(), new.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_file_that_is_none_or_damaged_is_refused(file, tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        Start.read(tmp_path / "absent")
    whole, cut = file.read_bytes(), tmp_path / "cut.safetensors"
    for broken in (whole[:-9], whole[:100], b"", b"\x80\x04."):
        cut.write_bytes(broken)
        with pytest.raises(ValueError, match=r"cut.safetensors holds no trained heads"):
            Start.read(cut)


def test_landmarks_and_comparisons_refuse_it(data):
    with pytest.raises(ValueError, match=r"start: for classes alone"):
        config(data, task="landmarks", start="x")
    with pytest.raises(ValueError, match=r"start: expected None in a comparison"):
        CompareSettings(fit=config(data, start="x"), rates=(1e-3,))
