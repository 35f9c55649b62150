"""Weights: from the cache without a network, strictly loaded, and never unpickled."""

from __future__ import annotations

import hashlib

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from hubpath_fast.hub import (
    HubError,
    build_experts,
    load_body,
    read_state_dict,
)
from hubpath_fast.hub.weights import WeightSource, fetch_all


def tiny(num_outputs=5):
    return build_experts(["test_resnet"], num_outputs, pretrained=False, input_size=32)[0]


def test_cached_weights_load_without_a_network(cached_test_resnet):
    torch.manual_seed(1)
    [expert] = build_experts(["test_resnet"], 5, input_size=32)
    own = expert.body.state_dict()
    assert own["fc.weight"].shape == (5, 96)
    for name, tensor in cached_test_resnet.items():
        if not name.startswith("fc."):
            assert torch.equal(own[name], tensor), name


def test_cached_weights_of_another_layout_are_refused(cached_test_resnet, no_network):
    [path] = (no_network / "hf").rglob("*.safetensors")
    save_file({k: v for k, v in cached_test_resnet.items() if "layer2" not in k}, path)
    with pytest.raises(HubError, match=r"not those of timm/test_resnet[\s\S]*Missing key.*layer2"):
        build_experts(["test_resnet"], 5, input_size=32)


def test_no_network_says_what_where_from_where_to_and_what_else(
    cached_test_resnet, no_network, monkeypatch
):
    waited = []  # the libraries' own retries would sleep over 20 s a file
    monkeypatch.setattr("time.sleep", waited.append)
    with pytest.raises(HubError) as caught:
        build_experts(["test_resnet", "test_nfnet", "test_byobnet"], 5, input_size=32)
    assert sum(waited) < 10
    message = str(caught.value)
    assert "test_resnet" not in message  # that one is cached
    for name in ("test_nfnet", "test_byobnet"):
        wanted = "model.safetensors or pytorch_model.bin from http://127.0.0.1:9"
        assert f"timm/{name}.r160_in1k: {wanted}/timm/{name}.r160_in1k" in message
        assert str(no_network / "hf" / f"models--timm--{name}.r160_in1k") in message
    assert "--no-pretrained" in message


def test_offline_mode_asks_nobody(no_network, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="offline mode is on"):
        build_experts(["test_nfnet"], 5, input_size=32)


def test_a_body_that_does_not_fit_is_named_and_nothing_is_loaded():
    target = tiny()
    before = {name: tensor.clone() for name, tensor in target.body.state_dict().items()}
    state = {name: tensor + 1 for name, tensor in before.items()}
    del state["layer1.0.conv1.weight"]
    state["odd.weight"] = torch.zeros(1)
    state["conv1.0.weight"] = torch.zeros(1, 2)
    with pytest.raises(HubError) as caught:
        load_body(target, state, source="mine.pth")
    message = str(caught.value)
    assert "mine.pth do not fit timm/test_resnet.r160_in1k" in message
    assert "1 missing: layer1.0.conv1.weight" in message
    assert "1 left over: odd.weight" in message
    assert "1 of another shape: conv1.0.weight ([1, 2] instead of [" in message
    assert all(torch.equal(t, before[name]) for name, t in target.body.state_dict().items())


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was run",))


def test_bad_files(tmp_path):
    with pytest.raises(HubError, match=r"no file of weights at .*gone.pth"):
        read_state_dict(tmp_path / "gone.pth")
    torch.save({"a": Payload()}, tmp_path / "code.pth")
    with pytest.raises(HubError, match="could run code and are refused"):
        read_state_dict(tmp_path / "code.pth")
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("no checkpoint at all")
        with pytest.raises(HubError, match=name):
            read_state_dict(tmp_path / name)
    torch.save({"a": torch.zeros(100)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:-200])
    with pytest.raises(HubError, match=r"cut.pth is broken"):
        read_state_dict(tmp_path / "cut.pth")
    torch.save({"a": torch.zeros(1), "epoch": 3}, tmp_path / "odd.pth")
    with pytest.raises(HubError, match="'epoch'"):
        read_state_dict(tmp_path / "odd.pth")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    with pytest.raises(HubError, match="holds list"):
        read_state_dict(tmp_path / "list.pth")


