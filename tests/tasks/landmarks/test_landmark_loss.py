"""The loss that draws its targets, against the plain one of maps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from hubpath_fast import HubPathwayLoss
from hubpath_fast import functional as HF
from hubpath_fast.model import PathwayOutput
from hubpath_fast.tasks.landmarks import gaussian_targets, map_loss


def plain_loss(outputs, points, sigma, kind):
    """From whole maps of targets."""
    targets = gaussian_targets(points, outputs.shape[2], sigma, kind)
    return ((outputs - targets) ** 2).flatten(1).mean(dim=1)


def batch(n=3, landmarks=4, size=16, dtype=torch.float64, seed=0):
    """Outputs, and points of which some lie outside and some have no weight."""
    generator = torch.Generator().manual_seed(seed)
    outputs = torch.randn(n, landmarks, size, size, dtype=dtype, generator=generator)
    points = torch.rand(n, landmarks, 3, dtype=torch.float64, generator=generator)
    points[..., :2] = (1.2 * points[..., :2] - 0.1) * size
    points[..., 2] = (points[..., 2] > 0.2).double()
    return outputs.requires_grad_(), points


@pytest.mark.parametrize("kind", ["subpixel", "published"])
@pytest.mark.parametrize("sigma", [1.0, 1.5])
def test_loss_and_gradient_are_the_plain_form(kind, sigma):
    outputs, points = batch()
    weight = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    loss = map_loss(outputs, points, sigma, kind)
    (gradient,) = torch.autograd.grad(loss @ weight, outputs)
    expected = plain_loss(outputs, points, sigma, kind)
    (expected_gradient,) = torch.autograd.grad(expected @ weight, outputs)
    assert loss.shape == (3,)
    assert (loss - expected).abs().max() < 1e-10
    assert (gradient - expected_gradient).abs().max() < 1e-10
    assert torch.autograd.gradcheck(
        lambda o: map_loss(o, points[:1, :2], sigma, kind),
        outputs[:1, :2, :5, :5].detach().clone().requires_grad_(),
    )


def test_maps_need_not_be_square():
    outputs = torch.zeros(1, 1, 3, 5, dtype=torch.float64)
    points = torch.tensor([[[4.5, 1.5, 1.0]]], dtype=torch.float64)  # outside of 3 x 3
    assert map_loss(outputs, points, 1.0) > 0.05


@pytest.mark.parametrize(("sigma", "expected"), [(1.0, 7.7e-4), (1.5, 1.73e-3)])
def test_the_loss_of_nothing_found(sigma, expected):
    """All zeros: pi sigma^2 / 4096 for landmarks inside; where a stuck training stays."""
    points = torch.tensor([[[30.2, 25.9, 1.0], [20.0, 40.4, 1.0]]])
    loss = map_loss(torch.zeros(1, 2, 64, 64), points, sigma)
    assert loss.item() == pytest.approx(expected, rel=0.01)


def test_nothing_of_a_maps_size_is_kept_beside_the_outputs():
    outputs, points = batch(n=8, landmarks=5, size=32)
    kept = []
    with saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = map_loss(outputs, points, 1.5)
    sizes = sorted(t.numel() for t in kept if t.data_ptr() != outputs.data_ptr())
    assert sizes == [points.numel()]
    assert any(t.data_ptr() == outputs.data_ptr() for t in kept)
    assert not [value for value in vars(loss.grad_fn).values() if isinstance(value, torch.Tensor)]
    loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_narrow_outputs_are_computed_in_float32(dtype, autocast):
    outputs, points = batch()
    narrow = outputs.detach().to(dtype).requires_grad_()
    expected = plain_loss(narrow.double(), points, 1.5, "subpixel")
    (expected_gradient,) = torch.autograd.grad(expected.sum(), narrow)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = map_loss(narrow, points.float(), 1.5)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert (loss.double() - expected).abs().max() < 1e-6  # bfloat16 would be off by 1e-2
    assert narrow.grad.dtype == dtype
    # One rounding at the end: to half the last place of the dtype, of each element.
    away = (narrow.grad.double() - expected_gradient.double()).abs()
    assert (away <= torch.finfo(dtype).eps * expected_gradient.double().abs() + 1e-7).all()


def test_float32_targets_of_float64_outputs():
    outputs, points = batch()
    points = points.float()
    away = map_loss(outputs, points, 1.0) - plain_loss(outputs, points.double(), 1.0, "subpixel")
    assert away.abs().max() < 1e-10


def test_without_gradients_and_without_samples():
    outputs, points = batch()
    with torch.no_grad():
        loss = map_loss(outputs, points, 1.0)
    assert not loss.requires_grad
    empty = torch.zeros(0, 4, 16, 16, requires_grad=True)
    loss = map_loss(empty, torch.zeros(0, 4, 3), 1.0)
    loss.sum().backward()
    assert (loss.shape, empty.grad.shape) == ((0,), (0, 4, 16, 16))


def test_a_second_derivative():
    outputs, points = batch(n=2, landmarks=2, size=4)
    assert torch.autograd.gradgradcheck(lambda o: map_loss(o, points, 1.0), outputs)
    loss = map_loss(outputs, points, 1.0).sum()
    (gradient,) = torch.autograd.grad(loss, outputs, create_graph=True)
    (second,) = torch.autograd.grad(gradient.square().sum(), outputs)
    share = 2 / outputs[0].numel()
    assert (second - 2 * share * gradient).abs().max() < 1e-12


def test_the_losses_of_a_pathway():
    """Targets [N, L, 4] go through the criterion as they are, a row gets its sample's points."""
    generator = torch.Generator().manual_seed(3)
    n, experts, k, landmarks, size = 4, 3, 2, 5, 8
    clean = torch.randn(n, experts, dtype=torch.float64, generator=generator)
    routing = HF.noisy_topk(clean, torch.zeros_like(clean), k)
    prediction, _ = batch(n, landmarks, size)
    rows, _ = batch(n * k, landmarks, size, seed=5)
    points = torch.rand(n, landmarks, 4, dtype=torch.float64, generator=generator) * size
    points[..., 2] = 1.0
    criterion = HubPathwayLoss(lambda outputs, y: map_loss(outputs, y[..., :3], 1.0))
    losses = criterion(PathwayOutput(prediction, rows, routing), points)
    losses.total.backward()
    sample = routing.rows.long() // k
    task = plain_loss(prediction, points[..., :3], 1.0, "subpixel")
    exploit = plain_loss(rows, points[sample][..., :3], 1.0, "subpixel")
    assert losses.task.item() == pytest.approx(task.mean().item(), abs=1e-12)
    assert losses.exploit.item() == pytest.approx(exploit.sum().item() / n, abs=1e-12)
    (expected,) = torch.autograd.grad(exploit.sum() / n, rows)
    assert (rows.grad - expected).abs().max() < 1e-10


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda o, p: map_loss(o[0], p, 1.0), r"outputs: expected maps \[N, L, h, w\]"),
        (lambda o, p: map_loss(o, p[:2], 1.0), r"points: expected \[3, 4, 3\].*got \[2, 4, 3\]"),
        (lambda o, p: map_loss(o, p[..., :2], 1.0), r"points: expected \[3, 4, 3\]"),
        (lambda o, p: map_loss(o[..., :0], p, 1.0), "outputs: expected maps with cells"),
        (lambda o, p: map_loss(o, p.long(), 1.0), "points: expected a float dtype"),
        (lambda o, p: map_loss(o, p, 0.0), "sigma: expected a number of cells > 0"),
        (lambda o, p: map_loss(o, p, "1"), "sigma: expected a number of cells > 0, got '1'"),
        (lambda o, p: map_loss(o, p, 1.0, "cell"), "kind: expected 'subpixel' or 'published'"),
        (lambda o, p: map_loss(o, p.requires_grad_(), 1.0), "points: requires a gradient"),
    ],
)
def test_what_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call(*batch())
