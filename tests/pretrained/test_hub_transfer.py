"""Pushing to and downloading from the hub, against a stand-in of its API on this machine.

The folders are made by hand: what is in their files does not matter to what is sent.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from support.hub_server import TOKEN, HubServer, hub_server

from hubpath_fast.checkpoints import CheckpointError
from hubpath_fast.pretrained.hub_api import download, locate, push_folder

LABELS = ("resnet #1", "resnet #2", "nfnet")
CONFIG = {
    "hubpath_format": 1,
    "library_name": "hubpath_fast",
    "model": {"experts": [{"spec": None, "label": label} for label in LABELS]},
}
EXPERTS = [f"experts/{i:02}-{name}.safetensors" for i, name in enumerate(("a", "b", "c"))]
NAME = "somebody/digits"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with hub_server(tmp_path / "cache", monkeypatch) as server:
        yield server


def make_folder(path: Path) -> Path:
    """A saved model of three experts, and files that are no part of one."""
    weights = {"generator.weight": "router.safetensors"}
    weights |= {f"experts.{i}.weight": file for i, file in enumerate(EXPERTS)}
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors.index.json": json.dumps({"weight_map": weights}).encode(),
        "router.safetensors": b"router",
        **{file: file.encode() * 50 for file in EXPERTS},
        "README.md": b"---\nlibrary_name: hubpath_fast\n---\n# Digits\n",
        "notes.txt": b"not of the model",
        "other/large.bin": b"nor this",
    }
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "saved")


def relative(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


MODEL_FILES = {"config.json", "model.safetensors.index.json", "router.safetensors", *EXPERTS}


def test_a_push_creates_the_repository_with_the_models_files_alone(hub, folder):
    address = push_folder(folder, NAME)
    held = hub.repositories[NAME].files()
    assert set(held) == MODEL_FILES | {"README.md"}
    assert all(data == (folder / name).read_bytes() for name, data in held.items())
    assert address == f"{hub.endpoint}/{NAME}/commit/{hub.repositories[NAME].branches['main']}"
    assert not hub.repositories[NAME].private


def test_a_private_push_makes_a_private_repository(hub, folder):
    push_folder(folder, NAME, private=True)
    assert hub.repositories[NAME].private


def test_a_second_push_sends_only_what_changed(hub, folder):
    push_folder(folder, NAME)
    assert len(hub.uploads) == 4
    hub.uploads.clear(), hub.committed.clear()
    (folder / EXPERTS[1]).write_bytes(b"trained further")
    push_folder(folder, NAME)
    assert (len(hub.uploads), hub.committed) == (1, [[EXPERTS[1]]])
    assert hub.repositories[NAME].files()[EXPERTS[1]] == b"trained further"
    push_folder(folder, NAME)
    assert len(hub.committed) == 1  # nothing changed, no commit


def test_an_expert_that_was_removed_goes_from_the_repository(hub, folder):
    push_folder(folder, NAME)
    (folder / EXPERTS[2]).unlink()
    push_folder(folder, NAME)
    assert set(hub.repositories[NAME].files()) == MODEL_FILES - {EXPERTS[2]} | {"README.md"}


def test_a_push_to_a_branch_leaves_the_default_one(hub, folder):
    push_folder(folder, NAME)
    before = dict(hub.repositories[NAME].files())
    (folder / EXPERTS[0]).write_bytes(b"tried")
    push_folder(folder, NAME, branch="try")
    assert hub.repositories[NAME].files() == before
    assert hub.repositories[NAME].files("try")[EXPERTS[0]] == b"tried"
    at = download(NAME, revision="try")
    assert (at / EXPERTS[0]).read_bytes() == b"tried"
    assert (download(NAME) / EXPERTS[0]).read_bytes() == before[EXPERTS[0]]
    assert locate(f"hf-hub:{NAME}@try") == at


def test_a_push_without_the_right_says_whose_token_is_wrong(hub, folder):
    with pytest.raises(CheckpointError, match=r"somebody/digits cannot be written to with this "):
        push_folder(folder, NAME, token="hf_another")
    assert not hub.repositories


def test_only_a_saved_model_is_pushed(hub, tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(CheckpointError, match=r"holds no model of hubpath_fast \(no config.json\)"):
        push_folder(tmp_path / "other", NAME)
    with pytest.raises(CheckpointError, match=r"repo_id: expected OWNER/NAME .* got 'digits'"):
        push_folder(make_folder(tmp_path / "saved"), "digits")
    assert not hub.requests


def test_a_download_fetches_the_models_files_alone(hub, folder):
    hub.add_folder(NAME, folder)
    found = download(NAME)
    assert relative(found) == MODEL_FILES == set(hub.fetched)
    assert all((found / name).read_bytes() == (folder / name).read_bytes() for name in MODEL_FILES)
    assert len(hub.fetched) == len(MODEL_FILES)  # each once


@pytest.mark.parametrize("expert", [1, -2, "resnet #2"])
def test_of_one_expert_only_its_file_is_fetched(hub, folder, expert):
    hub.add_folder(NAME, folder)
    found = download(NAME, expert=expert)
    assert relative(found) == {"config.json", "model.safetensors.index.json", EXPERTS[1]}
    assert sorted(hub.fetched) == sorted(relative(found))


def test_a_tensor_that_an_expert_shares_is_fetched_with_it(hub, folder):
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    aliases = {"experts.1.bias": "experts.2.weight"}
    path.write_text(json.dumps({**index, "metadata": {"aliases": aliases}}))
    hub.add_folder(NAME, folder)
    assert {f for f in relative(download(NAME, expert=1)) if f in EXPERTS} == set(EXPERTS[1:])


@pytest.mark.parametrize("expert", [3, -4, "resnet"])
def test_an_unknown_expert_is_named_with_the_known_ones(hub, folder, expert):
    hub.add_folder(NAME, folder)
    with pytest.raises(
        CheckpointError, match=r"expert: expected a number in 0..2 or one of resnet #1, .*nfnet"
    ):
        download(NAME, expert=expert)


def test_what_is_cached_is_opened_without_the_network(hub, folder):
    hub.add_folder(NAME, folder)
    found = download(NAME)
    hub.requests.clear()
    assert download(NAME, local_files_only=True) == found
    assert not hub.requests
    hub.close()
    assert download(NAME) == found


def test_a_part_in_the_cache_is_not_taken_for_the_model(hub, folder):
    hub.add_folder(NAME, folder)
    download(NAME, expert=0)
    hub.requests.clear()
    with pytest.raises(CheckpointError, match="local_files_only") as caught:
        download(NAME, local_files_only=True)
    assert "\n" not in str(caught.value)
    assert not hub.requests


def test_the_cache_can_be_elsewhere(hub, folder, tmp_path):
    hub.add_folder(NAME, folder)
    assert tmp_path / "own" in download(NAME, cache_dir=tmp_path / "own").parents
    with pytest.raises(CheckpointError, match="not in the cache"):
        download(NAME, local_files_only=True)


def test_a_commit_is_a_revision(hub, folder):
    first = hub.add_folder(NAME, folder).branches["main"]
    (folder / EXPERTS[0]).write_bytes(b"later")
    push_folder(folder, NAME)
    assert (download(NAME, revision=first) / EXPERTS[0]).read_bytes() == EXPERTS[0].encode() * 50
    assert (download(NAME) / EXPERTS[0]).read_bytes() == b"later"


REFUSALS = {
    "missing": ({}, r"there is no repository somebody/digits on http://127.*or it is private"),
    "gated": (
        {"gated": True},
        r"somebody/digits is open only to those whom its owner lets in; ask",
    ),
    "private": ({"private": True}, r"there is no repository .*token=, gives the right to read"),
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_one_sentence_that_says_what_to_do(hub: HubServer, folder, kind):
    how, message = REFUSALS[kind]
    if kind != "missing":
        hub.add_folder(NAME, folder, **how)
    with pytest.raises(CheckpointError, match=message) as caught:
        download(NAME, token="hf_another" if kind == "private" else TOKEN)
    assert "\n" not in str(caught.value)


def test_an_unknown_revision_is_named(hub, folder):
    hub.add_folder(NAME, folder)
    with pytest.raises(CheckpointError, match=r"^somebody/digits has no revision 'v9'; give a bra"):
        download(NAME, revision="v9")


def test_without_a_network_the_server_is_named(hub, folder):
    hub.close()
    with pytest.raises(
        CheckpointError, match=r"^somebody/digits is not in the cache.*cannot be re"
    ):
        download(NAME)


def test_offline_mode_is_named(hub, folder, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set: run once without it"):
        download(NAME)
    assert not hub.requests


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"README.md": b"x"}, r"holds no model of hubpath_fast \(no config.json\)"),
        (
            {"config.json": b'{"architecture": "resnet50"}'},
            r"it describes 'resnet50'; a model of t",
        ),
        ({"config.json": b"{"}, r"config.json is damaged"),
        ({"config.json": b"[]"}, r"config.json is damaged \(it holds no object\)"),
        ({"config.json": json.dumps(CONFIG).encode()}, r"model.safetensors is not there; the repo"),
    ],
)
def test_another_kind_of_repository_is_told_from_a_model(hub, files, message):
    hub.add(NAME, files)
    with pytest.raises(CheckpointError, match=message):
        download(NAME)


def test_a_repository_that_lacks_a_file_of_its_index_is_refused(hub, folder):
    (folder / EXPERTS[1]).unlink()
    hub.add_folder(NAME, folder)
    with pytest.raises(
        CheckpointError, match=rf"{EXPERTS[1]} is not there; the repository lacks i"
    ):
        download(NAME)


def test_a_folder_goes_before_a_repository(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    make_folder(Path(NAME))
    assert locate(NAME) == Path(NAME)
    assert not hub.requests


@pytest.mark.parametrize("name", ["saved2", "./saved2", "a/b/c", "two words/model", ""])
def test_what_is_neither_a_folder_nor_a_name_is_refused_without_a_request(
    hub, folder, monkeypatch, name
):
    monkeypatch.chdir(folder.parent)
    with pytest.raises(CheckpointError, match="is neither a folder nor a repository") as caught:
        locate(name)
    assert ("Did you mean the folder saved?" in str(caught.value)) == ("saved2" in name)
    assert not hub.requests


def test_a_mistyped_folder_is_offered_where_no_repository_has_its_name(hub, folder, monkeypatch):
    monkeypatch.chdir(folder.parent.parent)
    near = f"{folder.parent.name}/savd"
    with pytest.raises(CheckpointError, match=r"there is no repository .*Did you mean the folder "):
        locate(near)


@pytest.mark.parametrize("form", ["hf-hub:{}", "https://huggingface.co/{}", "hf_hub:{}"])
def test_other_forms_of_a_repositorys_name_are_read(hub, folder, form):
    hub.add_folder(NAME, folder)
    assert locate(form.format(NAME)) == download(NAME)


def test_the_stand_in_lets_nothing_out(tmp_path, monkeypatch):
    # Even where what connects catches the refusal.
    server = hub_server(tmp_path, monkeypatch)
    server.__enter__()
    with pytest.raises(OSError, match="is not of this machine"):
        socket.create_connection(("203.0.113.1", 443), timeout=1)
    with pytest.raises(AssertionError, match="something went to"):
        server.__exit__(None, None, None)
