"""How large the pathway generator is by default, and what is said of its cost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support.command import hubpath
from torch import nn

import hubpath_fast as hp
from hubpath_fast.baselines.costs import inference_costs
from hubpath_fast.hub import build_experts
from hubpath_fast.hub.costs import count_flops, module_flops, router_share
from hubpath_fast.hub.router import ROUTER_SHARE, WIDTHS, generator_size
from hubpath_fast.hub.source import PlainTask
from hubpath_fast.runs.build import as_built, build_model
from hubpath_fast.runs.config import FitConfig
from hubpath_fast.runs.folder import RunFolder, open_run
from hubpath_fast.runs.presets import preset

LITE = [f"timm/tf_efficientnet_lite{i}" for i in range(3)]
OLD_RUN = Path(__file__).parents[1] / "data_files" / "old_run.tar.xz"


class Tiny(nn.Module):
    """A module of a user's own: 2 * 9 * 3 * C * S^2 FLOPs and few more."""

    def __init__(self, channels: int = 4):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.head = nn.Linear(channels, 10)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


class Stubborn(Tiny):
    """Refuses a batch of one, so that its FLOPs for one image cannot be counted."""

    def forward(self, x):
        if not self.training and len(x) == 1:
            raise RuntimeError("one image is none")
        return super().forward(x)


# Odd sides, pooling that drops a border, and the least and the largest width.
@pytest.mark.parametrize(
    ("width", "stride", "size"), [(4, 1, 32), (6, 3, 32), (16, 4, 224), (12, 5, 224), (8, 3, 97)]
)
def test_the_flops_in_closed_form_are_those_that_torch_counts(width, stride, size):
    with torch.device("meta"):
        generator = hp.PathwayGenerator(7, width=width, stride=stride).eval()
    assert hp.PathwayGenerator.flops(7, width, stride, size) == count_flops(generator, size)


# What each hub gets: pixels a side and width, as docs/routing.md says.
@pytest.mark.parametrize(
    ("names", "size", "width", "stride"),
    [
        ("tiny", 32, 4, 2),  # 16 pixels
        ("tiny-homogeneous", 32, 4, 2),
        ("tiny", 160, 12, 5),
        (LITE, 96, 8, 3),
        (LITE, 224, 16, 5),
        (["timm/resnet50"], 224, 16, 4),  # as published: far below the limit
        (["timm/resnet50"], 96, 16, 2),
        (["timm/tf_efficientnet_lite0"], 384, 16, 7),
    ],
)
def test_the_router_is_at_most_five_percent_of_k_mean_experts(names, size, width, stride):
    model = hp.create_model(names, 10, k=1, pretrained=False, input_size=size)
    if len(model.experts) > 1:
        model = hp.create_model(names, 10, k=2, pretrained=False, input_size=size)
    assert (model.generator.width, model.generator.stride) == (width, stride)
    flops = [count_flops(expert.eval().to("meta"), size) for expert in model.experts]
    router = count_flops(model.generator.eval().to("meta"), size)
    share = router / (model.k * sum(flops) / len(flops))
    assert share <= ROUTER_SHARE
    assert router_share(model, size) == pytest.approx(share, rel=1e-12)


