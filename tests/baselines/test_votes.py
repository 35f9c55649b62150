"""Votes against small cases worked out by hand, and single models against their own parts."""

import torch

from hubpath_fast.baselines import SingleModel, best_k, hard_vote, oracle, soft_vote
from hubpath_fast.hub import build_experts

# Three models, four samples, three classes.
PROBABILITIES = torch.tensor(
    [
        [[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
        [[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.0, 0.9, 0.1], [0.1, 0.8, 0.1]],
        [[0.4, 0.6, 0.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.3, 0.3, 0.4]],
    ]
)


def test_soft_vote_takes_the_largest_mean():
    """Means of sample 0: 1.7/3 and 1.3/3; of sample 1: 1.8/3, 1.2/3; of 2: .5, 1.6, .9; of 3: .5,
    1.3, 1.2."""
    assert soft_vote(PROBABILITIES).tolist() == [0, 0, 1, 1]


def test_hard_vote_counts_ballots_and_breaks_ties_by_the_mean():
    """Ballots: sample 0: 0,1,1; sample 1: 1,1,0; sample 2: 0,1,2, a tie; sample 3: 2,1,2."""
    assert hard_vote(PROBABILITIES).tolist() == [1, 1, 1, 2]


def test_a_strong_mean_never_overturns_a_majority():
    """Two models at 0.34 against one at 1.0."""
    probabilities = torch.tensor([[[0.34, 0.33, 0.33]], [[0.34, 0.33, 0.33]], [[0.0, 1.0, 0.0]]])
    assert hard_vote(probabilities).tolist() == [0]
    assert soft_vote(probabilities).tolist() == [1]


def test_the_oracle_is_right_where_any_model_is():
    assert oracle(PROBABILITIES, torch.tensor([0, 2, 2, 0])).tolist() == [True, False, True, False]


def test_best_k_prefers_the_lowest_index_among_equals():
    assert best_k([0.5, 0.9, 0.5, 0.9, 0.1], 3) == [1, 3, 0]


def test_a_single_model_takes_bytes_and_floats_alike():
    torch.manual_seed(0)
    [expert] = build_experts(["test_resnet"], 4, pretrained=False, input_size=32)
    model = SingleModel(expert).eval()
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(images)
        normalised = (images / 255 - torch.tensor(expert.mean).view(3, 1, 1)) / torch.tensor(
            expert.std
        ).view(3, 1, 1)
        assert torch.equal(logits, expert.module(normalised))
        assert torch.equal(logits, model(images / 255))
