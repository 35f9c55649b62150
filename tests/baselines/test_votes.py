"""The oracle against small cases worked out by hand, and single models against their own parts."""

import torch

from hubpath_fast.baselines import SingleModel, oracle
from hubpath_fast.hub import build_experts
from hubpath_fast.tasks import Classification

# Three models, four samples, three classes.
PROBABILITIES = torch.tensor(
    [
        [[0.9, 0.1, 0.0], [0.4, 0.6, 0.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7]],
        [[0.4, 0.6, 0.0], [0.4, 0.6, 0.0], [0.0, 0.9, 0.1], [0.1, 0.8, 0.1]],
        [[0.4, 0.6, 0.0], [1.0, 0.0, 0.0], [0.0, 0.4, 0.6], [0.3, 0.3, 0.4]],
    ]
)


def test_the_oracle_is_right_where_any_model_is():
    task = Classification(("a", "b", "c"))
    assert oracle(task, PROBABILITIES, torch.tensor([0, 2, 2, 0])).tolist() == [1, 0, 1, 0]


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