def test_within_the_limit_the_scarcer_of_pixels_and_channels_is_the_largest():
    for flops in [10**6 * 3**i for i in range(9)]:
        for size in (16, 32, 96, 128, 224, 384):
            width, stride = generator_size(5, size, flops, None, None)
            cost = hp.PathwayGenerator.flops(5, width, stride, size)
            least = hp.PathwayGenerator.flops(5, WIDTHS[0], max(1, size // 8), size)
            assert cost <= max(ROUTER_SHARE * flops, least)
            seen = min(width / 16, size // stride / 56, 1)
            for w in WIDTHS:  # nothing that is allowed sees more
                for s in range(max(1, round(size / 56)), size // 8 + 1):
                    if hp.PathwayGenerator.flops(5, w, s, size) <= ROUTER_SHARE * flops:
                        assert min(w / 16, size // s / 56, 1) <= seen


def test_what_is_asked_for_is_taken():
    assert generator_size(5, 224, 1e9, 16, None) == (16, 4)  # the published rule: about 56 pixels
    assert generator_size(5, 96, 1e9, 16, None) == (16, 1)
    assert generator_size(5, 224, 1e9, 6, 3) == (6, 3)
    assert generator_size(5, 32, 18.6e6, None, 2) == (4, 2)  # the widest within 5 % at that stride
    assert generator_size(5, 32, 100e6, None, 2) == (12, 2)
    model = hp.create_model(
        ["test_resnet"] * 2, 10, pretrained=False, input_size=32, generator_width=16
    )
    assert (model.generator.width, model.generator.stride) == (16, 1)


def test_experts_too_cheap_for_any_router_get_the_smallest():
    model = hp.create_model([Tiny(), Tiny()], 10, k=1, input_size=32)
    assert (model.generator.width, model.generator.stride) == (4, 4)
    assert router_share(model, 32) > ROUTER_SHARE


def test_modules_of_ones_own_are_counted_as_they_are():
    dear = [Tiny(64), nn.Sequential(Tiny(192))]
    model = hp.create_model(dear, 10, k=2, input_size=32)
    mean = 2 * 27 * 32**2 * (64 + 192) / 2 + 2 * 10 * (64 + 192) / 2
    assert module_flops(dear[0], 32) == 2 * 27 * 32**2 * 64 + 2 * 10 * 64
    router = hp.PathwayGenerator.flops(2, model.generator.width, model.generator.stride, 32)
    assert router_share(model, 32) == pytest.approx(router / (2 * mean), rel=1e-12)
    assert (model.generator.width, model.generator.stride) == (4, 2)


def test_where_an_expert_cannot_be_counted_the_published_size_is_taken():
    class Kept(Stubborn):
        """Given by hand: ``build_experts`` would refuse what takes no single image."""

    experts = [
        hp.hub.Expert("kept", Kept(), (0.0,) * 3, (1.0,) * 3, 112),
        *build_experts([Tiny(64)], 10, input_size=112),
    ]
    assert module_flops(experts[0].module, 112) is None
    model = hp.create_model(experts, 10, k=1, input_size=112)
    assert (model.generator.width, model.generator.stride) == (16, 2)
    assert router_share(model, 112) is None


def test_counting_changes_neither_the_experts_nor_what_is_drawn():
    own = Tiny(64)
    before = {name: value.clone() for name, value in own.state_dict().items()}
    torch.manual_seed(0)
    hp.create_model([own, Tiny()], 10, k=1, input_size=32, generator_width=4, generator_stride=2)
    expected = torch.rand(1)
    torch.manual_seed(0)
    hp.create_model([own, Tiny()], 10, k=1, input_size=32)
    assert torch.equal(torch.rand(1), expected)
    assert own.training
    assert all(torch.equal(before[n], v) for n, v in own.state_dict().items())


def test_a_network_is_counted_once_in_a_process(monkeypatch):
    hp.create_model(["test_resnet"] * 5, 10, pretrained=False, input_size=64)
    monkeypatch.setattr("hubpath_fast.hub.costs.run_once", None)  # would fail
    model = hp.create_model(["test_resnet"] * 5, 10, pretrained=False, input_size=64)
    assert model.generator.width == 6


def test_inference_costs_have_the_share():
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    model = hp.create_model("tiny", 10, pretrained=False, input_size=32)
    costs = inference_costs(model, images)
    assert costs["router_share"] == pytest.approx(0.0295, abs=5e-4)
    assert inference_costs(model.experts[0], images.float())["router_share"] is None


def test_presets_keep_the_published_router():
    for name in ("paper-homogeneous", "paper-heterogeneous"):
        assert preset(name)["generator_width"] == 16
        assert "generator_stride" not in preset(name)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("router") / "run"
    said = hubpath(
        "fit", "--dataset", "digits", "--hub", "test_resnet,test_efficientnet", "--no-pretrained",
        "--image-size", 32, "--workers", 0, "--steps", 2, "--seeds", "0,1", "--out", out,
    ).output  # fmt: skip
    return out, said


def test_the_banner_and_the_folder_say_which_router_was_built(run):
    out, said = run
    share = "4.3"  # of 8.2 and 4.6 MFLOPs
    text = (
        f"\n      router: nine layers, width 4, on 16 px (stride 2), {share} % of K mean experts'"
    )
    assert said.count(text) == 2, said
    config = RunFolder(out / "seed-0").record().config
    assert (config.generator_width, config.generator_stride) == (4, 2)
    assert open_run(out / "seed-0").model.generator.stride == 2


def test_a_run_goes_on_with_the_router_that_it_has(run, tmp_path):
    out = shutil.copytree(run[0], tmp_path / "run")
    path = out / "seed-1" / "fit.json"
    record = json.loads(path.read_text())
    assert json.loads((out / "seeds.json").read_text())["config"]["generator_width"] is None
    # As a version with another rule, or another count of FLOPs, would have left it.
    (out / "seed-1" / "result.json").unlink()
    shutil.rmtree(out / "seed-1" / "last")
    shutil.rmtree(out / "seed-1" / "best")
    record["config"] |= {"generator_width": 6, "generator_stride": 3}
    path.write_text(json.dumps(record))
    said = hubpath("fit", "--resume", "--out", out).output
    assert "router: nine layers, width 6, on 10 px (stride 3)" in said
    assert open_run(out / "seed-1").model.generator.width == 6


def test_a_run_of_before_has_its_router(tmp_path):
    shutil.unpack_archive(OLD_RUN, tmp_path / "run", filter="data")
    values = json.loads((tmp_path / "run" / "fit.json").read_text())["config"]
    assert (values["generator_width"], values["generator_stride"]) == (2, None)
    generator = open_run(tmp_path / "run").model.generator
    assert (generator.width, generator.stride) == (2, 1)
    # Width 16 was the default, and is written in every older run.
    config = FitConfig.from_dict({**values, "generator_width": 16})
    model = build_model(config, PlainTask(10), 224, pretrained=False)
    assert (model.generator.width, model.generator.stride) == (16, 4)
    assert as_built(config, model) == config


def test_hub_show_says_the_router():
    said = hubpath(
        "hub", "show", "tf_efficientnet_lite0,tf_efficientnet_lite1,tf_efficientnet_lite2"
    )
    line = "router: nine layers, width 16, on 44 px (stride 5), 3.3 % of the FLOPs of K = 2 mean "
    assert line + "experts at 224 x 224" in said.output
    assert "router:" not in hubpath("hub", "show", "test_resnet").output
