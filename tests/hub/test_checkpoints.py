"""Files of weights as tools write them: prefixes, nestings, parts; and files of other kinds.

The network is timm's test_resnet, fine-tuned on 37 classes; its body must arrive to the bit.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import pathlib
import pickle
import tarfile
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from hubpath_fast.hub import HubError, build_experts, read_state_dict
from hubpath_fast.hub.checkpoint import StandIn

ARCH = "arch=timm/test_resnet"


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(2)
    return timm.create_model("test_resnet", num_classes=37).state_dict()


def load(path, options=ARCH):
    return build_experts([f"file/{path}?{options}"], 5, input_size=32)[0].body.state_dict()


def check(path, state, options=ARCH):
    for name, tensor in load(path, options).items():
        if not name.startswith("fc."):
            assert torch.equal(tensor, state[name]), name


def other(state):
    return {name: tensor + 1 for name, tensor in state.items()}


def behind(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


WRAPPER = "_orig_mod."
PREFIXES = ["module.", "module._orig_mod.", "model.", "net.", "model._orig_mod.", "backbone.",
            "encoder.", "student.", "teacher.", "1.", "timm_model.", WRAPPER, WRAPPER + "module.",
            "_fsdp_wrapped_module.module.", "model.module.backbone.model."]  # fmt: skip


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside others"])
def test_a_prefix_is_found(prefix, beside, state, tmp_path):
    content = behind(prefix, state)
    if (
        beside and prefix != WRAPPER
    ):  # of Lightning's loss and metrics, mmlab's head, AveragedModel's counter
        content |= {"n_averaged": torch.tensor(3), "head.fc.weight": torch.zeros(4, 4),
                    "criterion.weight": torch.zeros(37)}  # fmt: skip
    torch.save(content, tmp_path / "w.pth")
    check(tmp_path / "w.pth", state)


def test_wrappers_inside_a_network_are_taken_off(state, tmp_path):
    compiled = {n.replace("layer1.", "layer1._orig_mod.", 1): t for n, t in state.items()}
    saved = {n.replace("layer2.0.", "layer2.0._checkpoint_wrapped_module."): t
             for n, t in compiled.items()}  # fmt: skip
    assert len(saved.keys() - state.keys()) > 10
    save_file(saved, tmp_path / "w.safetensors")
    check(tmp_path / "w.safetensors", state)


def test_several_networks_need_a_word(state, tmp_path):
    path = tmp_path / "dino.pth"
    torch.save(behind("student.", state) | behind("teacher.", other(state)), path)
    with pytest.raises(HubError, match=r"prefixes student\., teacher\.; say .*&prefix=student\."):
        load(path)
    check(path, other(state), f"{ARCH}&prefix=teacher.")
    check(path, state, f"{ARCH}&prefix=student")
    with pytest.raises(HubError, match=r"begin with 'techer\.'; they begin with student\., teach"):
        load(path, f"{ARCH}&prefix=techer.")
    # The network's own names are taken before a copy behind a prefix.
    torch.save({**state, **behind("ema.", other(state))}, path)
    with pytest.raises(HubError, match=r"left over: ema\."):
        load(path)


def test_a_missing_tensor_behind_a_prefix_is_named(state, tmp_path):
    content = behind("backbone.", state)
    del content["backbone.layer2.0.conv1.weight"]
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(
        HubError, match=r"\(heads aside\): tensors 1 missing: layer2.0.conv1.weight$"
    ):
        load(tmp_path / "w.pth")


NESTINGS = ["state_dict", "model", "model_state_dict", "net", "weights", "params", "state_dict_ema",
            "model_ema", "anything", "state.model"]  # fmt: skip


@pytest.mark.parametrize("entry", NESTINGS)
def test_a_nesting_is_found_beside_an_optimizer(entry, state, tmp_path):
    network = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(network.parameters())
    network(torch.zeros(1, 2)).sum().backward()
    optimizer.step()
    content = behind("module.", state)
    for part in reversed(entry.split(".")):
        content = {part: content}
    best = torch.tensor(0.5)
    torch.save(
        content | {"optimizer": optimizer.state_dict(), "epoch": 3, "best_acc1": best},
        tmp_path / "w.pth",
    )
    check(tmp_path / "w.pth", state)


@pytest.mark.parametrize(("plain", "average"), [("state_dict", "state_dict_ema"),
                                                 ("model", "model_ema")])  # fmt: skip
def test_an_average_goes_before_the_weights_as_in_timm(plain, average, state, tmp_path):
    path = tmp_path / "w.pth"
    averaged = behind("module.", other(state)) | {"n_averaged": torch.tensor(9)}
    torch.save({plain: state, average: averaged, "epoch": 3}, path)
    check(path, other(state))
    check(path, state, f"{ARCH}&key={plain}")
    timms = timm.models.load_state_dict(path)
    assert torch.equal(timms["conv1.0.weight"], other(state)["conv1.0.weight"])
    with pytest.raises(HubError, match=f"under 'modle'; it has them in: {plain}, {average}"):
        load(path, f"{ARCH}&key=modle")
    torch.save({plain: state, average: None}, path)
    check(path, state)
    # As RT-DETR and YOLO write it.
    torch.save({plain: state, average: {"module": other(state), "updates": 7}}, path)
    check(path, other(state))


def test_entries_that_cannot_be_told_apart_need_a_word(state, tmp_path):
    torch.save({"student": state, "teacher": other(state)}, tmp_path / "w.pth")
    with pytest.raises(HubError, match=r"under student, teacher; .*&key=student"):
        load(tmp_path / "w.pth")
    check(tmp_path / "w.pth", other(state), f"{ARCH}&key=teacher")


class AttributeDict(dict):
    """As Lightning's: a dict of a class of its own."""


