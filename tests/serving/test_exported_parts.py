"""A package in parts: it says what its model says, runs alone, and tells a broken folder apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from support.serving import SIZE, ByColour, M, small_expert, small_hub
from torch import nn

import hubpath_fast as hp
from hubpath_fast import serve
from hubpath_fast.model import RoutingPolicy
from hubpath_fast.serve import Parts, PartsError
from hubpath_fast.serving import ExportError, export, export_parts, proof, run_package
from hubpath_fast.written import described

# Of probabilities in float32: folded weights and another order of sums.
CLOSE = {"rtol": 0, "atol": 1e-5}
RUN = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from serve import Parts
torch.save(Parts(sys.argv[1])(torch.load(sys.argv[2]), routing=True), sys.argv[3])
assert "hubpath_fast" not in sys.modules and "timm" not in sys.modules
"""


def ask_here(room):
    """Packages are asked in this process: a fresh one takes seconds to import torch."""
    run_package.ask(room, json.loads((room / "job.json").read_text()))


@pytest.fixture(autouse=True)
def asked_here(monkeypatch):
    monkeypatch.setattr(proof, "run_isolated", ask_here)


def draw_images(n, size=SIZE):
    random = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, 3, size, size), generator=random, dtype=torch.uint8)


def used(model):
    """With BatchNorm statistics as of a trained model."""
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
    return model.eval()


@torch.no_grad()
def assert_says_as(parts, model, n):
    x = draw_images(n)
    answer, experts, weights = parts(x, routing=True)
    routing = model.route(x)
    assert torch.equal(experts, routing.experts)
    torch.testing.assert_close(weights, routing.weights, **CLOSE)
    torch.testing.assert_close(answer, model(x).softmax(1), **CLOSE)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "parts"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(proof, "run_isolated", ask_here)
        export_parts(used(small_hub()), folder, input_size=SIZE)
    return folder


@pytest.fixture
def folder(exported, tmp_path):
    return Path(shutil.copytree(exported, tmp_path / "parts"))


def test_it_is_known_for_a_package(exported):
    assert described(exported).startswith(f"{exported} is a package, of `hubpath export`; use ")


def test_it_says_what_the_model_says_at_any_batch(tmp_path):
    model = used(small_hub())
    package = export(model, tmp_path / "parts", "parts", input_size=SIZE)
    assert package.form == "parts"
    assert package.about["forwards"] == {"1": 2, "64": 128}
    assert 0 < package.largest_difference < 1e-5
    assert min(package.about["proof"]["images_of_expert"].values()) > 0
    assert sum(isinstance(m, nn.BatchNorm2d) for m in model.modules()) == M  # as it was
    parts = Parts(tmp_path / "parts")
    assert parts.about == package.about
    for n in (1, 2, 5):
        assert_says_as(parts, model, n)


def test_only_experts_that_are_wanted_run_and_on_their_own_images(folder):
    parts, x = Parts(folder), draw_images(9)
    seen = {}
    ask = parts._ask
    parts._ask = lambda index, rows: (seen.update({index: rows}), ask(index, rows))[1]
    _, experts, _ = parts(x, routing=True)
    for index in range(M):
        own = x[(experts == index).any(1)]
        assert torch.equal(seen[index], own) if len(own) else index not in seen
    seen.clear()
    _, experts, _ = parts(x[:1], routing=True)
    assert sorted(seen) == sorted(experts[0].tolist())


