"""Packages: exported, asked by a process without this package, and refused where they are wrong."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from support.serving import SIZE, draw_images, small_expert, small_hub
from torch import nn

import hubpath_fast as hp
from hubpath_fast.serving import ExportError, errors, export, proof, read_package, run_package
from hubpath_fast.serving.forms import FORMS, Sparse

CHECK = """
import sys, torch
program = torch.export.load(sys.argv[1], extra_files=(extra := {"hubpath.json": ""})).module()
images = torch.load(sys.argv[2])
torch.save(program(images), sys.argv[3])
assert "hubpath_fast" not in sys.modules and "timm" not in sys.modules
print(extra["hubpath.json"])
"""


def test_a_sparse_package_runs_with_torch_alone_and_says_what_it_is(tmp_path):
    model = small_hub()
    package = export(model, tmp_path / "hub.pt2", input_size=SIZE, routing=True)
    assert model.training  # as it was
    assert all(parameter.requires_grad for parameter in model.parameters())
    x = draw_images(5)
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("hub.pt2", "x.pt", "y.pt")]
    command = [sys.executable, "-I", "-c", CHECK, *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    about = json.loads(done.stdout)
    assert about == package.about == read_package(tmp_path / "hub.pt2")
    answer, experts, weights = torch.load(tmp_path / "y.pt")
    model.eval()
    with torch.no_grad():
        routing = model.route(x)
        # float32: sums of tens of products in another order, of numbers near 1
        torch.testing.assert_close(answer, model(x).softmax(dim=1), rtol=0, atol=1e-6)
    assert torch.equal(experts, routing.experts)
    torch.testing.assert_close(weights, routing.weights, rtol=0, atol=1e-6)
    assert not answer.requires_grad
    assert about["form"] == "sparse"
    assert about["forwards"] == {"1": 2 + 3, "64": 2 * 64 + 3}
    assert about["outputs"] == ["probabilities", "experts", "weights"]
    assert about["input"] == ["uint8", ["N", 3, SIZE, SIZE]]
    assert about["proof"]["batches"] == [1, 2, 7, 64]
    assert about["proof"]["images"] == 64
    assert min(about["proof"]["images_of_expert"].values()) > 0
    assert about["proof"]["reached_by_score"] == []
    assert 0 <= package.largest_difference < 1e-6
    assert about["versions"]["torch"] == torch.__version__


@pytest.mark.usefixtures("asked_here")
def test_a_package_of_one_image_takes_cond_and_refuses_other_batches(tmp_path):
    package = export(small_hub(), tmp_path / "hub.pt2", input_size=SIZE, batch=1)
    assert package.form == "cond"
    assert package.about["forwards"] == {"1": 2}
    program = torch.export.load(package.path).module()
    assert program(draw_images(1)).shape == (1, 4)
    with pytest.raises(Exception, match="Guard failed"):
        program(draw_images(2))


@pytest.mark.usefixtures("asked_here")
def test_images_of_another_size_or_type_are_refused_by_the_package_itself(tmp_path):
    package = export(small_hub(), tmp_path / "hub.pt2", form="dense", input_size=SIZE)
    program = torch.export.load(package.path).module()
    with pytest.raises(Exception, match=rf"Guard failed: images.size\(\)\[2\] == {SIZE}"):
        program(torch.zeros(2, 3, SIZE + 1, SIZE, dtype=torch.uint8))
    with pytest.raises(Exception, match="dtype mismatch"):
        program(torch.zeros(2, 3, SIZE, SIZE))


@pytest.mark.usefixtures("asked_here")
def test_an_expert_that_no_image_reaches_is_reached_by_its_score(tmp_path):
    model = small_hub()
    with torch.no_grad():
        model.generator.clean.bias[1] = -50.0
    package = export(model, tmp_path / "hub.pt2", form="dense", input_size=SIZE)
    label = model.origin.labels[1]
    assert package.about["proof"]["reached_by_score"] == [label]
    assert package.about["proof"]["images_of_expert"][label] == 0


@pytest.mark.parametrize("penalty", [0.0, 40.0])
@pytest.mark.usefixtures("asked_here")
def test_an_expert_that_a_penalty_keeps_away_is_asked_all_the_same(tmp_path, monkeypatch, penalty):
    model = small_hub()
    with torch.no_grad():
        model.generator.clean.bias[1] = -10.0
    model.policy = hp.RoutingPolicy(penalty=(0.0, penalty, 0.0))
    package = export(model, tmp_path / "right.pt2", form="sparse", input_size=SIZE)
    assert package.about["proof"]["reached_by_score"] == [model.origin.labels[1]]
    monkeypatch.setitem(FORMS, "sparse", Baked)
    with pytest.raises(ExportError, match=r"expert 1 \(.*\): the package differs"):
        export(model, tmp_path / "wrong.pt2", form="sparse", input_size=SIZE)


@pytest.mark.usefixtures("asked_here")
def test_an_expert_that_is_asked_with_small_weights_alone_is_reached_by_its_score(
    tmp_path, monkeypatch
):
    """Always one of two, with a weight of 1e-5: leaving it out would be within the tolerance."""
    model = small_hub(experts=[small_expert(4), small_expert(5)])
    with torch.no_grad():
        model.generator.clean.weight.zero_()
        model.generator.clean.bias.copy_(torch.tensor([0.0, -11.5]))
    package = export(model, tmp_path / "right.pt2", form="sparse", input_size=SIZE)
    assert package.about["proof"]["reached_by_score"] == [model.origin.labels[1]]
    assert package.about["proof"]["images_of_expert"][model.origin.labels[1]] == 64
    monkeypatch.setitem(FORMS, "sparse", Baked)
    with pytest.raises(ExportError, match=r"expert 1 \(.*\): the package differs"):
        export(model, tmp_path / "wrong.pt2", form="sparse", input_size=SIZE)


def test_an_expert_that_its_score_does_not_reach_is_no_proof():
    expected = proof.Expected(np.zeros((2, 4)), np.array([[1], [0]]), np.ones((2, 1)))
    with pytest.raises(ExportError, match=r"expert 1 \(.*\): no image asks it with a weight"):
        proof.check_reached(small_hub(), proof.Ask(0, 2, 1, 1, (0.0, 9.0, 0.0)), expected)


class Baked(Sparse):
    """As a traced program: what the example did not ask is no part of it."""

    def ask(self, index, images, asked, weight):
        return None if index == 1 else super().ask(index, images, asked, weight)


class Perturbed(Sparse):
    """One expert's outputs are a little too large."""

    def ask(self, index, images, asked, weight):
        return super().ask(index, images, asked, weight) * (1.02 if index == 2 else 1.0)


