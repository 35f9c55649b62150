"""Packages of ONNX and of AOTInductor, the command, and a policy inside a package."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from support.serving import SIZE, draw_images, small_hub
from typer.testing import CliRunner

import hubpath_fast as hp
from hubpath_fast.cli import app
from hubpath_fast.model.policy import RoutingPolicy
from hubpath_fast.serving import ExportError, compiled, onnx_file, read_package

COMPILER = next(filter(shutil.which, compiled.COMPILERS), None)


def test_an_onnx_file_routes_and_says_what_it_is(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is in the extra [onnx]")
    pytest.importorskip("onnxscript", reason="onnxscript is in the extra [onnx]")
    model = small_hub()
    with torch.no_grad():
        model.generator.clean.bias[1] = -50.0  # reached by its score, an initializer of the file
    path = tmp_path / "hub.onnx"
    package = hp.export(model, path, "onnx", routing=True, input_size=SIZE)
    assert package.form == "sparse"
    assert package.about["proof"]["reached_by_score"] == [model.origin.labels[1]]
    assert package.largest_difference < 1e-5
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    held = session.get_modelmeta().custom_metadata_map["hubpath"]
    assert json.loads(held) == package.about == read_package(path)
    x = draw_images(5)
    answer, experts, _ = session.run(None, {"images": x.numpy()})
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(answer), model(x).softmax(1), rtol=0, atol=1e-5)
        assert torch.equal(torch.tensor(experts), model.route(x).experts)
    with pytest.raises(Exception, match="invalid dimensions"):
        session.run(None, {"images": x[:, :, 1:].numpy()})
    assert [file.name for file in tmp_path.iterdir()] == ["hub.onnx"]


def test_onnx_that_is_not_there_or_too_old(tmp_path, monkeypatch):
    pytest.importorskip("onnx", reason="onnx is in the extra [onnx]")
    with pytest.raises(ValueError, match=r"opset: expected an integer in 18\.\.\d+ .*, got 11"):
        hp.export(small_hub(), tmp_path / "a.onnx", "onnx", input_size=SIZE, opset=11)
    monkeypatch.setattr(onnx_file, "NEEDED", ("onnx", "no_such_module_at_all"))
    with pytest.raises(ExportError, match=r"onnx needs no_such_module_at_all; pip install"):
        hp.export(small_hub(), tmp_path / "a.onnx", "onnx", input_size=SIZE)


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler, which AOTInductor needs")
def test_a_compiled_package_says_what_the_model_says(tmp_path):
    model = small_hub()
    with torch.no_grad():
        model.generator.clean.bias[1] = -50.0  # reached by its score, a constant of the package
    package = hp.export(model, tmp_path / "hub.pt2", "aoti", input_size=SIZE, batch=1)
    assert package.form == "cond"
    assert package.about["proof"]["batches"] == [1]
    assert package.about["proof"]["reached_by_score"] == [model.origin.labels[1]]
    assert read_package(package.path)["format"] == "aoti"
    answer = torch._inductor.aoti_load_package(str(package.path))(draw_images(1))
    with torch.no_grad():
        wanted = model.eval()(draw_images(1)).softmax(1)
    torch.testing.assert_close(answer, wanted, rtol=0, atol=1e-5)


def test_without_a_compiler_nothing_is_compiled(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ExportError, match=r"there is no no-such-compiler on this machine"):
        hp.export(small_hub(), tmp_path / "hub.pt2", "aoti", input_size=SIZE)


@pytest.mark.usefixtures("asked_here")
@pytest.mark.parametrize("policy", [{"top_mass": 0.6}, {"penalty": (0.0, 0.0, 3.0), "k": 1}])
def test_a_package_keeps_the_models_policy(tmp_path, policy):
    model = small_hub(k=2)
    model.policy = RoutingPolicy(**policy)
    path = tmp_path / "hub.pt2"
    package = hp.export(model, path, form="sparse", routing=True, input_size=SIZE)
    x = draw_images(9)
    answer, experts, weights = torch.export.load(path).module()(x)
    model.eval()
    with torch.no_grad():
        routing = model.route(x)
        torch.testing.assert_close(answer, model(x).softmax(1), rtol=0, atol=1e-6)
    assert torch.equal(experts, routing.experts)
    torch.testing.assert_close(weights, routing.weights, rtol=0, atol=1e-6)
    assert package.about["forwards"]["1"] == (2 if "k" not in policy else 1) + 3


@pytest.mark.usefixtures("asked_here")
def test_the_command_exports_a_saved_hub(tmp_path):
    torch.manual_seed(0)
    names = ["test_resnet", "test_efficientnet", "test_byobnet"]
    hub = hp.create_model(names, 3, pretrained=False, input_size=64)
    hub.save_pretrained(tmp_path / "hub", classes=["ant", "bee", "cat"])
    done = CliRunner().invoke(app, ["export", str(tmp_path / "hub"), "--routing"])
    assert done.exit_code == 0, done.output
    said = " ".join(done.output.split())
    assert "export.pt2: pt2, sparse; forwards of experts: 5 for a batch of 1, 131 for" in said
    about = read_package(tmp_path / "hub" / "export.pt2")
    assert about["classes"] == ["ant", "bee", "cat"]
    assert about["outputs"] == ["probabilities", "experts", "weights"]
    wrong = CliRunner().invoke(app, ["export", str(tmp_path / "hub"), "--format", "gguf"])
    assert wrong.exit_code == 2
    assert "format: expected one of pt2, aoti, onnx, parts, got 'gguf'" in wrong.output
