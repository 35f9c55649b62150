from __future__ import annotations

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Empty caches, and a hub at a port of this machine where nothing listens."""
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "torch"))
    return tmp_path


@pytest.fixture
def cached_test_resnet(no_network):
    """The cache as it lies after a download of timm/test_resnet; returns the state dict in it."""
    torch.manual_seed(0)
    state = timm.create_model("test_resnet", num_classes=1000).state_dict()
    revision = "0123456789abcdef0123456789abcdef01234567"
    folder = no_network / "hf" / "models--timm--test_resnet.r160_in1k"
    (folder / "snapshots" / revision).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(revision)
    save_file(state, folder / "snapshots" / revision / "model.safetensors")
    return state
