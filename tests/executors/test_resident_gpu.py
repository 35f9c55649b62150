"""Experts that rest in the host's memory, on a GPU."""

import pytest
import torch
from support import large_hub
from support.models import M, batch, build, train, without_dropout

from hubpath_fast.executors import ResidentExecutor

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def same_algorithms():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def pair(room, inner="auto"):
    mine, expected = (without_dropout(build("sequential")) for _ in range(2))
    mine.executor = ResidentExecutor(room, inner)
    return mine.to("cuda"), expected.to("cuda")


def asking(n, step):
    """Noise by which all samples go to two experts, of which at least one is new in each step."""
    eps = torch.zeros(n, M, device="cuda")
    eps[:, [step % M, (step + 1) % M]] = 1000
    return eps


def close(a, b):
    assert a.keys() == b.keys()
    for name in a:
        # Sums of atomic additions come in any order.
        torch.testing.assert_close(a[name].cpu(), b[name].cpu(), rtol=1e-4, atol=1e-5)


def test_a_model_that_moves_leaves_its_experts_in_the_hosts_memory_on_a_gpu():
    mine, _ = pair(2)
    mine.executor.settle(mine.experts)
    assert {p.device.type for p in mine.experts.parameters()} == {"cpu"}
    assert all(p.is_pinned() for p in mine.experts.parameters())
    assert {p.device.type for p in mine.generator.parameters()} == {"cuda"}


@pytest.mark.parametrize("inner", ["auto", "streams"])
def test_predictions_are_those_of_all_on_the_device_on_a_gpu(inner):
    mine, expected = (model.eval() for model in pair(2, inner))
    with torch.inference_mode():
        for step, n in enumerate([3, 1, 24, 2]):
            x = batch(n=n, seed=step, device="cuda")[0]
            found, right = (model(x, eps=asking(n, step)) for model in (mine, expected))
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)
    assert mine.executor_report().misses > M
    assert "copies to the device took" in str(mine.executor_report())


@pytest.mark.parametrize("inner", ["auto", "streams"])
def test_training_is_that_of_all_on_the_device_on_a_gpu(inner):
    mine, expected = pair(M, inner)
    close(train(mine, 4, "cuda"), train(expected, 4, "cuda"))
    for model in (mine, expected):
        for expert in model.experts:
            expert[:-1].requires_grad_(False)
    mine.executor = ResidentExecutor(3, inner)
    close(train(mine, 4, "cuda"), train(expected, 4, "cuda"))


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_state_travels_on_a_gpu(fused):
    mine, expected = pair(3)
    for model in (mine, expected):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        for step in range(8):
            x, y = batch(n=2, seed=step, device="cuda")
            optimizer.zero_grad()
            out = model(x, eps=asking(2, step)).prediction
            torch.nn.functional.cross_entropy(out, y).backward()
            optimizer.step()
    close(mine.state_dict(), expected.state_dict())
    assert mine.executor_report().misses > M


def test_a_saved_hub_is_opened_for_a_gpu(tmp_path):
    folder = large_hub.save_hub(tmp_path / "hub", 6)
    mine, expected = (large_hub.open_hub(folder, room).to("cuda").eval() for room in (4, None))
    x = large_hub.batch(large_hub.MANY, 0)[0].to("cuda")
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        torch.testing.assert_close(mine(x), expected(x), rtol=1e-5, atol=1e-6)
    mine.save_pretrained(tmp_path / "again")
    assert {p.device.type for p in mine.experts.parameters()} == {"cpu"}
