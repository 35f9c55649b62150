"""The list of names against the libraries themselves, and the two commands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision import models
from typer.testing import CliRunner

from hubpath_fast.cli import app
from hubpath_fast.hub import HUBS, HubError, list_models
from hubpath_fast.hub.costs import count_flops, saved_bytes
from hubpath_fast.hub.names import BACKBONES, library_names
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.source import PlainTask, skeleton
from hubpath_fast.recipes.hub_commands import show
from hubpath_fast.recipes.hub_plan import plan_hub

TORCHVISION = (*models.list_models(module=models), *BACKBONES)


def hubpath(*arguments):
    return CliRunner().invoke(app, ["hub", *map(str, arguments)])


def test_names_are_those_of_the_libraries(tmp_path):
    names = library_names(tmp_path)
    assert {name for name in names if name.startswith("torchvision/")} == {
        f"torchvision/{name}.{w.name}"
        for name in TORCHVISION
        for w in models.get_model_weights(name)
    }
    mine = {name.removeprefix("timm/") for name in names if name.startswith("timm/")}
    assert {name.partition(".")[0] for name in mine} == set(timm.list_models())
    weights = set(timm.list_pretrained())
    assert weights <= mine
    assert all(not timm.models.is_model_pretrained(name) for name in mine - weights)
    assert len(names) == len(set(names))


def test_a_damaged_list_is_made_again_and_a_folder_may_be_unwritable(tmp_path):
    names = library_names(tmp_path)
    [file] = tmp_path.iterdir()
    assert timm.__version__ in file.name
    good = file.read_bytes()
    for damage in (good[:-9], b"", b"[]", b'{"timm/x": 1}', b"[1]", b"\xff"):
        file.write_bytes(damage)
        assert library_names(tmp_path) == names
        assert file.read_bytes() == good
    file.write_text('["timm/kept"]')
    assert library_names(tmp_path) == ["timm/kept"]  # read, not asked for again
    assert library_names(file) == names  # no folder can be made there


def test_patterns():
    assert list_models("timm/resnet50.a[123]_in1k") == [
        f"timm/resnet50.a{i}_in1k" for i in (1, 2, 3)
    ]
    assert list_models("resnet50.v*") == [
        "moco/resnet50.v1_200ep", "moco/resnet50.v2_200ep", "moco/resnet50.v2_800ep",
    ]  # fmt: skip
    assert list_models("paper-*") == ["paper-homogeneous", "paper-heterogeneous"]
    assert "torchvision/maskrcnn_resnet50_fpn.COCO_V1" in list_models("maskrcnn")
    assert list_models("no such model") == []
    for hub in HUBS.values():
        for name in hub:
            assert list_models(name + "*"), name


def test_list_imports_neither_library_once_there_is_a_list(tmp_path):
    """The list must come within 3 s; importing timm and torchvision takes over a second."""
    pytest.importorskip("platformdirs")
    code = (
        "import sys; from typer.testing import CliRunner; from hubpath_fast.cli import app;"
        "r = CliRunner().invoke(app, ['hub', 'list', 'timm/resnet50*']); print(r.output);"
        "print(r.exit_code, 'timm' in sys.modules, 'torchvision' in sys.modules)"
    )
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        output = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env
        ).stdout
        assert "timm/resnet50.a1_in1k" in output
    assert output.splitlines()[-1] == "0 False False"


def test_list_command():
    output = hubpath("list").output
    assert "paper-homogeneous: torchvision/resnet50.IMAGENET1K_V1, moco/resnet50.v1_200ep" in output
    count = sum(len(models.get_model_weights(name)) for name in TORCHVISION)
    assert f"torchvision/NAME: {count} names" in output
    assert hubpath("list", "test_resn*").output == "timm/test_resnet.r160_in1k\n"
    result = hubpath("list", "resnte50.a1_in1k")
    assert result.exit_code == 2
    assert "did you mean resnet50.a1_in1k" in result.stderr


def test_show_command(no_network):
    output = hubpath("show", "torchvision/resnet18", "--batch-size", 10).output
    assert output.startswith("torchvision/resnet18.IMAGENET1K_V1\n")
    network = models.resnet18(num_classes=100)
    count = sum(p.numel() for p in network.parameters())
    assert f"parameters  {count / 1e6:.2f} M" in output
    assert "3.63 G an image, forward, at 224 x 224" in output  # 1.814 G multiply-adds
    assert "224 px, mean 0.485 0.456 0.406, std 0.229 0.224 0.225" in output
    assert "https://download.pytorch.org/models/resnet18-f37072fd.pth" in output
    assert f"{no_network}/torch/checkpoints/resnet18-f37072fd.pth (not there yet)" in output
    assert f"{16 * count / 2**20:.1f} MiB with AdamW" in output
    output = hubpath("show", "tiny?size=64").output
    assert output.count("at 64 x 64") == 5
    assert "all 5:" in output
    result = hubpath("show", "tinyy")
    assert result.exit_code == 2
    assert "did you mean tiny" in result.stderr


def test_show_finds_what_is_cached_and_what_a_name_asks_for(cached_test_resnet, tmp_path):
    [entry] = show("test_resnet")
    assert entry.cached
    assert entry.place.endswith("model.safetensors")
    assert entry.costs.size == entry.native_size == 160
    save_file(cached_test_resnet, tmp_path / "mine.safetensors")
    [entry] = show(f"file/{tmp_path / 'mine.safetensors'}?arch=test_resnet&size=32")
    assert (entry.cached, entry.costs.size) == (True, 32)
    with pytest.raises(HubError, match=r"refuses images of 64 x 64 .*example, 224"):
        show("levit_128s?size=64")


def test_costs_against_counts_by_hand():
    with torch.device("meta"):
        network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(),
                                nn.Linear(8 * 16, 5))  # fmt: skip
    macs = 3 * 8 * 9 * 16 + 8 * 16 * 5
    assert count_flops(network, 4) == 2 * macs
    # Convolution: its input; ReLU: its result, which the linear layer keeps too, as one storage.
    assert saved_bytes(network, 4) == 4 * (3 * 16 + 8 * 16)


def test_a_network_that_asks_with_a_parameter_is_counted():
    """The query of its attention pooling is one: torch's counter needs autograd for that."""
    network = timm.create_model("test_vit3", num_classes=0)
    plain = timm.create_model("test_vit2", num_classes=0)
    assert network.attn_pool is not None
    assert count_flops(network, 160) > 0.5 * count_flops(plain, 160)


