"""Models that are pushed to a stand-in of the hub and opened by their name there, to the bit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from huggingface_hub import metadata_load
from support.command import hubpath, refused
from support.hub_server import hub_server

import hubpath_fast as hp
from hubpath_fast.checkpoints import CheckpointError

NAME = "somebody/tiny"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server(tmp_path / "cache", monkeypatch) as server:
        yield server


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = hp.create_model("tiny", 4, k=2, pretrained=False, input_size=32)
    made(torch.rand(16, 3, 32, 32))  # moves the running statistics of BatchNorm
    return made


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps."""
    out = tmp_path_factory.mktemp("runs") / "digits"
    hubpath("fit", "--dataset", "digits", "--hub", "tiny", "--no-pretrained", "--steps", 2,
            "--batch-size", 8, "--image-size", 32, "--out", out)  # fmt: skip
    return out


def images():
    return torch.randint(256, (9, 3, 32, 32), dtype=torch.uint8, generator=torch.manual_seed(1))


def same(a, b):
    state, other = a.state_dict(), b.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[name], other[name]) for name in state)
    with torch.no_grad():
        return torch.equal(a.eval()(images()), b.eval()(images()))


def test_a_pushed_model_opens_by_its_name_bit_equal(hub, model):
    address = model.push_to_hub(NAME, private=True, classes=list("abcd"))
    assert address.startswith(f"{hub.endpoint}/{NAME}/commit/")
    assert hub.repositories[NAME].private
    opened = hp.from_pretrained(NAME)
    assert same(model, opened)
    assert list(opened.origin.task["classes"]) == list("abcd")
    hub.requests.clear()
    assert same(model, hp.from_pretrained(NAME, local_files_only=True))
    assert not hub.requests


def test_a_repository_has_one_file_for_each_expert_and_a_card(hub, model):
    model.push_to_hub(NAME)
    files = hub.repositories[NAME].files()
    assert sum(name.startswith("experts/") for name in files) == len(model.experts)
    assert {"README.md", "config.json", "router.safetensors"} < set(files)
    assert f'hp.from_pretrained("{NAME}")' in files["README.md"].decode()


def test_one_expert_is_opened_by_its_file_alone(hub, model):
    model.push_to_hub(NAME)
    expert = hp.load_expert(NAME, 3)
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(expert(x), model.eval().experts[3](x))
    assert [f for f in hub.fetched if f.startswith("experts/")] == [
        next(f for f in hub.repositories[NAME].files() if f.startswith("experts/03-"))
    ]
    assert "router.safetensors" not in hub.fetched


def test_after_a_change_only_its_expert_is_sent_and_both_revisions_open(hub, model):
    model.push_to_hub(NAME)
    first = hub.repositories[NAME].branches["main"]
    bias = next(model.experts[1].parameters())
    before = bias.detach().clone()
    hub.uploads.clear(), hub.committed.clear()
    with torch.no_grad():
        bias += 1
    try:
        model.push_to_hub(NAME)
        assert len(hub.uploads) == 1
        [[expert, index]] = hub.committed  # the index has the hashes
        assert (expert.startswith("experts/01-"), index) == (True, "model.safetensors.index.json")
        assert same(model, hp.from_pretrained(NAME))
    finally:
        with torch.no_grad():
            bias.copy_(before)
    assert same(model, hp.from_pretrained(NAME, revision=first))


def test_the_hubs_own_mixin_opens_it_too(hub, model):
    from hubpath_fast.pretrained.hub_mixin import SavedModelOnHub

    model.push_to_hub(NAME)
    assert same(model, SavedModelOnHub.from_pretrained(NAME))


def test_a_refused_push_is_an_error_of_this_package(hub, model):
    with pytest.raises(CheckpointError, match="cannot be written to with this token"):
        model.push_to_hub(NAME, token="hf_another")
    with pytest.raises(ValueError, match="classes: expected 4 names"):
        model.push_to_hub(NAME, classes=["a"])


def test_a_saved_run_has_a_card_with_its_results(run, tmp_path):
    out = tmp_path / "digits-hub"
    hubpath("save", run, out)
    text = (out / "README.md").read_text(encoding="utf-8")
    result = json.loads((run / "result.json").read_text())
    assert f"| this model | {100 * result['test_accuracy']:.1f} % | 2 |" in text
    assert f"Measured on {result['test_images']} images" in text
    assert 'hp.from_pretrained("digits-hub")' in text
    assert "began with random weights" in text
    found = metadata_load(out / "README.md")
    [value] = found["model-index"][0]["results"][0]["metrics"]
    assert value == {"type": "accuracy", "value": result["test_accuracy"]}


def test_of_other_weights_than_the_best_the_card_has_no_results(run, tmp_path):
    hubpath("save", run / "best", tmp_path / "best")
    assert "this model" in (tmp_path / "best" / "README.md").read_text(encoding="utf-8")
    hubpath("save", run / "last", tmp_path / "last")
    assert "none are known" in (tmp_path / "last" / "README.md").read_text(encoding="utf-8")


def test_a_run_is_saved_and_pushed_by_one_command(hub, run, tmp_path):
    out = tmp_path / "saved"
    said = hubpath("save", run, out, "--push", NAME, "--private").stdout
    repository = hub.repositories[NAME]
    assert f"pushed: {hub.endpoint}/{NAME}/commit/{repository.branches['main']}" in said
    assert repository.private
    held = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
    assert repository.files() == held
    assert f'hp.from_pretrained("{NAME}")' in held["README.md"].decode()
    assert same(hp.from_pretrained(out), hp.from_pretrained(NAME))


def test_a_wrong_name_is_refused_before_anything_is_written(run, tmp_path):
    assert "there is no --push; leave it out" in refused("save", run, tmp_path / "a", "--private")
    assert "repo_id: expected OWNER/NAME" in refused("save", run, tmp_path / "a", "--push", "tiny")
    assert not (tmp_path / "a").exists()


def test_the_package_imports_no_hub_library():
    code = (
        "import sys, hubpath_fast, hubpath_fast.pretrained.hub_api, hubpath_fast.model.saving; "
        "print('huggingface_hub' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
