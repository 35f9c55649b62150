"""The noise of training steps: of (seed, step, place in the batch), and of nothing else."""

from __future__ import annotations

import pytest
import torch
from support.training import make
from torch import nn

from hubpath_fast import functional as HF
from hubpath_fast.model import HubPathway, PathwayGenerator
from hubpath_fast.tasks import Classification
from hubpath_fast.training import PathwayObjective, Reporting
from hubpath_fast.training.noise import step_noise

M, C, B, STEPS = 3, 2, 12, 4
TASK = Classification(("a", "b"))


class Stream:
    """The batch of each step, drawn from its number."""

    def batches(self, start_step):
        for step in range(start_step, STEPS):
            generator = torch.Generator().manual_seed(step)
            images = torch.rand(B, 3, 8, 8, generator=generator, dtype=torch.float64)
            yield images, torch.randint(0, C, (B,), generator=generator)


class Disturbing(nn.Module):
    """Draws from torch's generator, if told to, as often as it has rows."""

    def __init__(self, draws):
        super().__init__()
        self.linear, self.draws = nn.Linear(192, C), draws

    def forward(self, x):
        torch.rand(len(x) if self.draws else 0)
        return self.linear(x.flatten(1))


def run(out_dir, monkeypatch, accumulate=1, seed=0, disturb=False):
    """The noise [B, M] that each step took, in the order of the batch, and the model."""
    torch.manual_seed(7)
    experts = [Disturbing(disturb) for _ in range(M)]
    model = HubPathway(experts, PathwayGenerator(M, width=4, stride=2), k=2).double()
    taken, route = [], HF.noisy_topk

    def watched(clean, noise, k, eps, *rest):
        taken.append(eps.normals(*clean.shape) if isinstance(eps, HF.NoiseDraw) else eps)
        return route(clean, noise, k, eps, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(HF, "noisy_topk", watched)
        make(
            model, out_dir, Stream(), PathwayObjective(TASK.criterion(0.5)), task=TASK, seed=seed,
            steps=STEPS, batch_size=B, accumulate=accumulate, lr_expert=1e-3, lr_router=1e-2,
            reporting=Reporting(None, "", ["a", "b", "c"], False, False),
        ).fit()  # fmt: skip
    assert model.noise_draw is None  # a loop of one's own draws from torch's generator again
    assert len(taken) == STEPS * accumulate
    steps = [torch.cat(taken[i : i + accumulate]) for i in range(0, len(taken), accumulate)]
    return steps, model


def test_micro_batches_and_torchs_generator_do_not_change_the_noise(tmp_path, monkeypatch):
    expected, model = run(tmp_path / "1", monkeypatch)
    for name, options in {"3": {"accumulate": 3}, "5": {"accumulate": 5}}.items():
        steps, _ = run(tmp_path / name, monkeypatch, **options)
        assert all(map(torch.equal, steps, expected))
    steps, other = run(tmp_path / "drawing", monkeypatch, disturb=True)
    assert all(map(torch.equal, steps, expected))
    mine, its = dict(model.named_parameters()), dict(other.named_parameters())
    for a, b in zip(mine.values(), its.values(), strict=True):
        assert torch.equal(a, b)


def test_each_step_and_seed_has_noise_of_its_own(tmp_path, monkeypatch):
    steps = run(tmp_path / "0", monkeypatch)[0] + run(tmp_path / "1", monkeypatch, seed=1)[0]
    values = torch.cat(steps).flatten()
    assert len(values.unique()) == values.numel() == 2 * STEPS * B * M


def test_the_noise_of_a_rank_is_its_part_of_the_batch():
    model = HubPathway([nn.Flatten(), nn.Flatten()], PathwayGenerator(2), k=1, num_outputs=192)
    with step_noise(model, seed=3, step=9, first=0):
        whole = model.noise_draw.normals(8, 2)
    with step_noise(model, seed=3, step=9, first=5):
        assert torch.equal(model.noise_draw.normals(3, 2), whole[5:])


def test_noise_goes_back_to_what_it_was_and_other_models_have_none():
    model = HubPathway([nn.Flatten(), nn.Flatten()], PathwayGenerator(2), k=1, num_outputs=192)
    model.noise_draw = own = HF.NoiseDraw(5)
    with step_noise(model, 0, 0, 0):
        assert model.noise_draw != own
    assert model.noise_draw is own
    with pytest.raises(RuntimeError, match="lost"), step_noise(model, 0, 0, 0):
        raise RuntimeError("lost")
    assert model.noise_draw is own
    single = nn.Linear(2, 2)
    with step_noise(single, 0, 0, 0):
        assert not hasattr(single, "noise_draw")


def test_a_model_draws_as_its_noise_draw_says_in_training_mode_alone():
    model = HubPathway([nn.Flatten(), nn.Flatten()], PathwayGenerator(2), k=2, num_outputs=192)
    x, draw = torch.rand(6, 3, 8, 8), HF.NoiseDraw(11, 4)
    silent = model.route(x, noisy=False)
    given = model.route(x, draw.normals(6, 2).float())
    model.noise_draw = draw
    assert torch.equal(model.route(x).weights, given.weights)
    assert torch.equal(model(x).routing.weights, given.weights)
    assert torch.equal(model.route(x, noisy=False).weights, silent.weights)
    model.eval()
    assert torch.equal(model.route(x).weights, silent.weights)
    assert torch.equal(model.route(x, noisy=True).weights, given.weights)
    assert torch.equal(model.route(x, draw).weights, given.weights)


def test_a_compiled_model_draws_the_same_at_every_step():
    experts = [nn.Sequential(nn.Flatten(), nn.Linear(192, C)) for _ in range(M)]
    model = HubPathway(experts, PathwayGenerator(M), k=2, executor="sequential").double()
    compiled, x = torch.compile(model, backend="eager"), torch.rand(6, 3, 8, 8).double()
    for step in range(3):
        with step_noise(model, 0, step, 4 * step):
            assert torch.equal(compiled(x).routing.weights, model(x).routing.weights)
