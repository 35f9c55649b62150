"""When a captured graph still fits its expert."""

from functools import partial

import pytest
import torch
from support.models import batch, conv_expert
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs.signature import Signature
from hubpath_fast.executors.precision import RowPrecision
from hubpath_fast.executors.rows import RowSource


def source(dtype=torch.float32, requires_grad=False):
    x, _ = batch()
    routing = hp.functional.noisy_topk(torch.zeros(24, 4), torch.zeros(24, 4), 1)
    x.requires_grad_(requires_grad)
    return RowSource(x, routing, None, None, dtype, torch.contiguous_format, RowPrecision())


def test_training_changes_nothing():
    expert, rows = conv_expert(), source()
    taken = Signature(expert, rows)
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        expert(rows.x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert taken.holds(expert, rows)


def test_equal_settings_in_new_objects_hold():
    expert, rows = conv_expert(), source()
    taken = Signature(expert, rows)
    for _ in range(2):
        expert[3].p = float(str(expert[3].p))
        expert[0].stride = (*expert[0].stride,)
        assert taken.holds(expert, rows)


class Remembers(nn.Module):
    """Keeps what a step left, as some layers do for looking at it later."""

    def __init__(self):
        super().__init__()
        self.layer, self.seen = nn.Linear(3, 3), torch.zeros(1)

    def forward(self, x):
        self.seen = self.layer(x)
        return self.seen


def test_what_a_layer_keeps_of_a_step_changes_nothing_and_what_it_is_given_does():
    expert, rows = Remembers(), source()
    taken = Signature(expert, rows)
    expert(torch.rand(2, 3))
    taken.ran()
    for _ in range(2):
        expert(torch.rand(2, 3))
        assert taken.holds(expert, rows)
    expert.layer.mask = torch.ones(3)
    assert not taken.holds(expert, rows)
    taken = Signature(expert, rows)
    expert(torch.rand(2, 3))
    taken.ran()
    assert taken.holds(expert, rows)
    expert.layer.mask = torch.ones(3)  # an equal one, but elsewhere
    assert not taken.holds(expert, rows)


def test_a_weight_that_each_step_moves_never_holds():
    class MaxNorm(nn.Linear):
        def forward(self, x):
            self.weight.data = torch.renorm(self.weight.data, 2, 0, 0.3)
            return super().forward(x)

    expert, rows = MaxNorm(3, 3), source()
    taken = Signature(expert, rows)
    expert(torch.rand(2, 3))
    taken.ran()
    assert not taken.holds(expert, rows)


def rename_setting(expert):
    del expert[3].p
    expert[3].rate = 0.25


def clone(weight):
    return nn.Parameter(weight.detach().clone())


CHANGES = {
    # As ``load_state_dict(..., assign=True)`` and ``torch.func.functional_call`` do.
    "same memory": lambda e: setattr(e[0], "weight", nn.Parameter(e[0].weight.detach())),
    "turned": lambda e: setattr(e[6].weight, "data", e[6].weight.data[:6, :6].t()),
    "narrowed": lambda e: setattr(e[0].weight, "data", e[0].weight.data[:4]),
    "storage": lambda e: setattr(e[0].weight, "data", e[0].weight.data.clone()),
    "parameter": lambda e: setattr(e[0], "weight", clone(e[0].weight)),
    # Past ``__setattr__``, as some tools do.
    "hidden": lambda e: e[0]._parameters.update(weight=clone(e[0].weight)),
    "buffer": lambda e: setattr(e[1], "running_mean", torch.zeros(4)),
    "buffer gone": lambda e: setattr(e[1], "running_mean", None),
    "frozen": lambda e: e[0].bias.requires_grad_(False),
    "mode": lambda e: e[1].eval(),
    "rate": lambda e: setattr(e[3], "p", 0.5),
    "tuple": lambda e: setattr(e[0], "stride", (2, 2)),
    "other type": lambda e: setattr(e[0], "stride", 2),
    "dtype": lambda e: setattr(e[2], "kind", torch.float16),
    "size": lambda e: setattr(e[2], "size", torch.Size([3])),
    "partial": lambda e: setattr(e[2], "act", partial(torch.relu)),
    "none": lambda e: setattr(e[1], "momentum", None),
    "function": lambda e: setattr(e[2], "act", torch.relu),
    "new setting": lambda e: setattr(e[2], "slope", 0.1),
    "renamed setting": rename_setting,
    "layer": lambda e: e.__setitem__(2, nn.Tanh()),
    "more layers": lambda e: e.append(nn.Identity()),
    "hook": lambda e: e[2].register_forward_hook(lambda *_: None),
    "hook of a parameter": lambda e: e[0].weight.register_hook(lambda gradient: None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_expert_no_longer_fits(name):
    expert, rows = conv_expert(), source()
    expert[2].kind, expert[2].act, expert[2].size = torch.bfloat16, partial(torch.relu), None
    taken = Signature(expert, rows)
    assert taken.holds(expert, rows)
    CHANGES[name](expert)
    assert not taken.holds(expert, rows)


def test_another_expert_precision_or_kind_of_rows_does_not_fit():
    expert, rows = conv_expert(), source()
    taken = Signature(expert, rows)
    assert not taken.holds(conv_expert(), rows)
    assert not taken.holds(expert, source(torch.bfloat16))
    assert not taken.holds(expert, source(requires_grad=True))
    with torch.autocast("cpu", torch.bfloat16):
        assert not taken.holds(expert, rows)
    assert taken.holds(expert, rows)
