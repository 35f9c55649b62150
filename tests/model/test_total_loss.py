"""functional.total_loss: what it takes, what it refuses; its kernels are tested with the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hubpath_fast import functional as HF

N, M, C = 6, 3, 5
random = torch.Generator().manual_seed(0)
X = torch.randn(N, C, generator=random, dtype=torch.float64)
MAPS = torch.randn(N, C, 2, 3, generator=random, dtype=torch.float64)
Y = torch.randint(C, (N,), generator=random)
MEAN = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
EXPLOIT = torch.tensor(0.7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (X, Y),
        (X, X.softmax(dim=1)),
        (MAPS, torch.randint(C, (N, 2, 3), generator=random)),
        (MAPS, MAPS.softmax(dim=1)),
    ],
    ids=["classes", "probabilities", "maps", "maps of probabilities"],
)
def test_the_losses_and_their_sum(prediction, target):
    total, task, explore, losses = HF.total_loss(prediction, target, MEAN, EXPLOIT, 0.4, 0.1)
    expected = F.cross_entropy(prediction, target, reduction="none", label_smoothing=0.1)
    expected = expected.flatten(1).mean(1) if prediction.dim() > 2 else expected
    torch.testing.assert_close(losses, expected, rtol=1e-14, atol=0)
    assert task.item() == pytest.approx(expected.mean().item(), rel=1e-14)
    assert explore.item() == pytest.approx((MEAN * MEAN.log()).sum().item(), rel=1e-14)
    assert total.item() == pytest.approx((task + 0.4 * explore + EXPLOIT).item(), rel=1e-14)


def test_half_precision_is_computed_in_float32():
    half = X.bfloat16()
    found = HF.total_loss(half, Y, MEAN.float(), EXPLOIT.float())
    wide = HF.total_loss(half.float(), Y, MEAN.float(), EXPLOIT.float())
    assert all(map(torch.equal, found, wide))
    assert all(result.dtype == torch.float32 for result in found)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("other", ["mean", "exploit"])
def test_results_are_float32_or_float64_whatever_has_another_dtype(other, dtype, backend, device):
    given = {"prediction": X, "mean": MEAN, "exploit": EXPLOIT}
    given = {name: value.float().to(device) for name, value in given.items()}
    given[other] = given[other].to(dtype)
    found = HF.total_loss(target=Y.to(device), explore=0.4, backend=backend, **given)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    assert [result.dtype for result in found] == 4 * [compute]
    wide = {name: value.to(compute) for name, value in given.items()}
    expected = HF.total_loss(target=Y.to(device), explore=0.4, backend="torch", **wide)
    # Sums of at most six terms of about 1, each rounded a few times.
    torch.testing.assert_close(found, expected, rtol=0, atol=32 * torch.finfo(compute).eps)


def test_the_exploration_loss_of_half_precision_is_computed_in_float32():
    mean = MEAN.half()
    found = HF.exploration_loss(mean)
    assert found.dtype == torch.float32
    assert found.item() == HF.exploration_loss(mean.float()).item()
    assert HF.exploration_loss(MEAN).dtype == torch.float64


def test_each_loss_reaches_its_own():
    x, mean, exploit = (t.clone().requires_grad_() for t in (X, MEAN, EXPLOIT))
    _, task, explore, losses = HF.total_loss(x, Y, mean, exploit)
    for loss, reached in ((task, x), (explore, mean), (losses.sum(), x)):
        found = torch.autograd.grad(loss, (x, mean, exploit), retain_graph=True, allow_unused=True)
        assert [g is not None for g in found] == [t is reached for t in (x, mean, exploit)]


GOOD = {"prediction": X, "target": Y, "mean": MEAN, "exploit": EXPLOIT}


@pytest.mark.parametrize(
    ("message", "wrong"),
    [
        ("prediction: expected float logits", {"prediction": Y}),
        ("target: expected shape", {"target": Y[1:]}),
        ("target: class 5 is out of range", {"target": Y + C - Y.max()}),
        ("mean: expected a float vector", {"mean": EXPLOIT}),
        ("exploit: expected a float scalar", {"exploit": MEAN}),
        ("mean: expected a float vector .* M >= 1", {"mean": MEAN[:0]}),
        ("label_smoothing: expected a number", {"label_smoothing": 1.5}),
        (r"label_smoothing: .* \[0, 1\], got nan", {"label_smoothing": float("nan")}),
        (r"label_smoothing: .* got '0.1'", {"label_smoothing": "0.1"}),
        ("explore: expected a finite weight >= 0, got -1", {"explore": -1}),
        ("explore: .* got nan", {"explore": float("nan")}),
        ("explore: .* got inf", {"explore": float("inf")}),
        ("explore: .* got True", {"explore": True}),
        ("explore: .* got '1'", {"explore": "1"}),
        (r"explore: .* got a tensor; give its number, \.item\(\)", {"explore": EXPLOIT}),
        (r"prediction: empty batch, shape \[0, 5\]", {"prediction": X[:0], "target": Y[:0]}),
        ("prediction: empty batch", {"prediction": X[:0], "target": X[:0].softmax(1)}),
        (
            r"prediction: empty samples, shape \[6, 5, 2, 0\]",
            {"prediction": MAPS[..., :0], "target": torch.zeros(N, 2, 0, dtype=torch.int64)},
        ),
        ("prediction: empty samples", {"prediction": X[:, :0]}),
        ("mean: is on meta, the prediction on cpu", {"mean": MEAN.to("meta")}),
        ("backend: .* maps or of class prob", {"target": X.softmax(1), "backend": "triton"}),
        ("backend: expected None or one of", {"backend": "cuda"}),
    ],
)
def test_what_does_not_fit_is_named(message, wrong):
    with pytest.raises(ValueError, match=message):
        HF.total_loss(**GOOD | wrong)


def test_ignored_samples_add_nothing_even_where_all_are():
    total, task, explore, losses = HF.total_loss(X, torch.full_like(Y, -100), MEAN, EXPLOIT, 0.4)
    assert [task.item(), *losses.tolist()] == (1 + N) * [0.0]
    assert total.item() == pytest.approx((0.4 * explore + EXPLOIT).item(), rel=1e-14)


def test_numpys_numbers_are_numbers():
    found = HF.total_loss(X, Y, MEAN, EXPLOIT, np.float32(0.5), np.float64(0.25))
    assert all(map(torch.equal, found, HF.total_loss(X, Y, MEAN, EXPLOIT, 0.5, 0.25)))


def test_the_checks_are_traced_by_compile():
    """Also where a lambda that changes has become an input of the traced program."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def total(prediction, explore):
        return HF.total_loss(prediction, Y, MEAN, EXPLOIT, explore, 0.1)[0]

    for explore in (0.5, 0.25, 0.75):
        expected = HF.total_loss(X, Y, MEAN, EXPLOIT, explore, 0.1)[0].item()
        assert total(X, explore).item() == pytest.approx(expected, rel=1e-14)
