"""Crops, targets, decoding and the loss on a GPU are those of the CPU, whose plain forms are tested
beside them."""

import pytest
import torch

from hubpath_fast.tasks.landmarks import crop_matrix, decode, gaussian_targets, map_loss, warp

pytestmark = pytest.mark.gpu


def test_crops():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 90, 120), dtype=torch.uint8, generator=generator)
    centers = [(60.0, 40.0), (10.5, 80.0), (70.0, 50.0)]
    matrix = crop_matrix(centers, [0.1, 0.6, 0.3], [20.0, -5.0, 0.0], 32)
    crops = warp(images.cuda(), matrix, 32)
    assert crops.is_cuda
    away = (crops.cpu().int() - warp(images, matrix, 32).int()).abs()
    assert away.max() <= 1  # a rounding to whole numbers may fall the other way
    assert (away > 0).float().mean() < 0.01
    assert torch.equal(warp(images.cuda(), matrix.cuda(), 32), crops)


def test_decoding_takes_the_first_of_equals():
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(-1, 4, (64, 5, 16, 16), generator=generator).float()
    for ours, theirs in zip(decode(maps.cuda()), decode(maps), strict=True):
        assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("kind", ["subpixel", "published"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_targets_and_loss(dtype, kind):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(4, 6, 3, dtype=torch.float64, generator=generator) * 34 - 1
    points[..., 2] = 1.0
    outputs = torch.randn(4, 6, 32, 32, dtype=torch.float64, generator=generator).to(dtype)
    targets = gaussian_targets(points.cuda(), 32, 1.5, kind).cpu()
    assert (targets - gaussian_targets(points, 32, 1.5, kind)).abs().max() < 1e-12
    found = []
    for device in ("cuda", "cpu"):
        own = outputs.clone().to(device).requires_grad_()
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = map_loss(own, points.to(device), 1.5, kind)
        loss.sum().backward()
        found.append((loss.detach().cpu().double(), own.grad.cpu().double()))
    bound = 1e-12 if dtype == torch.float64 else 1e-5  # sums and roundings differ
    assert (found[0][0] - found[1][0]).abs().max() < bound
    assert (found[0][1] - found[1][1]).abs().max() < bound
