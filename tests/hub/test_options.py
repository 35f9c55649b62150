"""What a spec asks of an expert: rates, freezing, BatchNorm, sizes; and images as the source has
them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.hub import (
    HUBS,
    ExpertSpec,
    HubError,
    RunningStatistics,
    build_experts,
    create_model,
    expand_names,
    head_parameters,
    load_body,
    split_parameters,
)
from hubpath_fast.hub.expert import network
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.settings import ModelSettings
from hubpath_fast.hub.spec import split_names
from hubpath_fast.training import TrainerConfig, build_optimizer, default_groups


def build(*names, num_outputs=5, input_size=32):
    return build_experts(names, num_outputs, pretrained=False, input_size=input_size)


def test_a_spec_is_read_and_written():
    text = "file/a b.pth?arch=timm/resnet50&lr=0.1&freeze=body&bn=running&size=192&mean=0.5:0.4:0.3"
    spec = ExpertSpec.parse(text)
    assert spec == ExpertSpec(
        "file/a b.pth",
        lr_factor=0.1,
        freeze="body",
        batchnorm="running",
        size=192,
        mean=(0.5, 0.4, 0.3),
        arch="timm/resnet50",
    )
    assert ExpertSpec.parse(str(spec)) == spec
    assert str(ExpertSpec.parse("timm/resnet50")) == "timm/resnet50"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("resnet50?lr=fast", "lr=fast is not a number"),
        ("resnet50?size=1.5", "size=1.5 is not a whole number"),
        ("resnet50?mean=0.5,0.5", "mean=0.5,0.5 is not numbers with colons between"),
        ("resnet50?mean=0.5:0.5", "mean: expected 3 numbers"),
        ("resnet50?std=0:1:1", "std: expected numbers above 0"),
        ("resnet50?freze=body", "unknown option 'freze'; did you mean freeze"),
        ("resnet50?freeze=yes", "freeze: expected one of none, body, all, got 'yes'"),
        ("resnet50?bn=off", "bn: expected one of train, running, got 'off'"),
        ("resnet50?lr=0", "lr: expected a number above 0, got 0.0; for 0, freeze=body"),
        ("resnet50?size=0", "size: expected pixels, at least 1, got 0"),
    ],
)
def test_a_spec_that_cannot_be_is_refused(text, message):
    with pytest.raises(HubError, match=message):
        ExpertSpec.parse(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"name": "resnet50?lr=0.1"},
            r"read from text alone; .*ExpertSpec\.parse\(TEXT\), or the f",
        ),
        ({"mean": 0.5}, r"mean: expected 3 numbers, one a channel, got 0\.5"),
        ({"std": "none"}, r"std: expected 3 numbers, one a channel, got 'none'"),
        ({"std": (0.1, 0.1, None)}, r"std: expected 3 numbers"),
        ({"mean": (0.1, 0.1, float("nan"))}, r"mean: expected 3 numbers"),
        ({"name": "resnet50", "key": "model"}, r"key is for file/PATH alone"),
        ({"name": "resnet50", "prefix": "model."}, r"prefix is for file/PATH alone"),
        ({"name": "local-dir:x", "arch": "resnet50"}, r"arch is for file/PATH alone"),
    ],
)
def test_a_spec_of_impossible_fields_is_refused(fields, message):
    with pytest.raises(HubError, match=message):
        find(ExpertSpec(**{"name": "resnet50", **fields}))


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a, b ,,c ", ["a", "b", "c"]),
        ("", []),
        ("a,file//data/my,models/x.pth?arch=timm/resnet18,b",
         ["a", "file//data/my,models/x.pth?arch=timm/resnet18", "b"]),
        ("file/a, b,c.pth?freeze=body&arch=r&lr=0.1, tiny",
         ["file/a, b,c.pth?freeze=body&arch=r&lr=0.1", "tiny"]),
        # Names without an arch, which will be reported, take no others with them.
        ("file/x.pth,file/y.pth?arch=r", ["file/x.pth", "file/y.pth?arch=r"]),
        ("file/x.pth,resnet50", ["file/x.pth", "resnet50"]),
        ("local-dir:gone,resnet50", ["local-dir:gone", "resnet50"]),
    ],
)  # fmt: skip
def test_a_text_of_names_is_split_at_commas_that_are_in_no_path(text, names):
    assert split_names(text) == names


def test_a_folder_with_commas_is_one_name(tmp_path):
    (tmp_path / "my,models,2").mkdir()
    for name in (f"local-dir:{tmp_path}/my,models,2", f"local-dir:{tmp_path}/my,models,2?lr=0.1"):
        assert split_names(f"a, {name},resnet50?lr=2, b") == ["a", name, "resnet50?lr=2", "b"]


def test_the_settings_of_a_hub_split_text_alone():
    text = "file//my,models/x.pth?arch=test_resnet,tiny-homogeneous"
    name, *others = ModelSettings(hub=text).hub
    assert name == "file//my,models/x.pth?arch=test_resnet"
    assert others == ["timm/test_resnet"] * 5
    assert ModelSettings(hub=["a,b", "c"]).hub == ("a,b", "c")


def test_a_lone_wrong_name_is_said_before_k():
    with pytest.raises(HubError, match=r"no model 'resnet5'; did you mean resnet50"):
        ModelSettings(hub="resnet5")
    with pytest.raises(ValueError, match=r"k: expected an integer in 1\.\.1 .* got 2"):
        ModelSettings(hub="test_resnet")


def test_named_hubs_stand_for_their_experts_everywhere():
    assert expand_names("tiny") == HUBS["tiny"]
    assert expand_names(["resnet50", "tiny-homogeneous?lr=0.1"]) == (
        "resnet50",
        *["timm/test_resnet?lr=0.1"] * 5,
    )
    model = create_model("tiny", 4, k=2, pretrained=False, input_size=32)
    assert len(model.experts) == 5
    assert len(create_model(["tiny", "test_resnet"], 4, pretrained=False).experts) == 6
    [*_, last] = build(ExpertSpec("tiny-homogeneous", freeze="all"))
    assert not any(p.requires_grad for p in last.module.parameters())


@pytest.mark.parametrize("make", [build_experts, create_model])
@pytest.mark.parametrize(
    "names", [nn.ModuleList(), ExpertSpec("tiny"), 3, ["test_resnet", 3], [None], ()]
)
def test_what_is_no_list_of_experts(make, names):
    with pytest.raises(HubError, match=r"names: expected|is a int|is a NoneType"):
        make(names, 5, pretrained=False)


def test_all_wrong_specs_are_reported_at_once(no_network):
    with pytest.raises(HubError) as caught:
        build("test_resnet?lr=x", "resnet5", "test_byobnet?size=0")
    assert len(caught.value.problems) == 2  # specs are read before names are looked up


def test_freezing():
    body, everything, free = build(
        "test_resnet?freeze=body", "test_resnet?freeze=all", "test_resnet"
    )
    frozen, head = split_parameters(body.module)
    assert len(head) == 2
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for p in head)
    assert not any(p.requires_grad for p in everything.module.parameters())
    assert all(p.requires_grad for p in free.module.parameters())


@pytest.mark.parametrize(
    ("options", "moves"),
    [("", True), ("?bn=running", False), ("?freeze=body", False), ("?freeze=body&bn=train", True)],
)
def test_batchnorm_policy(options, moves):
    [expert] = build(f"test_resnet{options}")
    before = {name: t.clone() for name, t in expert.body.named_buffers()}
    module = expert.module.train().eval().train()
    x = torch.randn(4, 3, 32, 32)
    training = module(x)
    changed = any(not torch.equal(t, before[name]) for name, t in expert.body.named_buffers())
    assert changed == moves
    if not moves:
        torch.testing.assert_close(training, module.eval()(x))
        assert module.body.training is False
        assert isinstance(module, RunningStatistics)


def test_a_size_of_its_own():
    own, shared = build("test_resnet?size=48", "test_resnet")
    assert (own.size, own.module.size, shared.size) == (48, 48, 32)
    seen = []
    own.body.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    own.module(torch.zeros(2, 3, 32, 32))
    assert seen == [(2, 3, 48, 48)]
    with pytest.raises(HubError, match=r"levit_128s.* refuses images of 64 x 64 .*example, 224"):
        build("levit_128s?size=64")


def test_all_wrappers_at_once_keep_head_body_and_weights():
    [expert] = build("test_resnet?size=48&bn=running&lr=0.5&freeze=body")
    assert network(expert.module) is expert.body
    assert [p.shape for p in head_parameters(expert.module)] == [(5, 96), (5,)]
    source = build("test_resnet", num_outputs=9)[0].body.state_dict()
    load_body(expert, source)
    own = expert.body.state_dict()
    assert all(torch.equal(own[n], t) for n, t in source.items() if not n.startswith("fc."))


def test_the_trainers_groups_respect_rates_and_frozen_bodies():
    names = [
        "test_resnet?lr=0.1",
        "test_resnet",
        "test_resnet?freeze=body&lr=0.1",
        "test_resnet?lr=3",
    ]
    model = create_model(names, 5, pretrained=False, input_size=32)
    config = TrainerConfig(lr_expert=0.1, lr_head=0.2, lr_router=0.3)
    groups = default_groups(model, config)
    assert [(g.name, pytest.approx(g.lr)) for g in groups] == [
        ("experts", 0.1),
        ("experts x 0.1", 0.01),
        ("experts x 3", 0.3),
        ("heads", 0.2),
        ("router", 0.3),
    ]
    heads = [p for expert in model.experts for p in head_parameters(expert)]
    assert [id(p) for p in groups[3].params] == [id(p) for p in heads]
    assert len(heads) == 8
    optimizer = build_optimizer(model, groups, config)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for i, expected in enumerate((0.01, 0.1, None, 0.3)):
        body, head = split_parameters(model.experts[i])
        assert all(rate.get(id(p)) == pytest.approx(expected) for p in body)
        assert {rate[id(p)] for p in head} == {0.2}


def test_heads_are_drawn_alike_whether_weights_are_loaded_or_not(cached_test_resnet):
    heads = []
    for pretrained in (True, False):
        torch.manual_seed(5)
        [*_, last] = build_experts(["test_resnet"] * 2, 5, pretrained, 32)
        heads.append(last.body.fc.weight)
    assert torch.equal(*heads)


def first_input(model, index):
    """What the first convolution of an expert gets, as the model is called."""
    seen = []
    module = next(m for m in model.experts[index].modules() if isinstance(m, nn.Conv2d))
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    return seen, handle


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_first_layers_get_what_their_sources_transforms_give(dtype):
    import timm
    import torchvision
    from PIL import Image
    from timm.data import create_transform, resolve_model_data_config
    from torchvision.transforms.functional import pil_to_tensor

    names = ["timm/test_resnet", "timm/convnext_atto.d2_in1k", "torchvision/mobilenet_v3_small",
             "moco/resnet50", "torchvision/maskrcnn_resnet50_fpn"]  # fmt: skip
    side, n = 64, 3
    generator = torch.Generator().manual_seed(0)
    raw = torch.randint(256, (n, side, side, 3), dtype=torch.uint8, generator=generator)
    pictures = [Image.fromarray(image.numpy()) for image in raw]
    images = torch.stack([pil_to_tensor(picture) for picture in pictures])

    presets = torchvision.models
    small = presets.MobileNet_V3_Small_Weights.DEFAULT.transforms(crop_size=side, resize_size=side)
    with torch.device("meta"):
        detector = presets.detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)

    def detect(picture):
        tensor = torchvision.transforms.functional.to_tensor(picture)
        return detector.transform.normalize(tensor)

    def by_timm(name):
        config = resolve_model_data_config(timm.create_model(name.removeprefix("timm/")))
        # No crop and no resizing: the images have the network's size already.
        config |= {"input_size": (3, side, side), "crop_pct": 1.0}
        return create_transform(**config, is_training=False)

    resnet = presets.ResNet50_Weights.IMAGENET1K_V1.transforms(crop_size=side, resize_size=side)
    oracles = [by_timm(names[0]), by_timm(names[1]), small, resnet, detect]
    model = create_model(names, 4, k=5, pretrained=False, input_size=side).eval()
    x = images if dtype == torch.uint8 else images.float() / 255
    for index, oracle in enumerate(oracles):
        seen, handle = first_input(model, index)
        with torch.no_grad():
            model(x)
        handle.remove()
        expected = torch.stack([oracle(picture) for picture in pictures])
        # Values below 3 in float32; x * scale + shift rounds otherwise than (x - mean) / std.
        torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


def test_a_mean_of_ones_own_reaches_the_first_layer():
    model = create_model(
        ["test_resnet?mean=0.1:0.2:0.3&std=0.5:0.25:1", "test_resnet"], 4, pretrained=False,
        input_size=32,
    ).eval()  # fmt: skip
    assert isinstance(model, hp.HubPathway)
    seen, _ = first_input(model, 0)
    with torch.no_grad():
        model(torch.full((1, 3, 32, 32), 0.6))
    expected = torch.tensor([1.0, 1.6, 0.3])[None, :, None, None].expand(1, 3, 32, 32)
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-6)