@pytest.mark.parametrize(("wrong", "index"), [(Baked, 1), (Perturbed, 2)])
@pytest.mark.parametrize("reach", ["by image", "by score"])
@pytest.mark.usefixtures("asked_here")
def test_a_wrong_package_is_refused_with_the_experts_name(
    tmp_path, monkeypatch, wrong, index, reach
):
    model = small_hub()
    if reach == "by score":
        with torch.no_grad():
            model.generator.clean.bias[index] = -50.0
    monkeypatch.setitem(FORMS, "sparse", wrong)
    with pytest.raises(ExportError, match=rf"expert {index} \(.*\).* at batch 1,"):
        export(model, tmp_path / "hub.pt2", form="sparse", input_size=SIZE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("asked_here")
def test_a_package_that_is_wrong_at_one_batch_size_alone_is_refused_with_it(tmp_path, monkeypatch):
    asked = proof.ask_package

    def broken(*args):
        asks, answers = args[4], asked(*args)
        for ask, outputs in zip(asks, answers, strict=True):
            if ask.batch == 7:
                outputs[0][3] += 2e-4
        return answers

    monkeypatch.setattr(proof, "ask_package", broken)
    with pytest.raises(ExportError, match=r"differs from the model by 0\.0002 at batch 7, on 1 of"):
        export(small_hub(), tmp_path / "hub.pt2", form="dense", input_size=SIZE)


class ReadsTheHost(nn.Module):
    """Cannot be exported: which branch it takes depends on the values."""

    def __init__(self):
        super().__init__()
        self.body = small_expert()

    def forward(self, x):
        return self.body(x) if x.sum().item() > 0 else self.body(-x)


def test_an_expert_that_cannot_be_exported_is_named_with_torchs_reason(tmp_path):
    model = small_hub(experts=[small_expert(), small_expert(), ReadsTheHost()])
    with pytest.raises(ExportError) as caught:
        export(model, tmp_path / "hub.pt2", input_size=SIZE)
    text = str(caught.value)
    for form in FORMS:
        assert f"{form}: expert 2 (ReadsTheHost) cannot be exported (" in text
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == []


class RefusesImages(nn.Module):
    def forward(self, x):
        raise RuntimeError("too small\nand advice")


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("options", [{}, {"form": "cond"}, {"format": "parts"}])
def test_an_expert_that_fails_is_named_in_every_form(tmp_path, index, options):
    """Whether an image asks it or not, and not by what exporting it happened to do first."""
    experts = [RefusesImages() if i == index else small_expert() for i in range(3)]
    model = small_hub(experts=experts, num_outputs=4)
    with torch.no_grad():
        model.generator.clean.bias[1] = -50.0
    path = tmp_path / ("parts" if "format" in options else "hub.pt2")
    with pytest.raises(ExportError) as caught:
        export(model, path, input_size=SIZE, **options)
    assert str(caught.value) == (
        f"expert {index} (RefusesImages) cannot be exported (on images [3, 3, {SIZE}, {SIZE}]: "
        "RuntimeError: too small)"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_router_that_fails_is_named(tmp_path):
    with pytest.raises(ExportError, match=r"^the router cannot be exported \(on images .*small\)$"):
        export(small_hub(generator=RefusesImages()), tmp_path / "hub.pt2", input_size=SIZE)


def test_an_error_that_goes_on_after_a_colon_says_what_comes_then():
    said = errors.first_line(RuntimeError("Got graph break:\n\n  raised ValueError\nand advice"))
    assert said == "RuntimeError: Got graph break: raised ValueError"
    assert errors.first_line(RuntimeError("Got graph break:")) == "RuntimeError: Got graph break:"


class AsksForOne(nn.Module):
    """Takes another way for an image alone, as some networks' layouts do."""

    def __init__(self):
        super().__init__()
        self.body = small_expert()

    def forward(self, x):
        return self.body(x if x.shape[0] > 1 else x * 1.0)


@pytest.mark.usefixtures("asked_here")
def test_an_expert_that_asks_whether_it_has_one_image_gets_two_spare_ones(tmp_path):
    model = small_hub(experts=[small_expert(), AsksForOne(), small_expert()])
    package = export(model, tmp_path / "hub.pt2", input_size=SIZE)
    assert package.form == "sparse"
    assert package.about["forwards"]["1"] == 2 + 1 + 2 + 1


@pytest.mark.usefixtures("asked_here")
def test_the_next_form_is_tried_and_the_package_says_why(tmp_path, monkeypatch):
    class Refusing(Sparse):
        def ask(self, index, images, asked, weight):
            if index == 1:
                raise RuntimeError("no such form\nand advice")
            return super().ask(index, images, asked, weight)

    monkeypatch.setitem(FORMS, "sparse", Refusing)
    model = small_hub()
    package = export(model, tmp_path / "hub.pt2", input_size=SIZE)
    assert package.form == "cond"
    reason = f"expert 1 ({model.origin.labels[1]}) cannot be exported (RuntimeError: no such form)"
    assert package.about["tried"] == [{"form": "sparse", "reason": reason}]


def tf32() -> tuple[bool, bool]:
    return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32


@pytest.mark.usefixtures("asked_here")
def test_the_model_is_asked_without_tf32_and_flags_are_as_before(tmp_path, monkeypatch):
    """It rounds by more than a package may differ by."""
    ask, seen = proof.ask_model, set()
    monkeypatch.setattr(proof, "ask_model", lambda *args: seen.add(tf32()) or ask(*args))
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert tf32() == (True, True)
        export(small_hub(), tmp_path / "hub.pt2", form="dense", input_size=SIZE)
        assert tf32() == (True, True)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    assert seen == {(False, False)}


def test_a_package_is_asked_without_tf32(tmp_path, monkeypatch):
    flags = (
        "import torch\ncudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul\n"
        "sys.exit(f'tf32 {cudnn.allow_tf32} {matmul.allow_tf32}')"
    )
    text = Path(run_package.__file__).read_text()
    ask = "    images = np.load("
    assert text.count(ask) == 1
    (tmp_path / "ask.py").write_text(text.replace(ask, textwrap.indent(flags, "    ") + f"\n{ask}"))
    monkeypatch.setattr(run_package, "__file__", str(tmp_path / "ask.py"))
    with pytest.raises(ExportError, match=r": tf32 False False$"):
        export(small_hub(), tmp_path / "hub.pt2", form="dense", input_size=SIZE)


def test_a_package_that_needs_more_than_torch_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(run_package, "__file__", str(tmp_path / "ask.py"))
    (tmp_path / "ask.py").write_text("raise ImportError('timm: a package must run without it')")
    with pytest.raises(ExportError, match="does not run in a process without hubpath_fast"):
        export(small_hub(), tmp_path / "out" / "hub.pt2", form="dense", input_size=SIZE)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_package_of_a_newer_torch_or_of_another_origin_is_refused(tmp_path):
    def write(**changes):
        about = {"hubpath_package": 1, "format": "pt2", "versions": {"torch": "2.8.0"}, **changes}
        with zipfile.ZipFile(tmp_path / "p.pt2", "w") as archive:
            archive.writestr("p/extra/hubpath.json", json.dumps(about))
        return tmp_path / "p.pt2"

    assert read_package(write())["format"] == "pt2"
    with pytest.raises(ValueError, match=r"made by torch 9\.1\.0, here is torch"):
        read_package(write(versions={"torch": "9.1.0"}))
    with pytest.raises(ValueError, match="update hubpath_fast"):
        read_package(write(hubpath_package=2))
    (tmp_path / "q.pt2").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"expected a package of `hubpath export`"):
        read_package(tmp_path / "q.pt2")
    with pytest.raises(ValueError, match="found no file"):
        read_package(tmp_path / "absent.pt2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"format": "tflite"}, "format: expected one of pt2, aoti, onnx, parts, got 'tflite'"),
        ({"form": "loop"}, "form: expected one of sparse, cond, dense, parts, got 'loop'"),
        ({"batch": 0}, "batch: expected an integer of at least 1, or None, got 0"),
        ({"path": "hub.onnx"}, r"path: a package of format pt2 ends with \.pt2, got .*hub\.onnx"),
        ({"opset": 18}, "opset: it is for the format onnx, got it with pt2"),
        ({"input_size": None}, "input_size: the model was made of modules"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    arguments = {"path": "hub.pt2", "input_size": SIZE, **arguments}
    path = tmp_path / arguments.pop("path")
    with pytest.raises(ValueError, match=message):
        export(small_hub(), path, **arguments)


def test_a_folder_in_the_place_of_the_file_is_refused_before_any_work(tmp_path):
    (tmp_path / "hub.pt2").mkdir()
    with pytest.raises(ValueError, match="path: expected a file to write the package"):
        export(small_hub(), tmp_path / "hub.pt2", input_size=SIZE)


def test_a_model_without_normalisation_is_refused(tmp_path):
    model = small_hub(normalization=None)
    with pytest.raises(ValueError, match="has no normalization"):
        export(model, tmp_path / "hub.pt2", input_size=SIZE)


def test_outputs_that_are_not_finite_are_the_models_fault(tmp_path):
    model = small_hub()
    with torch.no_grad():
        model.experts[0][-1].bias[0] = float("nan")
    with pytest.raises(ExportError, match="its own outputs are not all finite"):
        export(model, tmp_path / "hub.pt2", form="dense", input_size=SIZE)


class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x):
        return self.body(x)


@pytest.mark.usefixtures("asked_here")
def test_maps_come_out_as_the_model_predicts_them(tmp_path):
    model = small_hub(experts=[Maps() for _ in range(3)], num_outputs=2)
    package = export(model, tmp_path / "hub.pt2", input_size=SIZE)
    assert package.about["outputs"] == ["outputs"]
    x = draw_images(3)
    program = torch.export.load(package.path).module()
    torch.testing.assert_close(program(x), model.eval()(x), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("asked_here")
def test_a_router_that_looks_at_an_expert(tmp_path):
    torch.manual_seed(0)
    model = hp.create_model(
        ["test_resnet", "test_efficientnet"],
        5,
        k=1,
        pretrained=False,
        input_size=64,
        router="expert:0",
    )
    nn.init.normal_(model.generator.clean.weight)
    package = export(model, tmp_path / "hub.pt2")
    assert package.form == "sparse"
    assert package.about["forwards"]["1"] == 1 + 2
