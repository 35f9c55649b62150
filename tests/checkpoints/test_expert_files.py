"""A model in files by expert: what lies where, what is read back, and what is refused."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hubpath_fast.checkpoints import (
    INDEX_FILE,
    CheckpointError,
    SavedModel,
    assign_weights,
    load_weights,
    write_model,
)

CONFIG = {"model": {"k": 1}}


class Toy(nn.Module):
    """Three experts with BatchNorm, of two architectures; the last two share a trunk."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.register_buffer("mean", torch.rand(3))
        trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)),
                nn.Sequential(trunk, nn.Conv2d(4, 2, 1)),
                nn.Sequential(trunk, nn.Conv2d(4, 5, 3)),
            ]
        )
        self.experts[1].requires_grad_(False)
        self.generator = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.generator.weight
        self.to(memory_format=torch.channels_last)


LABELS = ("resnet50.a1_in1k", "timm/../é x", "")
FILES = ["00-resnet50.a1_in1k", "01-timm-.-x", "02-expert"]


def same(one: nn.Module, two: nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hub").mkdir()
    write_model(tmp_path / "hub", Toy(), CONFIG, LABELS)
    return tmp_path / "hub"


def test_an_expert_is_one_file_and_the_index_says_which(folder):
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*.*"))
    experts = [f"experts/{name}.safetensors" for name in FILES]
    assert names == ["config.json", *experts, INDEX_FILE, "router.safetensors"]
    index = json.loads((folder / INDEX_FILE).read_text())
    state = Toy().state_dict()
    held = {name: file for file in index["metadata"]["sha256"] for name in load_file(folder / file)}
    assert held == index["weight_map"]
    assert held["experts.1.0.0.weight"] == experts[1]
    assert held["generator.weight"] == "router.safetensors"
    trunk = [name for name in state if name.startswith("experts.1.0.")]
    assert index["metadata"]["aliases"] == {
        **{name.replace("experts.1", "experts.2"): name for name in trunk},
        "tied.weight": "generator.weight",
    }
    sizes = [state[name].numel() * state[name].element_size() for name in held]
    assert index["metadata"]["total_size"] == sum(sizes)
    config = json.loads((folder / "config.json").read_text())
    assert config["hubpath_format"] == 1
    assert config["library_name"] == "hubpath_fast"
    assert config["model"] == CONFIG["model"]
    assert torch.__version__.startswith(config["versions"]["torch"])


def test_what_is_loaded_is_what_was_saved_and_stays_in_the_models_own_memory(folder):
    other = Toy(1)
    pointers = [p.data_ptr() for p in other.parameters()]
    load_weights(other, folder)
    assert same(other, Toy())
    assert [p.data_ptr() for p in other.parameters()] == pointers


def test_assigned_tensors_are_the_files_memory_with_ties_layout_and_gradients_kept(folder):
    with torch.device("meta"):
        other = Toy(1)
    saved = SavedModel(folder)
    assign_weights(other, saved)
    assert same(other, Toy())
    assert other.tied.weight is other.generator.weight
    assert other.experts[1][0][0].weight is other.experts[2][0][0].weight
    assert [p.requires_grad for p in other.parameters()] == [
        p.requires_grad for p in Toy().parameters()
    ]
    strides = [p.stride() for p in other.parameters()]
    assert strides == [p.stride() for p in Toy().parameters()]
    mapped = saved.tensors("experts.0.")["experts.0.0.weight"]
    assert other.experts[0][0].weight.data_ptr() == mapped.data_ptr()  # 1 x 1: no copy
    assert all(t.data_ptr() % 64 == 0 for t in other.state_dict().values())  # as torch's own
    with torch.no_grad():
        other.experts[0][0].weight.zero_()
    assert same_as_saved(folder)


def same_as_saved(folder) -> bool:
    SavedModel(folder).verify()
    model = Toy(2)
    load_weights(model, folder)
    return same(model, Toy())


def test_one_expert_is_assigned_from_its_own_names(folder):
    expert = Toy(3).experts[2]
    assign_weights(expert, SavedModel(folder), "experts.2.")
    assert same(expert, Toy().experts[2])
    with pytest.raises(CheckpointError, match=r"01-timm-.-x.safetensors is of another model: 0\."):
        assign_weights(Toy(3).experts[0], SavedModel(folder), "experts.1.")


def test_separate_modules_that_were_one_when_saved_are_tied_again(folder):
    other = Toy(1)
    other.experts[2][0] = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    assign_weights(other, SavedModel(folder))
    assert other.experts[1][0][0].weight is other.experts[2][0][0].weight


def test_a_model_without_experts_is_one_file_with_its_aliases(tmp_path):
    model, other = Toy(), Toy(1)
    del model.experts, other.experts
    write_model(tmp_path, model, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    load_weights(other, tmp_path)
    assert same(other, model)
    assert SavedModel(tmp_path).files()["tied.weight"] == tmp_path / "model.safetensors"


def test_a_swapped_file_is_named_by_its_hash_before_anything_is_loaded(folder):
    one, two = (folder / f"experts/{name}.safetensors" for name in FILES[:2])
    other = folder / "experts/other"
    one.rename(other), two.rename(one), other.rename(two)
    model = Toy(1)
    with pytest.raises(
        CheckpointError, match=rf"{re.escape(str(one))} is the file of another save or model: its "
    ):
        load_weights(model, folder)
    assert same(model, Toy(1))


def test_a_file_of_another_save_or_program_is_named(folder, tmp_path):
    (tmp_path / "two").mkdir()
    write_model(tmp_path / "two", Toy(5), CONFIG, LABELS)
    path = folder / f"experts/{FILES[0]}.safetensors"
    shutil.copy(tmp_path / "two/experts" / path.name, path)
    with pytest.raises(CheckpointError, match=rf"{FILES[0]}.* is the file of another save"):
        SavedModel(folder)
    save_file(load_file(path), path)
    with pytest.raises(CheckpointError, match=r"its header says no SHA-256"):
        SavedModel(folder)


def test_a_missing_or_truncated_file_is_named(folder):
    path = folder / f"experts/{FILES[1]}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is truncated or damaged"):
        SavedModel(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is missing"):
        SavedModel(folder)
    (folder / INDEX_FILE).unlink()
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE} is missing"):
        SavedModel(folder)


def test_a_changed_byte_is_found_by_reading_all(folder):
    path = folder / f"experts/{FILES[1]}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    saved = SavedModel(folder)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is damaged: the SHA-256"):
        saved.verify()


