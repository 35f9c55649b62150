"""Models whose experts run as stand-ins of captured graphs."""

import pytest
from support.graphs import FakeBackend
from support.models import M, build
from torch import nn

from hubpath_fast.executors.graphs.executor import GraphsExecutor
from hubpath_fast.model import pathway


@pytest.fixture
def make(monkeypatch):
    """make(expert) -> a model whose experts run as fake graphs."""

    def choose(asked, device, num_experts):
        return "graphs" if asked == "auto" else asked, ()

    monkeypatch.setattr(pathway, "choose", choose)

    def build_with_graphs(expert=None, budget=None):
        model = build()
        if expert is not None:
            model.experts = nn.ModuleList(expert() for _ in range(M))
        model._running = GraphsExecutor(FakeBackend, budget)
        return model

    return build_with_graphs
