"""Every source in its true format: the key layouts of the real architectures, random weights."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from torchvision.models.detection import KeypointRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.ops.misc import FrozenBatchNorm2d

from hubpath_fast.hub import HUBS, ExpertSpec, HubError, build_experts, head_parameters
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.source import PlainTask, accepted_sizes, refusal, skeleton

MASK, KEYPOINT = "torchvision/maskrcnn_resnet50_fpn", "torchvision/keypointrcnn_resnet50_fpn"
DEEPLAB, MOCO = "torchvision/deeplabv3_resnet50", "moco/resnet50"


def empty(shape):
    """A tensor of a true shape that takes four bytes in a file."""
    return torch.zeros(()).expand(shape)


def detector(kind):
    """The architecture as torchvision builds it for its weights: frozen statistics, an FPN."""
    backbone = models.resnet50(weights=None, norm_layer=FrozenBatchNorm2d)
    return kind(_resnet_fpn_extractor(backbone, 3), 2 if kind is KeypointRCNN else 91)


def layout(name, resnet50):
    """A published file: the real network's keys, a ResNet-50's values in its backbone."""
    if name == MOCO:
        encoders = {
            f"module.encoder_{which}.{key}": value if which == "q" else empty(value.shape)
            for which in "qk"
            for key, value in resnet50.items()
            if not key.startswith("fc.")
        }
        heads = {
            f"module.encoder_{which}.fc.{kind}": empty(shape)
            for which in "qk"
            for kind, shape in (("weight", (128, 2048)), ("bias", (128,)))
        }
        queue = {"module.queue": empty((128, 65536)), "module.queue_ptr": torch.zeros(1).long()}
        return {
            "epoch": 200,
            "arch": "resnet50",
            "state_dict": encoders | heads | queue,
            "optimizer": {"state": {}, "param_groups": [{"lr": 0.03}]},
        }
    with torch.device("meta"):
        if name == DEEPLAB:
            network = models.segmentation.deeplabv3_resnet50(
                weights=None, weights_backbone=None, aux_loss=True
            )
        else:
            network = detector(MaskRCNN if name == MASK else KeypointRCNN)
    prefix = "backbone." if name == DEEPLAB else "backbone.body."
    state = {}
    for key, tensor in network.state_dict().items():
        own = resnet50.get(key.removeprefix(prefix)) if key.startswith(prefix) else None
        state[key] = empty(tensor.shape) if own is None else own
    return state


def check_body(expert, state, head="fc."):
    for name, tensor in expert.body.state_dict().items():
        if not name.startswith(head):
            assert torch.equal(tensor, state[name]), name


def check_resnet50(expert, resnet50, num_outputs, counters=True):
    own = expert.body.state_dict()
    assert own.keys() == resnet50.keys()
    assert own["fc.weight"].shape == (num_outputs, 2048)
    for name, tensor in resnet50.items():
        if name.endswith("num_batches_tracked") and not counters:
            assert own[name] == 0
        elif not name.startswith("fc."):
            assert torch.equal(own[name], tensor), name


def test_the_homogeneous_hub_loads_from_the_published_layouts(put, resnet50_state):
    for name in HUBS["paper-homogeneous"]:
        model = find(name)
        source = name.partition(".")[0]
        whole = source == "torchvision/resnet50"
        content = resnet50_state if whole else layout(source, resnet50_state)
        put(model.weights.url, content)
    experts = build_experts("paper-homogeneous", 7)
    assert [expert.name for expert in experts] == list(HUBS["paper-homogeneous"])
    for expert in experts:
        # Frozen statistics have no counters: the plain network's start at zero.
        check_resnet50(expert, resnet50_state, 7, counters="rcnn" not in expert.name)
        assert [p.shape for p in head_parameters(expert.module)] == [(7, 2048), (7,)]


def test_the_published_files_are_what_the_paper_names():
    names = {name: find(name).weights.url.rpartition("/")[2] for name in HUBS["paper-homogeneous"]}
    assert list(names.values()) == [
        "resnet50-0676ba61.pth",
        "moco_v1_200ep_pretrain.pth.tar",
        "maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth",
        "deeplabv3_resnet50_coco-cd0a2569.pth",
        "keypointrcnn_resnet50_fpn_coco-fc266e95.pth",
    ]
    files = [find(name).weights.repository for name in HUBS["paper-heterogeneous"][:4]]
    assert files == list(HUBS["paper-heterogeneous"][:4])


@pytest.fixture
def blank(resnet50_state):
    """Its shapes alone, in a small file."""
    return {name: empty(tensor.shape) for name, tensor in resnet50_state.items()}


@pytest.mark.parametrize("name", [MASK, DEEPLAB, MOCO])
def test_a_missing_and_a_foreign_tensor_are_named(name, put, blank):
    content = layout(name, blank)
    state = content.get("state_dict", content)
    prefix = {MASK: "backbone.body.", DEEPLAB: "backbone.", MOCO: "module.encoder_q."}[name]
    del state[f"{prefix}layer3.5.conv2.weight"]
    state[f"{prefix}extra.weight"] = torch.zeros(1)
    state["elsewhere.weight"] = torch.zeros(1)
    put(find(name).weights.url, content)
    with pytest.raises(HubError) as caught:
        build_experts([name], 3)
    message = str(caught.value)
    assert f"1 missing: {prefix}layer3.5.conv2.weight" in message
    assert (
        f"2 left over: {', '.join(sorted([f'{prefix}extra.weight', 'elsewhere.weight']))}"
        in message
    )
    assert f"do not fit {find(name).name}" in message


SMALL = ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "mnasnet0_5"]


@pytest.mark.parametrize("name", SMALL)
def test_torchvisions_classifiers_load_all_but_the_new_layer(name, put):
    original = models.get_model(name, weights=None)
    put(find(f"torchvision/{name}").weights.url, original.state_dict())
    [expert] = build_experts([f"torchvision/{name}"], 7, input_size=64)
    assert all(p.shape[0] == 7 for p in head_parameters(expert.module))
    new = {id(p) for p in head_parameters(expert.module)}
    names = {n for n, p in expert.body.named_parameters() if id(p) in new}
    assert len(names) == 2
    for key, tensor in expert.body.state_dict().items():
        if key not in names:
            assert torch.equal(tensor, original.state_dict()[key]), key


def test_old_names_of_densenets(put):
    original = models.densenet121(weights=None).state_dict()
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", name): tensor
        for name, tensor in original.items()
        if not name.endswith("num_batches_tracked")  # as in files of that age
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    put(find("torchvision/densenet121").weights.url, old)
    [expert] = build_experts(["torchvision/densenet121"], 3)
    check_body(expert, original, head="classifier.")


@pytest.mark.parametrize(("name", "size"), [("googlenet", 224), ("inception_v3", 299)])
def test_auxiliary_classifiers_are_left_out(name, size):
    model = find(f"torchvision/{name}")
    with torch.device("meta"):
        whole = models.get_model(name, weights=None, init_weights=False, aux_logits=True)
        network = model.make(5)
    assert network.transform_input  # as torchvision sets it for its weights
    kept, left_over = model.layout.split(whole.state_dict())
    assert set(kept) == set(network.state_dict())
    assert not left_over
    assert model.native_size == size


def test_networks_of_one_size_resize_inside():
    model = find("torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1")
    assert (model.native_size, model.fixed_size) == (384, True)
    assert refusal(model, PlainTask(5), 224) is not None
    assert accepted_sizes(model, PlainTask(5)) == [384]


def test_the_heads_of_torchvisions_classifiers():
    # One of each kind of head and of each way to be built.
    for name in ("alexnet", "convnext_tiny", "swin_t", "regnet_y_400mf", "vit_b_16"):
        network = skeleton(find(f"torchvision/{name}"), PlainTask(6))
        heads = head_parameters(network)
        assert {p.shape[0] for p in heads} == {6}, name
        assert len(heads) == 2


# Files of the user's own.


@pytest.fixture
def mine(tmp_path):
    """A tiny network that was fine-tuned on 37 classes, and where to save it."""
    torch.manual_seed(2)
    return timm.create_model("test_resnet", num_classes=37).state_dict(), tmp_path


@pytest.mark.parametrize(
    "kind", ["safetensors", "pth", "parallel", "headless", "state_dict", "model"]
)
def test_a_local_file_with_any_head(kind, mine):
    state, folder = mine
    path = folder / f"birds.{'safetensors' if kind == 'safetensors' else 'pth'}"
    content = dict(state)
    if kind == "parallel":
        content = {f"module.{name}": tensor for name, tensor in state.items()}
    if kind == "headless":
        content = {name: t for name, t in state.items() if not name.startswith("fc.")}
    if kind in ("state_dict", "model"):
        content = {kind: content, "epoch": 3}
    save_file(content, path) if kind == "safetensors" else torch.save(content, path)
    [expert] = build_experts([f"file/{path}?arch=timm/test_resnet"], 5, input_size=32)
    check_body(expert, state)
    assert expert.name == f"file/{path}?arch=timm/test_resnet.r160_in1k"
    assert expert.mean == (0.5, 0.5, 0.5)


def test_a_local_file_in_the_layout_of_its_source(tmp_path, resnet50_state):
    path = tmp_path / "detector.pth"
    torch.save(layout(MASK, resnet50_state), path)
    [expert] = build_experts([ExpertSpec(f"file/{path}", arch=MASK)], 4)
    check_resnet50(expert, resnet50_state, 4, counters=False)
    path.unlink()


OLDER_NAMES = [
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
    (r"\.conv_dw\.", ".dwconv."),
    (r"\.mlp\.fc([12])\.", r".pwconv\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head."),
]


def test_a_local_file_that_timm_would_rename(tmp_path):
    """ConvNeXt's own files have other names than timm's network."""
    original = timm.create_model("convnext_atto", num_classes=1000).state_dict()
    old = {}
    for name, tensor in original.items():
        for pattern, older in OLDER_NAMES:
            name = re.sub(pattern, older, name)
        old[name] = tensor.flatten(1) if "pwconv" in name and tensor.dim() == 4 else tensor
    torch.save(old, tmp_path / "atto.pth")
    [expert] = build_experts([f"file/{tmp_path / 'atto.pth'}?arch=convnext_atto"], 4, input_size=64)
    check_body(expert, original, head="head.fc.")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file of weights at .*birds.pth"),
        ("no checkpoint", "birds.pth is broken|no checkpoint at all"),
        (
            {"conv1.weight": torch.zeros(1)},
            r"birds.pth do not fit file/.*test_resnet.* missing: .*left over: conv1.weight",
        ),
    ],
)
def test_local_files_are_refused_before_anything_is_fetched(
    content, message, tmp_path, no_network, monkeypatch
):
    path = tmp_path / "birds.pth"
    if isinstance(content, str):
        path.write_text(content)
    elif content is not None:
        torch.save(content, path)

    def fetch(*_, **__):
        pytest.fail("a download was begun")

    monkeypatch.setattr("hubpath_fast.hub.build.fetch_all", fetch)
    with pytest.raises(HubError, match=message):
        build_experts(["test_nfnet", f"file/{path}?arch=test_resnet"], 5, input_size=32)


def test_names_of_local_files(tmp_path):
    with pytest.raises(HubError, match=r"does not say whose weights.*\?arch=timm/NAME"):
        find(f"file/{tmp_path}/w.pth")
    with pytest.raises(HubError, match=r"w.pth\?arch=resnet5: timm has no model"):
        find("file/w.pth?arch=resnet5")
    with pytest.raises(HubError, match="arch is for file/PATH alone"):
        find("timm/resnet50?arch=resnet50")
    # Without pre-trained weights the file is not read: a finished run opens without it.
    [expert] = build_experts(["file/gone.pth?arch=test_resnet"], 5, pretrained=False, input_size=32)
    assert expert.body.fc.out_features == 5


def test_a_folder_as_timm_saves_it(tmp_path):
    from timm.models import save_for_hf

    torch.manual_seed(4)
    network = timm.create_model("test_resnet", num_classes=37)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    save_for_hf(network, tmp_path, safe_serialization=True)
    [expert] = build_experts([f"local-dir:{tmp_path}"], 5, input_size=32)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    check_body(expert, theirs.state_dict())
    assert expert.mean == (0.1, 0.2, 0.3)
    assert find(f"local-dir:{tmp_path}").native_size == 160


def test_folders_that_are_not_timms(tmp_path):
    with pytest.raises(HubError, match=r"no config.json in .*expected the folder to hold"):
        find(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(HubError, match="is no JSON"):
        find(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "resnet5"}')
    with pytest.raises(HubError, match=r"no architecture 'resnet5'.*did you mean"):
        find(f"local-dir:{tmp_path}")
    (tmp_path / "config.json").write_text('{"architecture": "test_resnet", "input_size": [3,9,9]}')
    with pytest.raises(HubError, match=r"no file of weights at .*model.safetensors"):
        build_experts([f"local-dir:{tmp_path}"], 5, input_size=32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torchvision/resnet5", "torchvision has no model 'resnet5'; did you mean resnet50"),
        ("torchvision/resnet50.V3", "has IMAGENET1K_V1, IMAGENET1K_V2"),
        ("moco/resnet18", "there are moco/resnet50.v1_200ep"),
        ("keras/resnet50", r"unknown source 'keras'; there are timm/NAME.*hub list"),
        ("timm/test_*", r"is a pattern of \d+ names .*a hub takes names"),
        ("paper-homogenous", "did you mean .*paper-homogeneous"),
    ],
)
def test_names_that_do_not_exist(name, message):
    with pytest.raises(HubError, match=message):
        find(name)


def test_a_module_of_ones_own_is_an_expert_as_it_is():
    torch.manual_seed(0)
    own = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 6))
    state = {name: tensor.clone() for name, tensor in own.state_dict().items()}
    experts = build_experts(
        [own, ExpertSpec(own, mean=(0.5,) * 3, std=(0.25,) * 3), "test_resnet"],
        6,
        pretrained=False,
        input_size=32,
    )
    assert experts[0].module is own
    assert (experts[0].mean, experts[0].std) == ((0, 0, 0), (1, 1, 1))
    assert (experts[1].mean, experts[1].std) == ((0.5,) * 3, (0.25,) * 3)
    assert own.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in own.state_dict().items())
    network = timm.create_model("test_resnet", num_classes=6)
    assert build_experts([network], 6, input_size=32)[0].mean == (0.5,) * 3
    with pytest.raises(HubError, match=r"module Sequential does not map .* to .*5"):
        build_experts([own], 5, input_size=32)
