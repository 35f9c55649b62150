"""Names as timm, torchvision and the pages of the Hugging Face hub write them."""

from __future__ import annotations

import json
import unicodedata
import warnings

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import get_deprecated_models, save_for_hf

from hubpath_fast.hub import HubError, build_experts, timm_models
from hubpath_fast.hub.aliases import local_path
from hubpath_fast.hub.registry import find

# Which timm's own create_model refuses, too: its table has a tag that there is not.
WRONG_IN_TIMM = {"vit_base_patch32_224_sam": "vit_base_patch32_224.sam_in1k",
                 "vit_base_patch16_224_sam": "vit_base_patch16_224.sam_in1k"}  # fmt: skip


@pytest.fixture(autouse=True)
def nothing_said_yet():
    timm_models._warn_renamed.cache_clear()


def test_all_old_names_of_timm_stand_for_the_present_ones():
    renamed = get_deprecated_models()
    assert len(renamed) > 200
    for old, new in renamed.items():
        if old in WRONG_IN_TIMM:
            with pytest.warns(match=old), pytest.raises(HubError, match=WRONG_IN_TIMM[old]):
                find(old)
            continue
        with pytest.warns(UserWarning, match=f"renamed timm/{old} to timm/{new}, which is taken"):
            model = find(old)
        tag = timm.get_pretrained_cfg(new).tag
        assert model.name == f"timm/{new}" if "." in new else f"timm/{new}.{tag}", old
        assert model == find(new)
        with warnings.catch_warnings():  # once
            warnings.simplefilter("error", UserWarning)
            assert find(old) == model


def test_an_old_name_keeps_its_tag_and_is_the_networks_that_timm_builds():
    with pytest.warns(match="tf_efficientnet_b0_ns.ap_in1k to timm/tf_efficientnet_b0.ap_in1k"):
        assert find("tf_efficientnet_b0_ns.ap_in1k").name == "timm/tf_efficientnet_b0.ap_in1k"
    with pytest.warns(match="Mapping deprecated"):
        theirs = timm.create_model("tf_efficientnet_b0_ns").pretrained_cfg
    with pytest.warns(match="renamed"):
        ours = find("tf_efficientnet_b0_ns")
    assert ours.weights.repository == theirs["hf_hub_id"]
    assert ours.name.endswith(theirs["tag"])


def test_a_name_that_timm_removed(monkeypatch):
    monkeypatch.setattr(timm.models, "get_deprecated_models", lambda: {"resnte50": None})
    with pytest.raises(HubError, match=r"timm has removed 'resnte50'; did you mean .*resnet50"):
        find("resnte50")
    monkeypatch.delattr(timm.models, "get_deprecated_models")  # of some later timm
    assert find("resnet50").name == "timm/resnet50.a1_in1k"


PRESENT = "timm/resnet50.a1_in1k"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hf-hub:timm/resnet50.a1_in1k", PRESENT),
        ("hf_hub:timm/resnet50", PRESENT),
        (" HF-hub:timm/resnet50\n", PRESENT),
        ("https://huggingface.co/timm/resnet50.a1_in1k", PRESENT),
        ("https://huggingface.co/timm/resnet50.a1_in1k/tree/main", PRESENT),
        ("https://huggingface.co/timm/resnet50.a1_in1k/", PRESENT),
        ("hf.co/timm/resnet50.a1_in1k", PRESENT),
        ("timm.models.resnet50", PRESENT),
        ("timm:resnet50", PRESENT),
        ("torchvision.models.resnet50", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/ResNet50", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/resnet50.imagenet1k_v1", "torchvision/resnet50.IMAGENET1K_V1"),
        ("torchvision/resnet50.DEFAULT", "torchvision/resnet50.IMAGENET1K_V2"),
        ("ResNet50_Weights.IMAGENET1K_V1", "torchvision/resnet50.IMAGENET1K_V1"),
        ("ResNet50_Weights.DEFAULT", "torchvision/resnet50.IMAGENET1K_V2"),
        ("torchvision/resnet50.ResNet50_Weights.IMAGENET1K_V1",
         "torchvision/resnet50.IMAGENET1K_V1"),
        ("torchvision.models.ViT_B_16_Weights.IMAGENET1K_SWAG_E2E_V1",
         "torchvision/vit_b_16.IMAGENET1K_SWAG_E2E_V1"),
        ("torchvision.models.segmentation.deeplabv3_resnet50",
         "torchvision/deeplabv3_resnet50.COCO_WITH_VOC_LABELS_V1"),
    ],
)  # fmt: skip
def test_a_name_of_other_tools(name, expected):
    assert find(name).name == expected


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ResNet-50", r"did you mean resnet50 or torchvision/resnet50"),
        ("timm/EfficientNet_B0", r"did you mean efficientnet_b0 or"),
        ("vit-b-16", r"did you mean torchvision/vit_b_16\?"),
        ("mobilenet_v2", r"did you mean torchvision/mobilenet_v2 or"),
        ("swin_tiny", r"did you mean swin_tiny_patch4_window7_224 or"),
        ("torchvision/fasterrcnn_resnet50_fpn", r"is no classifier; .*deeplabv3_resnet50"),
        ("microsoft/resnet-50", r"a repository of the .* hub is hf-hub:microsoft/resnet-50"),
        ("hf-hub:resnet50", r"expected hf-hub:USER/NAME"),
        ("weights/birds.pth", r"a file is named file/PATH\?arch=NAME"),
        ("file/birds.pth?arch=resnet5", r"birds.pth\?arch=resnet5: .* did you mean resnet50"),
    ],
)
def test_the_closest_name_is_the_right_one(name, message):
    with pytest.raises(HubError, match=message):
        find(name)


