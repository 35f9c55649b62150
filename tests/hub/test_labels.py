"""What experts are called: short, all different, and by no more than what tells them apart."""

from __future__ import annotations

import pytest
import timm
from torch import nn

from hubpath_fast.hub import HUBS, ExpertSpec, expert_names, expert_sources
from hubpath_fast.hub.labels import LONGEST, legend

R50 = "?arch=timm/resnet50.a1_in1k"
LONG = "2024-05-01-swin_large_patch4_window12_384-"
CACHE = "local-dir:/c/models--timm--resnet50.a1_in1k/snapshots/"


@pytest.mark.parametrize(
    ("hub", "names"),
    [
        (["resnet50.a1_in1k", "timm/vit_tiny_patch16_224.augreg_in21k"],
         ["resnet50", "vit_tiny_patch16_224"]),
        (["resnet50", "resnet50d", "resnet50.a1_in1k"], ["resnet50", "resnet50d",
         "resnet50.a1_in1k"]),  # one begins another
        (["timm/resnet50.a1_in1k", "resnet50.a2_in1k"], ["resnet50.a1_in1k", "resnet50.a2_in1k"]),
        (["timm/resnet50", "torchvision/resnet50"], ["timm/resnet50", "torchvision/resnet50"]),
        (["timm/resnet50", "moco/resnet50.v1_200ep", "resnet18"],
         ["resnet50", "resnet50.v1_200ep", "resnet18"]),
        (["test_resnet", "test_vit", "timm/test_resnet"],
         ["test_resnet #1", "test_vit", "test_resnet #2"]),
        # Options tell apart where nothing else does, and only those that differ.
        (["resnet50?lr=0.1", "resnet18?freeze=body&size=64"], ["resnet50", "resnet18"]),
        (["resnet50?lr=0.1&freeze=body", "resnet50?freeze=body", "resnet50?lr=0.2&freeze=body"],
         ["resnet50 (lr=0.1)", "resnet50", "resnet50 (lr=0.2)"]),
        (["resnet50.a1?lr=0.1", "resnet50.a2?lr=0.2"], ["resnet50.a1", "resnet50.a2"]),
        (["vit?size=32", "vit?size=32", "vit"], ["vit (size=32) #1", "vit (size=32) #2", "vit"]),
        # Files: the stem; the architecture where it says nothing, with a folder where it must.
        ([f"file//home/me/runs/long/path/birds.pth.tar{R50}"], ["birds"]),
        ([f"file//home/me/model_best.pth.tar{R50}", "resnet18"], ["resnet50", "resnet18"]),
        ([f"file/x/birds.pt{R50}", f"file/y/birds.safetensors{R50}"], ["x/birds", "y/birds"]),
        ([f"file/x/best/last.ckpt{R50}", f"file/y/best/last.ckpt{R50}"],
         ["x/resnet50", "y/resnet50"]),
        ([f"file/a/n/last.pt{R50}", f"file/b/n/last.pt{R50}", f"file/c/m/last.pt{R50}"],
         ["a/resnet50", "b/resnet50", "c/resnet50"]),
        ([f"file/x/best.pt{R50}", f"file/x/last.pt{R50}"], ["resnet50.best", "resnet50.last"]),
        ([f"file/x/best.pt{R50}", "file/x/best.pt?arch=timm/resnet18"], ["resnet50", "resnet18"]),
        ([f"file/epoch=3-step=100.ckpt{R50}", "file/0042.pth?arch=torchvision/resnet18",
          "file/pytorch_model-00001-of-00002.bin?arch=resnet34",
          "file/model.safetensors.index.json?arch=vit_tiny"],
         ["resnet50", "resnet18", "resnet34", "vit_tiny"]),
        ([f"file/birds.pt{R50}&lr=0.1", f"file/birds.pt{R50}"], ["birds (lr=0.1)", "birds"]),
        ([f"file/C:\\Users\\me\\birds.pt{R50}", "file/.pth?arch=resnet18"], ["birds", "resnet18"]),
        ([f"file/birds v2, final.pt{R50}"], ["birds v2, final"]),
        # Folders.
        (["local-dir:/x/birds", "local-dir:/y/cars/"], ["birds", "cars"]),
        (["local-dir:/x/birds", "local-dir:/y/birds"], ["x/birds", "y/birds"]),
        (["local-dir:runs/birds/best", "local-dir:."], ["birds", "local-dir"]),
        (["local-dir:birds/checkpoint-5", "local-dir:birds/checkpoint-10"],
         ["birds.checkpoint-5", "birds.checkpoint-10"]),
        ([CACHE + "0123456789" * 4], ["resnet50.a1_in1k"]),
        # Long ones keep both ends; where these are equal, a number.
        ([f"file/{LONG}fold0.pt{R50}", f"file/{LONG}fold1.pt{R50}"],
         ["2024-05-01-swin...ow12_384-fold0", "2024-05-01-swin...ow12_384-fold1"]),
        ([f"file/{'a' * 40}{i}{'a' * 40}.pt{R50}" for i in "xy"],
         [f"{'a' * 15}...{'a' * 14} #1", f"{'a' * 15}...{'a' * 14} #2"]),
        # Unicode: one form, and what cannot be printed is replaced.
        ([f"file/v1/a\u0308.pt{R50}", f"file/v2/\u00e4.pt{R50}", f"file/鳥.pt{R50}"],
         ["v1/ä", "v2/ä", "鳥"]),
        ([f"file/a\nb.pt{R50}", f"file/c\udcff.pt{R50}"], ["a?b", "c?"]),
        # A number never makes a name that another expert has.
        ([f"file/x #1.pt{R50}", f"file/x.pt{R50}", f"file/x.pt{R50}"], ["x #1", "x #2", "x #3"]),
        ([f"file/resnet50.a1.pt{R50}", "resnet50.a1", "resnet50.a2"],
         ["file/resnet50.a1", "timm/resnet50.a1", "resnet50.a2"]),
    ],
)  # fmt: skip
def test_names(hub, names):
    found = expert_names(hub)
    assert found == tuple(names)
    assert len(set(found)) == len(hub)


def test_modules_are_called_by_class_or_as_timm_knows_them():
    known = timm.create_model("test_resnet.r160_in1k")
    hub = [nn.Conv2d(3, 3, 1), ExpertSpec(nn.Conv2d(3, 3, 1), lr_factor=0.1), nn.Conv2d(3, 3, 1),
           known, "test_vit"]  # fmt: skip
    assert expert_names(hub) == (
        "Conv2d #1", "Conv2d (lr=0.1)", "Conv2d #2", "test_resnet", "test_vit",
    )  # fmt: skip
    assert expert_names([known, "test_resnet"]) == ("test_resnet.r160_in1k", "test_resnet")


@pytest.mark.parametrize("hub", HUBS)
def test_named_hubs(hub):
    names = expert_names(hub)
    assert len(set(names)) == len(HUBS[hub])
    assert all(len(name) <= LONGEST for name in names)


def test_sources_are_whole_and_a_legend_has_each_once():
    hub = [
        f"file//home/me/birds.pt{R50}&lr=0.1",
        "timm/resnet18",
        "resnet34",
        "resnet50.a1?size=64",
    ]
    sources = (hub[0], *hub[1:])
    assert expert_sources(hub) == sources
    assert legend(sources, expert_names(hub)) == [
        f"birds = {hub[0]}", "resnet18", "resnet34", "resnet50 = resnet50.a1?size=64",
    ]  # fmt: skip
