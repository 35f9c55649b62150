"""Steps of an agent as captured graphs: on a stand-in that replays operations, and on a GPU."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from support.graphs import FakeBackend
from support.tape_backend import TapeBackend

from hubpath_fast.executors.graphs.backend import CudaBackend
from hubpath_fast.tasks.atari import noisy
from hubpath_fast.tasks.atari.captured import (
    CapturedLearner,
    Staged,
    eager_because,
    make_learner,
)
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.hub import HubPolicy
from hubpath_fast.tasks.atari.learn import Batch, Learner
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.policy import SinglePolicy
from hubpath_fast.tasks.atari.settings import AtariSettings

A, Z, N, H = 3, 5, 6, 2  # actions, atoms, samples of a batch, frames of a state
SETTINGS = AtariSettings(game="alien", method="scratch", batch_size=N, atoms=Z, lr=1e-3)


@pytest.fixture(autouse=True)
def as_on_a_gpu(monkeypatch):
    """On the CPU a noisy layer keeps a weight from one forward pass to the next; no graph could."""
    monkeypatch.setattr(noisy, "_same", lambda *_: False)


def network():
    return RainbowNetwork(
        A, Z, hidden=8, history=H, frame_shape=(9, 9), patches=(2, 2), widths=(4, 6), noise_std=2.0
    )


def single():
    torch.manual_seed(0)
    return SinglePolicy(network(), make_atoms(Z, -10, 10))


def hub():
    torch.manual_seed(0)
    return HubPolicy([network(), network()], make_atoms(Z, -10, 10))


def batches(count, device="cpu", settings=SETTINGS, frame=(16, 4)):
    random = torch.Generator().manual_seed(1)
    n, shape = settings.batch_size, (settings.batch_size, H, *frame)
    for _ in range(count):
        states, following = (
            torch.randint(256, shape, generator=random).to(torch.uint8) for _ in "sn"
        )
        yield Batch(
            states,
            torch.randint(A, (n,), generator=random),
            torch.randn(n, generator=random),
            torch.rand(n, generator=random),
            following,
            torch.rand(n, generator=random),
        )


def pair(make=single, backend=TapeBackend, settings=SETTINGS, device="cpu"):
    """An eager learner and a captured one of the same policy and noise."""
    plain, captured = make(), make()
    return (
        Learner(plain.to(device), settings, torch.Generator().manual_seed(2)),
        CapturedLearner(captured.to(device), settings, torch.Generator().manual_seed(2), backend),
    )


def play(learner, steps, copied_at=5):
    """What the learner did in some steps: actions, and all that updates gave."""
    found = []
    torch.manual_seed(3)  # the pathways' noise is the device's
    for i, batch in enumerate(steps):
        learner.new_noise()
        action = learner.act(batch.states[:1])
        losses, norm = learner.update(batch)
        if i == copied_at:
            learner.copy_to_target()
        values = {"total": losses.total, "task": losses.task, "norm": norm, **losses.terms}
        found.append((action, {name: value.detach().cpu() for name, value in values.items()}))
    return found


def assert_same_learning(plain, captured, found, expected, **tolerance):
    tolerance = {"rtol": 0, "atol": 0} | tolerance
    assert [action for action, _ in found] == [action for action, _ in expected]
    for (_, mine), (_, right) in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right, **tolerance)
    state, right = captured.modules().state_dict(), plain.modules().state_dict()
    torch.testing.assert_close(state, right, **tolerance)
    averages, right = captured.optimizer.state_dict(), plain.optimizer.state_dict()
    torch.testing.assert_close(averages["state"], right["state"], **tolerance)
    assert torch.equal(plain.noise.get_state(), captured.noise.get_state())


@pytest.mark.parametrize("make", [single, hub])
def test_replays_learn_what_an_eager_learner_does(make):
    plain, captured = pair(make)
    found, expected = (play(learner, batches(12)) for learner in (captured, plain))
    assert len({action for action, _ in expected}) > 1
    assert_same_learning(plain, captured, found, expected)
    assert captured._backend.captures == 2
    assert captured.notes == []


def test_updates_without_actions_and_actions_without_updates():
    plain, captured = pair()
    for learner in (plain, captured):
        learner.found = []
        for i, batch in enumerate(batches(6)):
            if i != 2:  # the noise of the step before
                learner.new_noise()
            if i in (1, 2, 4):
                learner.found.append((learner.act(batch.states[:1]), {}))
            if i != 4:
                learner.found.append((0, {"task": learner.update(batch).losses.task}))
    assert_same_learning(plain, captured, captured.found, plain.found)


def test_a_learner_goes_on_from_what_was_loaded():
    plain, captured = pair()
    play(plain, batches(3))
    captured.modules().load_state_dict(plain.modules().state_dict())
    captured.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    captured.noise.set_state(plain.noise.get_state())
    found, expected = (play(learner, batches(4)) for learner in (captured, plain))
    assert_same_learning(plain, captured, found, expected)


class FailsAt(TapeBackend):
    """failing: which capture fails."""

    failing = 1

    def capture(self, function, pool):
        if self.captures + 1 == self.failing:
            function()
            raise RuntimeError("operation not permitted\nand more")
        return super().capture(function, pool)


@pytest.mark.parametrize("failing", [1, 2])  # acting, the update
def test_where_a_capture_fails_all_goes_on_eagerly(failing, monkeypatch):
    monkeypatch.setattr(FailsAt, "failing", failing)
    plain, captured = pair(backend=FailsAt)
    found, expected = (play(learner, batches(4)) for learner in (captured, plain))
    assert_same_learning(plain, captured, found, expected)
    assert captured.notes == [
        "steps are not captured as CUDA graphs, and slower so: a capture failed (RuntimeError: "
        "operation not permitted)"
    ]


def test_what_a_replay_gives_is_not_overwritten_by_the_next():
    _, captured = pair(backend=FakeBackend)
    first, second = (captured.update(batch).losses.task for batch in batches(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("method", "hub", "k", "reason"),
    [
        ("scratch", (), 2, None),
        ("finetune", ("a",), 2, None),
        ("hub", ("a", "b"), 2, None),
        ("hub", ("a", "b"), 1, "with K = 1 of 2 experts the host has to know how many states"),
        ("knowledge-flow", ("a", "b"), 2, "knowledge-flow changes its losses"),
        ("zoo-tuning", ("a", "b"), 2, "zoo-tuning changes its losses"),
    ],
)
def test_which_runs_are_captured(monkeypatch, method, hub, k, reason):
    settings = AtariSettings(game="alien", method=method, hub=hub, k=k)
    found = eager_because(settings)
    assert (found is None) == (reason is None)
    assert (found or "").startswith(reason or "")
    made = []
    for kind in ("Learner", "CapturedLearner"):
        monkeypatch.setattr(
            f"hubpath_fast.tasks.atari.captured.{kind}",
            lambda policy, settings, noise, kind=kind: (
                made.append(kind) or SimpleNamespace(notes=[])
            ),
        )
    on = {
        device: SimpleNamespace(
            parameters=lambda device=device: iter([SimpleNamespace(device=torch.device(device))])
        )
        for device in ("cpu", "cuda")
    }
    assert make_learner(on["cpu"], settings, None).notes == []
    notes = make_learner(on["cuda"], settings, None).notes
    assert made == ["Learner", "CapturedLearner" if reason is None else "Learner"]
    assert notes == [f"steps are not captured as CUDA graphs, and slower so: {found}"] * (
        reason is not None
    )


def test_staged_tensors_are_written_together_and_lie_apart():
    values = {"a": torch.arange(5, dtype=torch.uint8), "b": torch.tensor([3, -4]),
              "c": torch.tensor(0.5), "d": torch.empty(0)}  # fmt: skip
    staged = Staged(values, torch.device("cpu"))
    assert {name: (t.dtype, t.shape) for name, t in staged.tensors.items()} == {
        name: (t.dtype, t.shape) for name, t in values.items()
    }
    staged.write(values)
    staged.write({"b": torch.tensor([7, 8]), "a": None})
    expected = {**values, "b": torch.tensor([7, 8])}
    for name, tensor in staged.tensors.items():
        assert torch.equal(tensor, expected[name])
        place = tensor.storage_offset() * tensor.element_size()
        assert place % 256 == 0
    assert staged.tensors["b"].untyped_storage().data_ptr() == staged.memory.data_ptr()


@pytest.mark.gpu
@pytest.mark.parametrize("make", [single, hub])
def test_replays_learn_what_an_eager_learner_does_on_a_gpu(make):
    plain, captured = pair(make, CudaBackend, device="cuda")
    found, expected = (play(learner, batches(12)) for learner in (captured, plain))
    assert captured.notes == []
    # Kernels may be others under capture: roundings of float32, 6e-8, which a step of Adam, 1e-3 at
    # most, makes larger where a gradient is near zero.
    assert_same_learning(plain, captured, found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_its_action_and_its_losses_alone():
    _, captured = pair(hub, CudaBackend, device="cuda")
    steps = list(batches(4))
    play(captured, steps[:2])
    waits = []
    to = torch.Tensor.to
    torch.cuda.set_sync_debug_mode("error")
    try:
        captured.new_noise()
        with pytest.MonkeyPatch.context() as patch:

            def read(tensor, *args, **options):
                if args == ("cpu",) and tensor.is_cuda:
                    waits.append(tensor.shape)
                    torch.cuda.set_sync_debug_mode("default")
                found = to(tensor, *args, **options)
                torch.cuda.set_sync_debug_mode("error")
                return found

            patch.setattr(torch.Tensor, "to", read)
            captured.act(steps[2].states[:1])
            captured.update(steps[2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2
