"""The last map of networks of many kinds, and heads on it."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass

import pytest
import timm
import torch
from torch import nn
from torchvision import models

from hubpath_fast.hub import HubError, Resized, build_experts, load_body
from hubpath_fast.hub.costs import count_flops, expert_flops
from hubpath_fast.hub.dense import DenseNetwork, resized
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.source import on_meta
from hubpath_fast.hub.spec import ExpertSpec

L = 3


@dataclass(frozen=True)
class Maps:
    """A map for each output, of a quarter of the image's side, by interpolation."""

    num_outputs: int = L

    def expected_shape(self, size):
        return (self.num_outputs, size // 4, size // 4)

    def attach_head(self, network):
        return DenseNetwork(network, self.head)

    def head(self, channels, stride):
        scale = nn.Upsample(scale_factor=stride / 4, mode="bilinear")
        return nn.Sequential(nn.Conv2d(channels, self.num_outputs, 1), scale)


TASK = Maps()


def dense(network):
    """Without a head: its outputs are the map."""
    return DenseNetwork(network, lambda channels, stride: nn.Identity()).eval()


# Of every kind of network that a map is read from in another way: the parameters of the network
# (classifier and all) that are gone, then F and the stride of its map.
KINDS = {
    "timm/test_resnet": (("fc",), 96, 32),
    "timm/test_byobnet": (("head.fc",), 256, 32),
    "timm/test_efficientnet": (("classifier",), 256, 32),
    "timm/test_nfnet": (("head.fc",), 192, 32),
    "timm/test_convnext": (("head.norm", "head.fc"), 64, 32),
    "timm/mobilenetv3_small_050": (("conv_head", "classifier"), 288, 32),
    "timm/hgnet_tiny": (("head.last_conv.0", "head.fc"), 768, 32),
    "timm/test_vit": (("head",), 64, 16),
    "timm/test_vit_relpos": (("fc_norm", "head"), 96, 16),
    "timm/test_maxvit": (("head.fc",), 128, 32),
    "timm/test_mambaout": (("head.norm", "head.pre_logits.fc", "head.fc"), 64, 32),
    "timm/deit_tiny_distilled_patch16_224": (("head", "head_dist"), 192, 16),
    "timm/vit_small_patch14_reg4_dinov2": (("head",), 384, 16),
    "timm/eva02_tiny_patch14_224": (("fc_norm", "head"), 192, 16),
    "timm/cait_xxs24_224": (("blocks_token_only", "head"), 192, 16),
    "timm/swin_tiny_patch4_window7_224": (("head.fc",), 768, 32),
    "timm/levit_128s": (("head.bn", "head.linear", "head_dist.bn", "head_dist.linear"), 384, 64),
    "torchvision/resnet18": (("fc",), 512, 32),
    "torchvision/mobilenet_v2": (("classifier.1",), 1280, 32),
    "torchvision/mobilenet_v3_small": (("classifier.0", "classifier.3"), 576, 32),
    "torchvision/efficientnet_b0": (("classifier.1",), 1280, 32),
    "torchvision/convnext_tiny": (("classifier.0", "classifier.2"), 768, 32),
    "torchvision/densenet121": (("classifier",), 1024, 32),
    "torchvision/regnet_y_400mf": (("fc",), 440, 32),
    "torchvision/shufflenet_v2_x0_5": (("fc",), 1024, 32),
    "torchvision/mnasnet0_5": (("classifier.1",), 1280, 32),
    "torchvision/googlenet": (("fc",), 1024, 32),
    "torchvision/vgg11": (("classifier.0", "classifier.3", "classifier.6"), 512, 32),
    "torchvision/swin_t": (("head",), 768, 32),
    "torchvision/vit_b_16": (("heads.head",), 768, 16),
    "torchvision/maxvit_t": (("classifier.2", "classifier.3", "classifier.5"), 512, 32),
    "torchvision/deeplabv3_resnet50": (("fc",), 2048, 32),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_parameter_that_is_left_learns(name):
    """On the meta device: shapes and which parameter has a gradient are all that is asked."""
    model = find(ExpertSpec.parse(name))
    removed, channels, stride = KINDS[name]
    plain = on_meta(lambda: model.make(7))
    sizes = {name: p.numel() for name, p in plain.named_parameters()}
    network = on_meta(lambda: TASK.attach_head(plain))
    gone = [name for name in sizes if name.startswith(tuple(f"{layer}." for layer in removed))]
    assert [name for name in network.removed if name in sizes] == gone
    assert len(gone) > 0
    left = sum(p.numel() for p in network.backbone.parameters())
    assert left == sum(sizes.values()) - sum(sizes[name] for name in gone)
    assert (network.found.channels, network.stride) == (channels, stride)
    network.image_size = 256
    output = network(torch.empty(2, 3, model.native_size, model.native_size, device="meta"))
    assert output.shape == (2, L, 64, 64)
    output.sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None] == []


def classified(plain, features):
    """What torchvision's network makes of the map of its own."""
    if isinstance(plain, (models.ConvNeXt, models.VGG)):
        features = plain.avgpool(features)
        return plain.classifier(
            features if isinstance(plain, models.ConvNeXt) else features.flatten(1)
        )
    if isinstance(plain, models.MaxVit):
        return plain.classifier(features)
    names = ("fc", "classifier", "head")
    last = next(getattr(plain, name) for name in names if hasattr(plain, name))
    return last(features.mean((2, 3)))


TORCHVISION = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "convnext_tiny",
    "densenet121", "regnet_y_400mf", "shufflenet_v2_x0_5", "mnasnet0_5", "googlenet", "swin_t",
]  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_the_map_of_torchvisions_networks_is_what_they_classify(name):
    torch.manual_seed(0)
    plain = find(ExpertSpec.parse(f"torchvision/{name}")).make(7).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(x)
        features = dense(copy.deepcopy(plain))(x)
        found = classified(plain, features)
    assert features.shape[2:] == (2, 2)
    # Two orders of the same mean, in float32.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


