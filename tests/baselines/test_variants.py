"""Generators that choose without looking, and the losses left out, against what they promise."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hubpath_fast import HubPathway, HubPathwayLoss, PathwayGenerator
from hubpath_fast.baselines import Noiseless, RandomGenerator, TaskGenerator


def hub(generator, k=2, experts=4):
    torch.manual_seed(0)
    return HubPathway([nn.Linear(6, 3) for _ in range(experts)], generator, k=k, num_outputs=3)


class TestRandomGenerator:
    def test_k_different_experts_with_equal_weights(self):
        routing = hub(RandomGenerator(4, 2)).train().route(torch.zeros(500, 6))
        assert routing.weights.unique().tolist() == [0.5]
        assert (routing.experts[:, 0] != routing.experts[:, 1]).all()
        # Each is drawn with probability 1/2: 250 +- 11.2, so 60 is more than five deviations.
        assert all(abs(count - 250) < 60 for count in routing.counts())

    def test_training_draws_again_and_evaluation_repeats(self):
        model, x = hub(RandomGenerator(4, 1), k=1), torch.zeros(64, 6)
        first, second = model.route(x).experts, model.route(x).experts
        assert (first != second).any()
        model.eval()
        state = torch.get_rng_state()
        assert torch.equal(model.route(x).experts, model.route(x).experts)
        assert torch.equal(state, torch.get_rng_state())

    def test_training_follows_the_seed(self):
        model, x = hub(RandomGenerator(4, 2)), torch.zeros(64, 6)
        drawn = []
        for _ in range(2):
            torch.manual_seed(5)
            drawn.append(model.route(x).experts)
        assert torch.equal(*drawn)

    def test_gradients_are_finite(self):
        model = hub(RandomGenerator(4, 2))
        HubPathwayLoss()(model(torch.randn(8, 6)), torch.arange(8) % 3).total.backward()
        assert all(p.grad.isfinite().all() for p in model.experts.parameters())

    def test_k_out_of_range(self):
        with pytest.raises(ValueError, match=r"k: expected an integer in 1..4 .* got 5"):
            RandomGenerator(4, 5)


class TestTaskGenerator:
    def test_all_samples_share_one_learned_route(self):
        generator = TaskGenerator(4)
        with torch.no_grad():
            generator.clean.copy_(torch.tensor([0.0, 3.0, 1.0, 2.0]))
        routing = hub(generator).eval().route(torch.randn(9, 6))
        assert routing.experts.tolist() == [[1, 3]] * 9
        p = F.softmax(torch.tensor([0.0, 3.0, 1.0, 2.0]), dim=0)
        torch.testing.assert_close(routing.weights[0], p[[1, 3]])

    def test_it_learns(self):
        model = hub(TaskGenerator(4))
        HubPathwayLoss()(model(torch.randn(8, 6)), torch.arange(8) % 3).total.backward()
        assert model.generator.clean.grad.abs().sum() > 0
        assert model.generator.noise.grad.abs().sum() > 0


class TestNoiseless:
    def test_training_routes_like_evaluation(self):
        torch.manual_seed(0)
        generator = PathwayGenerator(4, width=4).eval()  # BatchNorm would tell the modes apart
        nn.init.normal_(generator.clean.weight)
        x = torch.rand(16, 3, 16, 16)
        model = HubPathway([nn.Identity()] * 4, Noiseless(generator), nn.Identity(), k=2)
        model.training = True
        noiseless = model.route(x)
        clean = F.softmax(generator(x)[0], dim=1)
        assert torch.equal(noiseless.weights, clean.topk(2, dim=1).values)
        assert torch.equal(noiseless.mean, clean.mean(dim=0))


class TestWithoutExploit:
    def test_the_loss_is_task_and_explore(self):
        torch.manual_seed(1)
        model, y = hub(TaskGenerator(4)), torch.arange(8) % 3
        x, eps = torch.randn(8, 6), torch.randn(8, 4)
        criterion = HubPathwayLoss(explore=0.7, exploit=False)
        assert not criterion.can_fuse
        losses = criterion(model(x, eps), y)
        whole = HubPathwayLoss(explore=0.7)(model(x, eps), y)
        assert losses.exploit.item() == 0
        torch.testing.assert_close(losses.total, whole.task + 0.7 * whole.explore)
        torch.testing.assert_close(whole.total - whole.exploit, losses.total)