def test_the_folder_runs_with_torch_alone(folder, tmp_path):
    torch.save(x := draw_images(3), tmp_path / "x.pt")
    files = [str(folder), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", RUN, *files], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for one, two in zip(torch.load(tmp_path / "y.pt"), Parts(folder)(x, routing=True), strict=True):
        assert torch.equal(one, two)


def test_fixed_routes_have_no_package_of_experts_that_nobody_asks(tmp_path):
    model = used(small_hub(k=1, generator=hp.FixedRoutes([2, 0], [0.7, 0.3], M)))
    hook = lambda *_: pytest.fail("an expert that is no part of the package")  # noqa: E731
    model.experts[1].register_forward_pre_hook(hook)
    package = export_parts(model, tmp_path / "parts", input_size=SIZE)
    assert package.about["forwards"] == {"1": 2, "64": 128}  # as many as the routes name
    parts = Parts(tmp_path / "parts")
    assert [entry is None for entry in parts.about["experts"]] == [False, True, False]
    assert len(list((tmp_path / "parts" / "experts").iterdir())) == 2
    assert_says_as(parts, model, 4)


def test_a_policy_that_leaves_experts_out_is_followed(tmp_path):
    model = used(small_hub())
    model.policy = RoutingPolicy(top_mass=0.4)
    export_parts(model, tmp_path / "parts", input_size=SIZE)
    parts, x = Parts(tmp_path / "parts"), draw_images(16)
    with torch.no_grad():
        answer, _, weights = parts(x, routing=True)
        torch.testing.assert_close(answer, model(x).softmax(1), **CLOSE)
    assert 0 < int((weights == 0).sum()) < 16
    asked = []
    ask = parts._ask
    parts._ask = lambda index, rows: (asked.append(len(rows)), ask(index, rows))[1]
    parts(x)
    assert sum(asked) == int((weights > 0).sum())


def test_an_expert_that_tells_one_image_from_several(tmp_path):
    """ConvNeXt's code does: its program has to be right for one, too."""
    experts = [timm.create_model("test_convnext", num_classes=4) for _ in range(2)]
    model = used(small_hub(k=1, experts=experts))
    export_parts(model, tmp_path / "parts", input_size=SIZE)
    for n in (1, 3):
        assert_says_as(Parts(tmp_path / "parts"), model, n)


def test_outputs_that_are_maps_come_as_they_are(tmp_path):
    def expert():
        return nn.Sequential(nn.Conv2d(3, 4, 3, stride=8), nn.BatchNorm2d(4))

    model = used(small_hub(experts=[expert() for _ in range(M)]))
    package = export_parts(model, tmp_path / "parts", input_size=SIZE)
    assert package.about["outputs"][0] == "outputs"
    x = draw_images(3)
    with torch.no_grad():
        torch.testing.assert_close(Parts(tmp_path / "parts")(x), model(x), **CLOSE)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_frozen_model_can_be_one_file_too(tmp_path, dtype):
    model, x = used(small_hub()), draw_images(8)
    model.freeze_for_inference(dtype, example=x)
    package = export(model, tmp_path / "hub.pt2", form="sparse", input_size=SIZE)
    assert package.about["config"]["model"]["k"] == 2
    assert "frozen" not in package.about["config"]["model"]  # of training
    near = CLOSE if dtype is None else {"rtol": 0, "atol": 1e-2}
    with torch.no_grad():
        answer = torch.export.load(package.path).module()(x)
        torch.testing.assert_close(answer, model(x).softmax(1), **near)


def test_a_frozen_model_can_be_parts(tmp_path):
    model, x = used(small_hub()), draw_images(8)
    model.freeze_for_inference(example=x)
    export_parts(model, tmp_path / "parts", input_size=SIZE)
    assert_says_as(Parts(tmp_path / "parts"), model, 8)


def test_experts_in_bfloat16_within_its_roundings(tmp_path):
    model = used(small_hub())
    x = draw_images(8)
    model.freeze_for_inference(torch.bfloat16, torch.channels_last, example=x)
    package = export_parts(model, tmp_path / "parts", input_size=SIZE)
    assert package.about["proof"]["tolerance"] == 8 * torch.finfo(torch.bfloat16).eps
    with torch.no_grad():
        torch.testing.assert_close(
            Parts(tmp_path / "parts")(x), model(x).softmax(1), rtol=0, atol=1e-2
        )


def test_one_expert_alone_says_what_it_says(folder):
    model, x = used(small_hub()), draw_images(2)
    with torch.no_grad():
        torch.testing.assert_close(Parts(folder).ask(1, x), model.ask_all(x)[:, 1], **CLOSE)


def test_one_expert_alone_checks_what_it_is_asked(folder):
    parts = Parts(folder)
    with pytest.raises(PartsError, match="expected uint8"):
        parts.ask(1, torch.zeros(2, 3, SIZE, SIZE))
    for index in (-1, M, "1"):
        with pytest.raises(PartsError, match=r"index: expected .* \[0, 1, 2\], got"):
            parts.ask(index, draw_images(1))


@pytest.mark.parametrize(
    ("images", "got"),
    [
        (torch.zeros(2, 3, SIZE, SIZE), "float32 [2, 3, 32, 32]"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "uint8 [2, 3, 16, 16]"),
        (torch.zeros(3, SIZE, SIZE, dtype=torch.uint8), "uint8 [3, 32, 32]"),
        (torch.zeros(0, 3, SIZE, SIZE, dtype=torch.uint8), "uint8 [0, 3, 32, 32]"),
        ([1], "got list"),
    ],
    ids=["floats", "size", "one", "none", "list"],
)
def test_other_images_are_refused(folder, images, got):
    with pytest.raises(PartsError) as raised:
        Parts(folder)(images)
    assert got in str(raised.value)
    assert "expected uint8 [N, 3, 32, 32]" in str(raised.value)


def broken(folder, how):
    second = sorted((folder / "experts").iterdir())[1]
    if how == "missing":
        second.unlink()
    elif how == "has":
        second.write_bytes(second.read_bytes()[:-7])
    elif how == "SHA-256":
        data = bytearray(second.read_bytes())
        data[len(data) // 2] ^= 1
        second.write_bytes(data)
    return second.name


@pytest.mark.parametrize("how", ["missing", "has", "SHA-256"])
def test_a_part_that_is_not_what_was_exported_is_named(folder, how):
    name = broken(folder, how)
    with pytest.raises(PartsError) as raised:
        Parts(folder)
    assert name in str(raised.value)
    assert how in str(raised.value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"versions": {"torch": "99.0.1"}}, "made by torch 99.0.1, here is torch"),
        ({"parts": 2}, "version 2, this file reads up to 1"),
        ({"versions": None}, "expected a folder that `hubpath export --format parts` wrote"),
        ({"versions": {"torch": "2"}}, "expected a folder that `hubpath export"),
        ({"parts": "1"}, "expected a folder that `hubpath export"),
        ({"device": None}, "expected a folder that `hubpath export"),
        ({"router": None}, "expected a folder that `hubpath export"),
        ({"router": {"file": "router.pt2"}}, "expected a folder that `hubpath export"),
        ({"experts": 3}, "expected a folder that `hubpath export"),
        ({"experts": ["a.pt2"]}, "expected a folder that `hubpath export"),
        ({"input": ["uint8", ["N"]]}, "expected a folder that `hubpath export"),
    ],
)
def test_an_index_that_cannot_be_followed(folder, change, why):
    index = folder / serve.INDEX
    index.write_text(json.dumps(json.loads(index.read_text()) | change))
    with pytest.raises(PartsError, match=why):
        Parts(folder)