# Downloads. A file:// address goes the whole way of torch's own download.


def published(tmp_path, name="w", md5=None):
    """A file on a server, its SHA-256 in its name, as torchvision and timm publish them."""
    state = {"a": torch.arange(5.0)}
    torch.save(state, tmp_path / "w.pth")
    data = (tmp_path / "w.pth").read_bytes()
    path = tmp_path / f"{name}-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    path.write_bytes(data)
    return path, WeightSource("moco/w", url=path.as_uri(), md5=md5), hashlib.md5(data).hexdigest()


def test_a_download_lands_in_torchs_cache(no_network, tmp_path):
    path, source, _ = published(tmp_path)
    [local] = fetch_all([source])
    assert local == no_network / "torch" / "checkpoints" / path.name
    assert local.read_bytes() == path.read_bytes()
    path.unlink()
    assert fetch_all([source]) == [local]  # from the cache


@pytest.mark.parametrize("check", ["sha256", "md5"])
def test_a_download_that_is_not_what_was_published_is_thrown_away(check, no_network, tmp_path):
    path, source, digest = published(tmp_path)
    if check == "md5":
        plain = path.rename(tmp_path / "plain.pth.tar")
        good = WeightSource("moco/w", url=plain.as_uri(), md5=digest[:8])
        [local] = fetch_all([good])
        assert local.name == "plain.pth.tar"
        local.unlink()
        source = WeightSource("moco/w", url=plain.as_uri(), md5="0123abcd")
        message = f"has the MD5 {digest}, but must begin with 0123abcd"
    else:
        path.write_bytes(path.read_bytes() + b"x")
        message = "invalid hash value"
    with pytest.raises(HubError, match=message):
        fetch_all([source])
    assert list((no_network / "torch" / "checkpoints").iterdir()) == []


def test_a_file_of_the_hugging_face_hub_is_checked_too(no_network, monkeypatch):
    """Its cache names a large file by the SHA-256 that the server states."""
    digest = hashlib.sha256(b"right").hexdigest()
    folder = no_network / "hf" / "models--timm--x"
    blob, link = folder / "blobs" / digest, folder / "snapshots" / "r" / "model.safetensors"
    monkeypatch.setattr("hubpath_fast.hub.weights._unreachable", lambda _: [])

    def download(*_, **__):
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_bytes(content)
        if not link.is_symlink():
            link.symlink_to(blob)
        return str(link)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    source = WeightSource("timm/x", "timm/x")
    content = b"right"
    assert fetch_all([source]) == [link]
    content = b"wrong"
    with pytest.raises(HubError, match=f"does not have the SHA-256 {digest}"):
        fetch_all([source])
    assert not blob.exists()
    assert not link.is_symlink()


def test_one_server_that_cannot_be_reached_stops_all_downloads(no_network, tmp_path, monkeypatch):
    _, source, _ = published(tmp_path)
    gone = WeightSource("torchvision/x", url="http://127.0.0.1:9/x-01234567.pth")
    with pytest.raises(HubError) as caught:
        fetch_all([source, gone])
    message = str(caught.value)
    assert "127.0.0.1:9 cannot be reached" in message
    place = no_network / "torch" / "checkpoints" / "x-01234567.pth"
    assert f"torchvision/x: from http://127.0.0.1:9/x-01234567.pth, kept as {place}" in message
    assert "file/PATH?arch=NAME" in message
    assert not place.parent.exists()


def test_a_cached_file_that_does_not_fit_is_reported_before_any_download(
    cached_test_resnet, no_network, monkeypatch
):
    [path] = (no_network / "hf").rglob("*.safetensors")
    path.write_bytes(b"cut short")
    monkeypatch.setattr("hubpath_fast.hub.build.fetch_all", lambda _: pytest.fail("a download"))
    with pytest.raises(HubError, match=r"model.safetensors is broken"):
        build_experts(["test_nfnet", "test_resnet"], 5, input_size=32)
