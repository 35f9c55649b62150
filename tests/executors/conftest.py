"""Models whose experts run as stand-ins of captured graphs."""

import pytest
from support.fake_cuda import FakeCuda
from support.graphs import FakeBackend, settled
from support.models import M, batch, build
from torch import nn

from hubpath_fast.executors.graphs import MIN_SEEN, GraphsExecutor


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.fixture
def make():
    """make(expert) -> a model whose experts run as fake graphs."""

    def build_with_graphs(expert=None, budget=None, backend=FakeBackend):
        model = build(GraphsExecutor(backend, budget))
        if expert is not None:
            model.experts = nn.ModuleList(expert() for _ in range(M))
        return model

    return build_with_graphs


@pytest.fixture
def trained(make):
    """trained(expert) -> such a model after enough steps for its experts to be captured, and the
    batch of each."""

    def train_some(expert=None, steps=MIN_SEEN, counts=None, budget=None):
        x, y = batch()
        return settled(make(expert, budget), x, y, steps, counts), x, y

    return train_some