def test_an_index_that_lacks_something(folder):
    index = folder / serve.INDEX
    about = json.loads(index.read_text())
    for key in ("parts", "device", "input", "router", "experts", "aggregator", "versions"):
        index.write_text(json.dumps({k: v for k, v in about.items() if k != key}))
        with pytest.raises(PartsError, match=f"cannot be read .*{key}"):
            Parts(folder)
    index.write_text("[]")
    with pytest.raises(PartsError, match="cannot be read"):
        Parts(folder)


def test_a_device_that_is_not_here_is_named(folder):
    for device in ("foo", "cuda:99"):
        with pytest.raises(PartsError, match=f"device: expected one .* got {device}"):
            Parts(folder, device)


def test_parts_are_moved_to_a_device_of_another_index(folder, monkeypatch):
    from torch.export import passes

    moved, move = [], passes.move_to_device_pass
    monkeypatch.setattr(
        passes, "move_to_device_pass", lambda p, to: (moved.append(to), move(p, "cpu"))[1]
    )
    Parts(folder, "cpu")
    assert moved == []
    Parts(folder, "cpu:0")
    assert moved == ["cpu:0"] * (M + 2)


def test_a_folder_of_something_else_is_neither_read_nor_replaced(tmp_path):
    with pytest.raises(PartsError, match="expected a folder that `hubpath export"):
        Parts(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("all of it")
    with pytest.raises(ValueError, match="which holds something else"):
        export_parts(used(small_hub()), tmp_path / "mine", input_size=SIZE)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "all of it"


def test_a_package_is_replaced_as_a_whole(folder):
    export_parts(used(small_hub(k=1)), folder, input_size=SIZE)
    assert Parts(folder).about["forwards"] == {"1": 1, "64": 64}
    assert sorted(path.name for path in folder.parent.iterdir()) == ["parts"]


class Unexportable(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = small_expert()

    def forward(self, x):
        out = self.body(x)
        return out if float(out.sum()) > 1e9 else out * 1.0


def test_an_expert_that_cannot_be_exported_is_named_and_nothing_is_left(folder):
    before = (folder / serve.INDEX).read_bytes()
    model = used(small_hub(experts=[small_expert(), Unexportable(), small_expert()]))
    with pytest.raises(ExportError, match=r"expert 1 \(Unexportable\) cannot be exported"):
        export_parts(model, folder, input_size=SIZE)
    assert (folder / serve.INDEX).read_bytes() == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["parts"]


def test_a_part_that_says_something_else_is_refused_by_its_expert(tmp_path, monkeypatch):
    text, call = Path(serve.__file__).read_text(), "own = self._ask(index"
    assert call in text
    wrong = text.replace(call, "own = (1 + (index == 2)) * self._ask(index")
    (tmp_path / "serve.py").write_text(wrong)
    monkeypatch.setattr(serve, "__file__", str(tmp_path / "serve.py"))
    with pytest.raises(ExportError, match=r"expert 2 \(Sequential #3\): the package differs"):
        export_parts(used(small_hub()), tmp_path / "parts", input_size=SIZE)
    assert not (tmp_path / "parts").exists()


@pytest.mark.parametrize(
    "options", [{"batch": 4}, {"format": "onnx", "form": "parts"}, {"form": "cond"}]
)
def test_what_parts_cannot_be_is_an_error(tmp_path, options):
    with pytest.raises(ValueError, match="form: "):
        export(
            used(small_hub()), tmp_path / "p", **{"format": "parts", "input_size": SIZE} | options
        )


def test_a_router_that_looks_at_an_expert(tmp_path):
    names = ["timm/test_resnet", "timm/test_efficientnet"]
    model = hp.create_model(names, 4, k=1, pretrained=False, input_size=64, router="expert:0")
    export_parts(used(model), tmp_path / "parts")
    parts, x = Parts(tmp_path / "parts"), draw_images(3, 64)
    with torch.no_grad():
        torch.testing.assert_close(parts(x), model(x).softmax(1), **CLOSE)


def test_an_expert_that_no_image_reaches_is_proved_by_its_score(tmp_path):
    generator = ByColour()
    with torch.no_grad():
        generator.clean.bias[1] = -100
    package = export_parts(used(small_hub(generator=generator)), tmp_path / "p", input_size=SIZE)
    assert package.about["proof"]["reached_by_score"] == ["Sequential #2"]