NAMED = ["test_resnet", "test_convnext", "test_vit", "test_mambaout"]


@pytest.mark.parametrize("name", NAMED)
def test_the_map_of_timms_networks_is_that_of_their_features(name):
    torch.manual_seed(0)
    plain = timm.create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = plain.forward_features(x)
        found = dense(copy.deepcopy(plain))(x)
    if name == "test_mambaout":
        expected = expected.permute(0, 3, 1, 2)
    if name == "test_vit":  # one token of no place, then four rows of four
        expected = expected[:, 1:].reshape(2, 4, 4, 64).permute(0, 3, 1, 2)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["test_vit", "test_vit_relpos", "torchvision/swin_t"])
def test_a_cell_of_the_map_stands_where_its_pixels_are(name):
    torch.manual_seed(0)
    model = find(ExpertSpec.parse(name))
    network = dense(model.make(7))
    size, stride = model.native_size, network.stride
    x = torch.randn(1, 3, size, size)
    side = size // stride
    for row, column in ((0, 1), (side - 1, 2), (2, side - 1)):
        changed = x.clone()
        places = (slice(i * stride, (i + 1) * stride) for i in (row, column))
        changed[(..., *places)] = 2 * torch.randn(3, stride, stride)
        with torch.no_grad():
            difference = (network(changed) - network(x)).abs().sum(1)[0]
        assert divmod(difference.argmax().item(), side) == (row, column)


def test_a_vit_takes_other_sizes_and_keeps_what_it_makes_of_its_own():
    torch.manual_seed(0)
    plain = timm.create_model("deit_tiny_patch16_224", depth=2).eval()
    network = dense(copy.deepcopy(plain))
    with torch.no_grad():
        x = torch.randn(1, 3, 224, 224)
        expected = plain.forward_features(x)[:, 1:].transpose(1, 2).reshape(1, 192, 14, 14)
        assert torch.equal(network(x), expected)
        assert network(torch.randn(1, 3, 256, 256)).shape == (1, 192, 16, 16)


def test_networks_without_a_map_are_named():
    kinds = {
        "inception_v3": r"InceptionV3 exposes no map that a head can use: for two images of "
        r"299 px it gives \[2, 2048, 8, 8\], cells that do not cover the image evenly",
        "torchvision/squeezenet1_1": r"SqueezeNet exposes no map: expected a network of timm with "
        r"forward_features, or one of torchvision's ResNet, .*, VisionTransformer;",
        "coat_tiny": r"CoaT exposes no map .* a list of \[2, 785, 152\]",
        "pit_ti_224": r"PoolingVisionTransformer .* \[2, 1, 256\], whose cells are 224 pixels",
    }
    for name, message in kinds.items():
        full = find(ExpertSpec.parse(name)).name
        with pytest.raises(HubError, match=f"{full}: {message}.*take another network"):
            build_experts([name], L, False, 256, task=TASK)
    with pytest.raises(HubError, match=r"Sequential exposes no map: expected a network of timm "):
        dense(nn.Sequential(nn.Conv2d(3, 8, 3)))


def build(name, size, **options):
    torch.manual_seed(0)
    [expert] = build_experts([name], L, False, size, task=TASK, **options)
    return expert


