from __future__ import annotations

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torchvision import models


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


@pytest.fixture(scope="session")
def resnet50_state():
    """One ResNet-50 with 1,000 classes, every tensor of it random, counters included."""
    generator = torch.Generator().manual_seed(0)
    state = models.resnet50(weights=None).state_dict()
    return {
        name: torch.randint(100, tensor.shape, generator=generator)
        if tensor.dtype == torch.int64
        else torch.randn(tensor.shape, generator=generator)
        for name, tensor in state.items()
    }


@pytest.fixture
def put(no_network):
    """put(address, content): a checkpoint in torch's cache, as if downloaded; gone afterwards."""
    folder, paths = no_network / "torch" / "checkpoints", []
    folder.mkdir(parents=True)

    def write(address, content):
        paths.append(folder / address.rpartition("/")[2])
        torch.save(content, paths[-1])
        return paths[-1]

    yield write
    for path in paths:
        path.unlink()
