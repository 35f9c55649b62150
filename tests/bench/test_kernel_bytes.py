"""Bytes that BatchNorm's kernels move: counted right, and few enough."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from bench import kernel_bytes
from bench.kernel_bytes import (
    LIMIT,
    Layer,
    counted,
    enough_rows,
    fewest,
    first_of,
    moved,
    resnet50,
)

pytestmark = [
    pytest.mark.usefixtures("interpreted"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="counts what is interpreted"),
]


@triton.jit
def _doubled(out_ptr, x_ptr, count_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.load(count_ptr)
    tl.store(out_ptr + offs, (2 * tl.load(x_ptr + offs, mask)).to(tl.float32), mask)


def test_lanes_that_are_not_masked_count_their_bytes():
    x, out = torch.ones(100, dtype=torch.float16), torch.empty(100)
    with counted() as found:
        _doubled[(2,)](out, x, torch.tensor(100, dtype=torch.int32), BLOCK=64)
    assert found == {"loads": 100 * 2 + 2 * 4, "stores": 100 * 4}
    _doubled[(2,)](out, x, torch.tensor(100, dtype=torch.int32), BLOCK=64)
    assert found.total() == 608  # nothing is counted any more


def test_the_fewest_bytes_of_a_layer():
    """24 rows of 7x7x2048 take 4816896 bytes, a vector of the channels 8192."""
    maps, vector = 4816896, 8192
    assert fewest(Layer(7, 2048), 24) == (3 * maps + 6 * vector, 5 * maps + 5 * vector)
    block = Layer(7, 2048, residual=True)
    assert fewest(block, 24) == (4 * maps + 6 * vector, 7 * maps + 5 * vector)
    assert fewest(Layer(7, 2048, None, residual=True), 24)[1] == 6 * maps + 5 * vector


def test_the_layers_are_those_of_a_resnet50():
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet50").to("meta").eval()
    found = set()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, y: found.add((y.shape[2], y.shape[1])))
    model(torch.empty(1, 3, 224, 224, device="meta"))
    assert {(layer.side, layer.channels) for layer in resnet50()} == found


@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "contiguous"])
@pytest.mark.parametrize(
    "layer",
    [
        Layer(7, 512),
        Layer(7, 2048, residual=True),
        Layer(7, 2048, activation=None),
        Layer(14, 256),
        Layer(28, 128, residual=True),
    ],
    ids=str,
)
def test_a_layer_moves_hardly_more_than_it_must(layer, channels_last):
    rows, part = enough_rows(layer), first_of(layer)
    for found, least in zip(moved(part, rows, channels_last), fewest(part, rows), strict=True):
        assert 1 <= found / least <= LIMIT


def test_a_layer_in_words(capsys, monkeypatch):
    monkeypatch.setattr(kernel_bytes, "moved", lambda *_: (2 * 10**6, 3 * 10**6))
    assert kernel_bytes.main(["--only", "7x7x512", "--rows", "4", "--channels", "512"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["7x7x512", "relu", "3.255", "2.959"]
    assert lines[-1] == "at most 3.255, and 1.05 is allowed"