def test_maps_are_of_the_hubs_images_whatever_size_a_network_works_at():
    """Pixels of a network that takes 160 alone, in a hub of 128: its 5 cells become 4."""
    expert = build("test_maxvit", 128)
    assert isinstance(expert.module, Resized)
    expert.module.eval()
    x = torch.randn(2, 3, 128, 128)
    with torch.no_grad():
        seen = expert.body.backbone.forward_features(expert.module.resize(x))
        cells = nn.functional.interpolate(seen, (4, 4), mode="bilinear", antialias=True)
        larger = nn.functional.interpolate(seen, (8, 8), mode="bilinear")
        features = expert.features(x)
        assert seen.shape[2:] == (5, 5)
        # Sums of at most 3 x 3 products in float32, in another order.
        torch.testing.assert_close(features, cells, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(resized(seen, 8), larger, rtol=1e-5, atol=1e-5)
        assert torch.equal(expert.head(features), expert.module(x))
        assert expert.module(x).shape == (2, L, 32, 32)
        torch.testing.assert_close(expert.pooled(x), features.mean((2, 3)))
    vit = build("vit_tiny_patch16_224", 64)  # a classifier resizes to 224 there
    assert vit.size == 64
    assert vit.module(x[..., :64, :64]).shape == (2, L, 16, 16)
    assert build("test_resnet?size=64", 128).module(x).shape == (2, L, 32, 32)
    with pytest.raises(HubError, match=r"refuses images of 100 x 100 .* 64, 96, 128"):
        build("test_resnet", 100)


def test_other_networks_that_are_resized_must_give_maps_of_the_hubs_images_themselves():
    class Quarter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(3, L, 4, 4)

        def forward(self, x):
            return self.layer(x)

    [expert] = build_experts([Quarter()], L, input_size=64, task=TASK)
    assert expert.module(torch.zeros(1, 3, 64, 64)).shape == (1, L, 16, 16)
    spec = ExpertSpec(Quarter(), size=32)
    with pytest.raises(HubError, match=r"\[n, 3, 32, 32\] to \[n, 3, 16, 16\] .* is \[3, 8, 8\]"):
        build_experts([spec], L, input_size=64, task=TASK)
    own = TASK.attach_head(timm.create_model("test_resnet"))
    [expert] = build_experts([ExpertSpec(own, size=64)], L, input_size=128, task=TASK)
    assert expert.module(torch.zeros(1, 3, 128, 128)).shape == (1, L, 32, 32)


@pytest.mark.parametrize("name", ["test_convnext", "torchvision/mobilenet_v3_small"])
def test_a_body_is_loaded_from_a_plain_network_or_from_one_with_maps(name):
    torch.manual_seed(1)
    plain = find(ExpertSpec.parse(name)).make(11)
    expert = build(name, 64)
    head = copy.deepcopy(expert.body.head.state_dict())
    load_body(expert, plain.state_dict())
    body = expert.body.backbone.state_dict()
    assert all(torch.equal(body[key], plain.state_dict()[key]) for key in body)
    assert plain.state_dict().keys() - body.keys() == {*expert.body.removed}
    assert all(torch.equal(head[key], new) for key, new in expert.body.head.state_dict().items())
    other = build(name, 64)
    load_body(other, expert.body.state_dict())
    assert all(torch.equal(body[k], new) for k, new in other.body.backbone.state_dict().items())
    broken = {**plain.state_dict(), "more": torch.zeros(1)}
    del broken[next(iter(body))]
    with pytest.raises(HubError, match=r"1 missing: backbone\..*; 1 left over: more"):
        load_body(other, broken)


def test_it_is_copied_saved_and_laid_out_as_any_network():
    expert = build("test_resnet", 64)
    network, x = expert.module.eval(), torch.randn(2, 3, 64, 64)
    file = io.BytesIO()
    torch.save(network, file)
    file.seek(0)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(copy.deepcopy(network)(x), expected)
        assert torch.equal(torch.load(file, weights_only=False)(x), expected)
        fresh = build("test_resnet", 64).module.eval()
        fresh.load_state_dict(network.state_dict())
        assert torch.equal(fresh(x), expected)
        last = copy.deepcopy(network).to(memory_format=torch.channels_last)
        assert last.backbone.layer2[0].conv2.weight.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(last(x), expected, rtol=1e-4, atol=1e-5)


def test_flops_are_those_with_the_tasks_head():
    expert = build("test_resnet", 64)
    head = 2 * 96 * L * 2 * 2  # a 1 x 1 convolution of a map of 2 x 2
    plain = count_flops(timm.create_model("test_resnet", num_classes=0), 64)
    assert count_flops(expert.module, 64) == plain + head
    assert expert_flops(expert, L, 64) == plain + head


def test_another_head_takes_the_place_of_one():
    torch.manual_seed(0)
    plain = timm.create_model("test_convnext")
    first = TASK.attach_head(copy.deepcopy(plain))
    again = Maps(7).attach_head(first)
    assert again.backbone is first.backbone
    assert again.removed == first.removed
    assert again(torch.zeros(1, 3, 64, 64)).shape == (1, 7, 16, 16)
    load_body(again, plain.state_dict())


def test_a_network_that_has_lost_its_classifier_is_as_good():
    network = timm.create_model("test_efficientnet", num_classes=0)
    made = TASK.attach_head(network).eval()
    assert made.removed == ()
    assert made(torch.zeros(1, 3, 64, 64)).shape == (1, L, 16, 16)
