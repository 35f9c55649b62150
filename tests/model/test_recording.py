"""A graph recorded from one batch would split every later one alike: it is refused, by whatever
recorder; what does not record, and the parts by themselves, work."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast import functional as HF

# The recorders say of themselves that they are old, and of the checks that they are constants.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]


@pytest.fixture(autouse=True)
def _autocast_cache():
    """torch.onnx.export turns autocast's cache off, and leaves it so where the model raises."""
    before = torch.is_autocast_cache_enabled()
    yield
    torch.set_autocast_cache_enabled(before)


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.clean, self.noise = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x):
        return self.clean(x), self.noise(x)


class Larger(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.inner(x))


def hub():
    torch.manual_seed(0)
    return hp.HubPathway([nn.Linear(8, 3) for _ in range(4)], Generator(), k=2, num_outputs=3)


X = torch.randn(32, 8, generator=torch.Generator().manual_seed(1))


def make_fx(model):
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model)(X)


RECORDERS = {
    "jit.trace": lambda model, path: torch.jit.trace(model, X, check_trace=False),
    "jit.script": lambda model, path: torch.jit.script(model),
    "export": lambda model, path: torch.export.export(model, (X,)),
    "export, strict": lambda model, path: torch.export.export(model, (X,), strict=True),
    "onnx": lambda model, path: torch.onnx.export(model, (X,), path / "model.onnx", dynamo=False),
    "fx": lambda model, path: torch.fx.symbolic_trace(model),
    "make_fx": lambda model, path: make_fx(model),
}
MODELS = {
    "evaluation": lambda: hub().eval(),
    "training": hub,
    "inside another": lambda: Larger(hub()).eval(),
}


@pytest.mark.parametrize("recorder", RECORDERS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_is_not_recorded(kind, recorder, tmp_path):
    model = MODELS[kind]()
    message = r"HubPathway cannot be recorded as a fixed graph .* model\.state_dict"
    with pytest.raises((ValueError, RuntimeError), match=message):
        RECORDERS[recorder](model, tmp_path)
    assert model(X) is not None  # and it works afterwards


def test_dynamo_compiles_a_model_as_before():
    model = hub().eval()
    # Fixed shapes: with those that change, torch 2.11 fails within itself on sympy 1.14.
    compiled = torch.compile(model, backend="aot_eager", dynamic=False)
    for x in (X, X.flip(1)):  # routed otherwise
        torch.testing.assert_close(compiled(x), model(x))


def test_the_parts_are_recorded_by_themselves():
    model = hub().eval()
    other = X.flip(1)
    for part in (model.generator, model.experts[0], hp.LinearAggregator(2, 4)):
        traced = torch.jit.trace(part, X)
        torch.testing.assert_close(traced(other), part(other))
    traced = copy.deepcopy(model)
    for i, expert in enumerate(traced.experts):
        traced.experts[i] = torch.jit.trace(expert, X)
    torch.testing.assert_close(traced(other), model(other))


class Operations(nn.Module):
    def forward(self, clean, x):
        routing = HF.noisy_topk(clean, clean, 2)
        return HF.combine(HF.gather(x, routing), routing), routing.weights


def test_traced_operations_route_each_batch_anew():
    """They are vectorised; only the counts, which the host reads, must not be recorded."""
    operations = Operations()
    traced = torch.jit.trace(operations, (torch.randn(16, 4), torch.randn(16, 3)))
    for n in (16, 7):
        clean, x = torch.randn(n, 4), torch.randn(n, 3)
        for found, expected in zip(traced(clean, x), operations(clean, x), strict=True):
            assert torch.equal(found, expected)

    def own_loop(clean, x):
        routing = HF.noisy_topk(clean, clean, 2)
        return torch.cat(HF.gather(x, routing).split(routing.counts()))

    with pytest.raises(ValueError, match=r"counts: torch\.jit\.trace would keep"):
        torch.jit.trace(own_loop, (torch.randn(16, 4), torch.randn(16, 3)))
