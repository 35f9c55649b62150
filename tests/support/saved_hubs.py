"""Hubs that are saved, and whether what is opened is what was saved, to the bit."""

from __future__ import annotations

from pathlib import Path

import torch

import hubpath_fast as hp

TINY, OTHER = "timm/test_resnet", "timm/test_efficientnet"
SIZE, OUTPUTS = 64, 3


def images(n: int = 6, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, SIZE, SIZE), generator=random, dtype=torch.uint8)


def hub(names=(TINY, OTHER), seed: int = 0, **options) -> hp.HubPathway:
    """Of random weights, in evaluation mode, with statistics that differ by layer."""
    torch.manual_seed(seed)
    settings = {"pretrained": False, "input_size": SIZE, "generator_width": 4, **options}
    model = hp.create_model(list(names), OUTPUTS, **settings)
    with torch.no_grad():
        learned = {id(p) for p in model.parameters()}
        for tensor in model.state_dict(keep_vars=True).values():
            if tensor.is_floating_point() and id(tensor) not in learned:
                tensor.mul_(1.0 + 0.1 * torch.rand(tensor.shape))
        for layer in (model.generator, model.aggregator):
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape))  # heads start at zero
    return model.eval()


@torch.no_grad()
def predictions(model: hp.HubPathway) -> torch.Tensor:
    return model(images())


def assert_same(found: hp.HubPathway, expected: hp.HubPathway) -> None:
    """Predictions, names and their order, values, memory layouts, what learns, and what is known
    of the experts: all to the bit."""
    assert torch.equal(predictions(found), predictions(expected))
    mine, saved = found.state_dict(), expected.state_dict()
    assert list(mine) == list(saved)
    for name, tensor in saved.items():
        assert torch.equal(mine[name], tensor), name
        assert mine[name].dtype == tensor.dtype, name
        assert mine[name].stride() == tensor.stride(), name
    for parts in ("named_parameters", "named_buffers"):
        one, two = dict(getattr(found, parts)()), dict(getattr(expected, parts)())
        assert list(one) == list(two)  # ties and buffers that no file keeps included
        for name, tensor in two.items():
            assert torch.equal(one[name], tensor), name
            assert one[name].requires_grad == tensor.requires_grad, name
    assert found.origin == expected.origin
    assert [*map(repr, found.experts)] == [*map(repr, expected.experts)]
    assert not any(module.training for module in found.modules())


def saved(model: hp.HubPathway, folder: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    return folder