def test_what_cannot_be_counted_stops_no_command(monkeypatch):
    def fails(network, size):
        raise AssertionError("Expected gradient function to be set")

    monkeypatch.setattr("hubpath_fast.hub.costs.count_flops", fails)
    output = hubpath("show", "test_vit3,test_resnet").output
    assert "unknown, an image, forward, at 160 x 160" in output
    assert output.count("MiB with AdamW") == 2
    assert "router: nine layers" in output
    assert "FLOPs of K" not in output
    [entry] = show("test_vit3")
    assert entry.costs.flops is None
    assert entry.costs.work > 2 * entry.costs.parameters
    assert len(plan_hub("test_vit3,test_resnet", ranks=1, k=1).costs) == 2


def test_the_memory_of_a_real_network_is_what_autograd_keeps():
    """The same sum over a real step's tensors, on the CPU with numbers."""
    network = timm.create_model("test_resnet", num_classes=100).train()
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(torch.zeros(2, 3, 64, 64))
    total = sum(s.nbytes() for pointer, s in kept.items() if pointer not in own)
    assert output.shape == (2, 100)
    estimate = 2 * saved_bytes(skeleton(find("test_resnet"), PlainTask(100)), 64)
    # The libraries' kernels may keep statistics of their own, as small as a channel's.
    assert abs(estimate - total) < 0.02 * total
