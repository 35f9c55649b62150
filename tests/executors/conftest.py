"""Models whose experts run as stand-ins of captured graphs."""

import pytest
from support.graphs import FakeBackend
from support.models import M, build
from torch import nn

from hubpath_fast.executors.graphs import GraphsExecutor


@pytest.fixture
def make():
    """make(expert) -> a model whose experts run as fake graphs."""

    def build_with_graphs(expert=None, budget=None):
        model = build(GraphsExecutor(FakeBackend, budget))
        if expert is not None:
            model.experts = nn.ModuleList(expert() for _ in range(M))
        return model

    return build_with_graphs