def test_a_wrong_name_in_timms_own_place(no_network):
    with pytest.raises(HubError, match=r"timm itself has no model 'resnte50'; did you mean resnet"):
        find("hf-hub:timm/resnte50")


def test_an_absolute_path_that_lacks_its_slash(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"")
    path = tmp_path.as_posix().lstrip("/") + "/w.pth"
    hint = rf"no file of weights at {path}, but at /{path}: .*slash more, file//{path}$"
    with pytest.raises(HubError, match=hint):
        build_experts([f"file/{path}?arch=test_resnet"], 5, input_size=32)


def test_a_revision_of_a_repository_of_timm():
    model = find("hf-hub:timm/resnet50.a1_in1k@v1")
    assert model.name == f"{PRESENT}@v1"
    assert (model.weights.repository, model.weights.revision) == (PRESENT, "v1")


@pytest.fixture
def cached_birds(no_network):
    """The cache as it lies after a download of someone's fine-tuned model; its state dict."""
    torch.manual_seed(4)
    network = timm.create_model("test_resnet", num_classes=37)
    network.pretrained_cfg = {**network.pretrained_cfg, "mean": (0.1, 0.2, 0.3)}
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = no_network / "hf" / "models--user--birds"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text(revision)
    save_for_hf(network, folder / "snapshots" / revision, safe_serialization=True)
    return network.state_dict(), folder / "snapshots" / revision


@pytest.mark.parametrize("name", ["hf-hub:user/birds", "https://huggingface.co/user/birds"])
def test_a_repository_of_somebody_else(name, cached_birds):
    state, _ = cached_birds
    [expert] = build_experts([name], 5, input_size=32)
    assert (expert.name, expert.mean) == ("hf-hub:user/birds", (0.1, 0.2, 0.3))
    own = expert.body.state_dict()
    assert all(torch.equal(own[n], t) for n, t in state.items() if not n.startswith("fc."))


def test_a_repository_that_is_not_there_or_none_of_timms(cached_birds, no_network):
    with pytest.raises(HubError) as caught:
        build_experts(["hf-hub:user/fish", "resnet5"], 5, pretrained=False)
    network, typing = caught.value.problems
    assert "hf-hub:user/fish: its config.json, which says what network it is, is not in" in network
    assert "cannot be downloaded" in network
    assert "local-dir:PATH" in network
    assert "resnet5" in typing
    _, folder = cached_birds
    config = {"model_type": "resnet", "architectures": ["ResNetForImageClassification"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(HubError, match=r"names no 'architecture' of timm; it describes a 'resnet'"):
        find("hf-hub:user/birds")
    (folder / "config.json").write_text("[]")
    with pytest.raises(HubError, match=r"names no 'architecture' of timm"):
        find("hf-hub:user/birds")


def test_a_folder_whose_configuration_changes_is_looked_at_again(tmp_path):
    network = timm.create_model("test_resnet", num_classes=3)
    save_for_hf(network, tmp_path, safe_serialization=True)
    name = f"local-dir:{tmp_path}"
    [first] = build_experts([name], 5, pretrained=False, input_size=32)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architecture": "levit_128s"}))
    with pytest.raises(HubError, match="takes, for example, 224"):  # not the first network's sizes
        build_experts([f"{name}?size=32"], 5, pretrained=False)
    assert type(first.module).__name__ == "ResNet"


def test_an_old_name_in_a_configuration(tmp_path):
    config = {"architecture": "tf_efficientnet_b0_ns", "num_classes": 3, "input_size": [3, 64, 64]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.warns(match="renamed"):
        [expert] = build_experts([f"local-dir:{tmp_path}"], 5, pretrained=False, input_size=64)
    assert expert.body.get_classifier().out_features == 5


ODD_FOLDERS = ["my models", "a,b", "a=b&c", "what#1", "50%", "Gefäße", "a?b=c"]


@pytest.mark.parametrize("folder", ODD_FOLDERS)
def test_any_path(folder, tmp_path):
    torch.manual_seed(2)
    state = timm.create_model("test_resnet", num_classes=37).state_dict()
    path = tmp_path / folder / "w.safetensors"
    path.parent.mkdir()
    save_file(state, path)
    for text in (path, str(path).replace("/w", "//w")):
        [expert] = build_experts([f"file/{text}?arch=test_resnet"], 5, input_size=32)
        assert torch.equal(expert.body.state_dict()["conv1.0.weight"], state["conv1.0.weight"])
    with pytest.raises(HubError, match="does not say whose weights it holds"):
        find(f"file/{path}")
    save_for_hf(timm.create_model("test_resnet"), path.parent, safe_serialization=True)
    assert find(f"local-dir:{path.parent}?size=32").native_size == 160


def test_a_path_as_an_address_from_home_and_in_another_unicode_form(tmp_path, monkeypatch):
    composed, decomposed = (unicodedata.normalize(f, "Gefäße") for f in ("NFC", "NFD"))
    (tmp_path / decomposed).write_bytes(b"x")
    assert local_path(str(tmp_path / composed)).read_bytes() == b"x"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "a b.pth").write_bytes(b"x")
    for name in ("file/~/a b.pth", f"file://{tmp_path.as_posix()}/a%20b.pth"):
        weights = find(f"{name}?arch=test_resnet").weights
        assert weights.cached() == tmp_path / "a b.pth"
    assert find(r"file/C:\models\w.pth?arch=test_resnet").name.startswith(r"file/C:\models\w.pth?")
    assert find("file:///C:/w.pth?arch=test_resnet").name.startswith("file/C:/w.pth?arch=")


def test_no_warning_for_a_present_name():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert find(PRESENT).name == PRESENT