class Code:
    def __reduce__(self):
        return (exec, ("raise AssertionError('pickled code was run')",))


class Schedule:
    def __init__(self):
        self.steps = [1, 2]


BESIDE = {
    "timm": {"args": argparse.Namespace(lr=0.1, model="test_resnet"), "arch": "test_resnet"},
    "paths": {"args": argparse.Namespace(out=pathlib.PurePosixPath("/x"))},
    "numpy": {"metric": np.float64(0.5), "dtype": np.dtype("float32"), "curve": np.arange(3)},
    "Lightning": {"hyper_parameters": AttributeDict(lr=0.1, sizes=[1, 2]), "callbacks": {"a": {}}},
    "defaultdict": {"log": defaultdict(list, loss=[1.0])},
    "classes": {"schedule": Schedule(), "device": torch.device("cpu"), "size": torch.Size([2])},
    "code": {"hook": Code()},
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", BESIDE)
def test_objects_beside_the_weights_are_not_made(kind, legacy, state, tmp_path):
    content = {"state_dict": behind("model.", state), **BESIDE[kind]}
    torch.save(content, tmp_path / "w.ckpt", _use_new_zipfile_serialization=not legacy)
    before = torch.serialization.get_safe_globals()
    check(tmp_path / "w.ckpt", state)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_stand_ins_keep_nothing():
    made = StandIn("rm", shell=True)
    made.__setstate__({"append": None})
    assert made == []
    assert vars(made) == {}
    assert {made: 1}[made] == 1


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_whole_pickled_network_is_refused_by_its_class(legacy, tmp_path):
    path = tmp_path / "export.pkl"
    torch.save(nn.Linear(2, 2), path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(HubError, match="could run code and are refused") as caught:
        read_state_dict(path)
    assert "torch.nn.modules.linear.Linear" in str(caught.value)
    assert "state dict" in str(caught.value)


@pytest.mark.parametrize("name", ["w.bin", "w.pth", "w.ckpt", "w", "w.safetensors"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
def test_a_format_is_told_by_its_content(kind, name, state, tmp_path):
    path = tmp_path / name
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    check(path, state)


def shards(folder, state, name, save):
    names = [*state]
    half = len(names) // 2
    stem, ending = name.split(".")
    files = [f"{stem}-0000{i}-of-00002.{ending}" for i in (1, 2)]
    for file, part in zip(files, (names[:half], names[half:]), strict=True):
        save({n: state[n] for n in part}, folder / file)
    weight_map = {n: files[i >= half] for i, n in enumerate(names)}
    index = folder / f"{name}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index, files


@pytest.mark.parametrize(
    ("name", "save"), [("model.safetensors", save_file), ("pytorch_model.bin", torch.save)]
)
def test_a_checkpoint_in_parts(name, save, state, tmp_path):
    index, files = shards(tmp_path, state, name, save)
    check(index, state)
    check(tmp_path, state)  # the folder
    with pytest.raises(HubError, match=rf"is part 2 of 2; name .*{name}.index.json instead"):
        load(tmp_path / files[1])
    (tmp_path / files[1]).unlink()
    with pytest.raises(HubError, match=rf"names 2 files, and 1 of them are not beside.*{files[1]}"):
        load(index)


def test_a_folder_with_weights(state, tmp_path):
    with pytest.raises(
        HubError, match=r"is a folder; expected a file of weights, and it holds none"
    ):
        load(tmp_path)
    torch.save(state, tmp_path / "last.pth.tar")
    check(tmp_path, state)
    torch.save(state, tmp_path / "best.ckpt")
    with pytest.raises(HubError, match=r"it holds best.ckpt, last.pth.tar; name one"):
        load(tmp_path)


def scripted(path):
    torch.jit.save(torch.jit.script(nn.Linear(1, 1)), path)


def zipped(path, names=("a/birds.pth", "readme.txt")):
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, "x")


def tarred(path):
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("birds.pth"), io.BytesIO(b""))


def numpy_file(path, save):
    with open(path, "wb") as file:  # of a path, numpy would change the ending
        save(file, np.zeros(1))


OTHER_KINDS = {
    "gzip": (gzip.compress(b"x"), r"is compressed by gzip; unpack"),
    "zip": (zipped, r"is a zip archive of 2 files \(a/birds.pth, readme.txt\); unpack"),
    "tar": (tarred, r"is a tar archive; unpack"),
    "TorchScript": (scripted, r"is a TorchScript program.*torch.jit.load\(.*state_dict\(\)"),
    "Keras 3": (lambda p: zipped(p, ["config.json", "model.weights.h5"]), r"is a Keras file"),
    "JAX": (lambda p: numpy_file(p, np.savez), r"is a NumPy archive"),
    "NumPy": (lambda p: numpy_file(p, np.save), r"is a NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(100), r"is an HDF5 file, as Keras"),
    "ONNX": (b"\x08\x08\x12\x07pytorch\x1a\x05" + bytes(range(128, 200)), r"is an ONNX model"),
    "TFLite": (b"\x1c\0\0\0TFL3" + bytes(range(128, 200)), r"is a TensorFlow Lite model"),
    "page": (b"\n<!DOCTYPE html><html><title>Sign in</title>", r"is a web page or XML.*again"),
    "XML after a byte order mark": (
        b"\xef\xbb\xbf<?xml version='1.0'?><Error><Code>AccessDenied</Code>",
        r"is a web page or XML.*again",
    ),
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
                r"pointer of git-lfs.*`git lfs pull`"),
    "empty": (b"", r"is empty \(0 bytes\)"),
    "text": (b"Invalid username or password.", r"it begins with is text, 'Invalid username"),
    "config": (b'{"architecture": "resnet50"}', r"is a JSON file without a weight_map"),
    "pickle": (pickle.dumps({"a": np.zeros(2)}), r"written by pickle itself, not by torch.save"),
    "noise": (b"\x99\x01\xfe\xff" * 9, r"is broken or no file of weights"),
}  # fmt: skip


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_files_of_other_kinds_are_named(kind, tmp_path):
    make, message = OTHER_KINDS[kind]
    path = tmp_path / "weights.pth"
    path.write_bytes(make) if isinstance(make, bytes) else make(path)
    with pytest.raises(HubError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("format", ["safetensors", "torch"])
def test_a_file_cut_short_is_broken(format, state, tmp_path):
    path = tmp_path / "w.pth"
    save_file(state, path) if format == "safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(HubError, match=r"w.pth is broken"):
        load(path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_precision_are_cast(dtype, state, tmp_path):
    cast = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.items()}
    save_file(cast, tmp_path / "w.safetensors")
    found = load(tmp_path / "w.safetensors")
    assert all(t.dtype == state[n].dtype for n, t in found.items())
    assert torch.equal(found["conv1.0.weight"], cast["conv1.0.weight"].float())


def test_weights_that_are_no_numbers_of_the_network_are_refused(state, tmp_path):
    path = tmp_path / "w.pth"
    torch.save({**state, "conv1.0.weight": state["conv1.0.weight"].to(torch.int8)}, path)
    with pytest.raises(
        HubError, match=r"1 of another type: conv1.0.weight \(torch.int8 .*float32\)"
    ):
        load(path)
    broken = state["conv1.0.weight"].clone()
    broken[0, 0, 0, 0] = float("nan")
    torch.save({**state, "conv1.0.weight": broken}, path)
    with pytest.raises(
        HubError, match=r"1 with NaN, as of a training that diverged: conv1.0.weight"
    ):
        load(path)