def edit_index(folder, edit):
    index = json.loads((folder / INDEX_FILE).read_text())
    edit(index)
    (folder / INDEX_FILE).write_text(json.dumps(index))


@pytest.mark.parametrize("file", ["../x.safetensors", "/etc/x.safetensors", "experts/../../x", ""])
def test_an_index_that_leads_out_of_the_folder_is_refused(folder, file):
    def edit(index):
        index["weight_map"]["mean"] = file
        index["metadata"]["sha256"][file] = "0" * 64

    edit_index(folder, edit)
    with pytest.raises(CheckpointError, match=r"which is none of this folder: expected router"):
        SavedModel(folder)


def test_an_index_of_other_tensors_is_refused_with_the_first_of_them(folder):
    edit_index(folder, lambda index: index["weight_map"].pop("mean"))
    with pytest.raises(
        CheckpointError, match=r"mean is in no file by the index, in router\.safetensors in fact"
    ):
        SavedModel(folder)
    edit_index(folder, lambda index: index["weight_map"].update(mean="router.safetensors"))
    edit_index(folder, lambda index: index["weight_map"].update(more="router.safetensors"))
    with pytest.raises(CheckpointError, match=r"more is in router\.safetensors by the index, in n"):
        SavedModel(folder)


@pytest.mark.parametrize("text", ["[]", "{}", '{"weight_map": {"a": 1}, "metadata": {}}', "{"])
def test_an_index_that_is_none_is_called_damaged(folder, text):
    (folder / INDEX_FILE).write_text(text)
    with pytest.raises(CheckpointError, match=rf"{INDEX_FILE} is truncated or damaged"):
        SavedModel(folder)


def test_other_formats_are_told_apart(folder):
    def config(**values):
        (folder / "config.json").write_text(json.dumps(values))

    config(hubpath_format=2)
    with pytest.raises(CheckpointError, match=r"is of format 2, and .* reads formats 0 to 1; open"):
        SavedModel(folder)
    config(hubpath_format="1")
    with pytest.raises(CheckpointError, match=r"config\.json is truncated or damaged"):
        SavedModel(folder)
    config(architecture="resnet50", num_classes=10)
    with pytest.raises(CheckpointError, match=r"has no hubpath_format; a plain timm model is"):
        SavedModel(folder)


def test_labels_are_as_many_as_the_experts(tmp_path):
    with pytest.raises(ValueError, match=r"labels: expected one for each of the 3 experts, got 2"):
        write_model(tmp_path, Toy(), CONFIG, LABELS[:2])


@pytest.mark.parametrize("load", [load_weights, lambda m, f: assign_weights(m, SavedModel(f))])
def test_one_tensor_of_the_model_that_is_two_in_the_file_is_refused_if_they_differ(tmp_path, load):
    separate, tied = nn.Module(), nn.Module()
    for model in (separate, tied):
        model.one, model.two = nn.Linear(2, 2), nn.Linear(2, 2)
        nn.init.constant_(model.one.bias, torch.nan)  # equal bits are equal
    tied.two = tied.one
    separate.two.load_state_dict(separate.one.state_dict())
    for name in ("equal", "different"):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, separate, CONFIG)
        separate.two.weight.data[0, 0] += 1
    load(tied, tmp_path / "equal")
    assert torch.equal(tied.two.weight, separate.one.weight)
    before = tied.one.weight.clone()
    with pytest.raises(CheckpointError, match=r"one\.weight and two\.weight are one tensor in the"):
        load(tied, tmp_path / "different")
    assert torch.equal(tied.one.weight, before)
