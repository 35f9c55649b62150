"""Models whose experts run as stand-ins of captured graphs."""

import copy

import pytest
from support.fake_cuda import FakeCuda
from support.graphs import FakeBackend, exact_expert, settled
from support.models import M, batch, build
from support.tape_backend import TapeBackend
from torch import nn

from hubpath_fast.executors.graphs import MIN_SEEN, GraphsExecutor
from hubpath_fast.executors.graphs.store import GraphStore


@pytest.fixture
def cuda(monkeypatch):
    return FakeCuda(monkeypatch)


@pytest.fixture
def make():
    """make(expert) -> a model whose experts run as fake graphs, of exact sizes unless others are
    given."""

    def build_with_graphs(expert=exact_expert, budget=None, backend=FakeBackend):
        model = build(GraphsExecutor(backend, budget))
        model.experts = nn.ModuleList(expert() for _ in range(M))
        return model

    return build_with_graphs


@pytest.fixture
def pair():
    """pair(expert) -> a model whose experts are replayed, and a sequential twin; in float64."""

    def make(expert, backend=TapeBackend, budget=None):
        twin = build("sequential")
        twin.experts = nn.ModuleList(expert() for _ in range(M))
        model = copy.deepcopy(twin.double())
        model.executor = GraphsExecutor(backend, budget)
        return model, twin

    return make


@pytest.fixture
def no_estimate(monkeypatch):
    """What graphs will take is not known beforehand."""
    monkeypatch.setattr(GraphStore, "_beyond_budget", lambda self: None)


@pytest.fixture
def trained(make):
    """trained(expert) -> such a model after enough steps for its experts to be captured, and the
    batch of each."""

    def train_some(expert=exact_expert, steps=MIN_SEEN, counts=None, budget=None):
        x, y = batch()
        return settled(make(expert, budget), x, y, steps, counts), x, y

    return train_some
