"""Rows in autocast's precision: where all experts would cast them first, and with its bits."""

import copy

import pytest
import torch
from support.graphs import assert_same, fixed_routing, grads, row_wise_expert
from support.models import C, M, batch, build, conv_expert
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import RowPrecision, RowSource
from hubpath_fast.executors.threads import ThreadsExecutor

BF16 = torch.bfloat16


@pytest.fixture
def gathered(monkeypatch):
    """The dtypes of the rows that were gathered since."""
    found, rows = [], RowSource.rows

    def spy(source):
        found.append(rows(source))
        return found[-1]

    monkeypatch.setattr(RowSource, "rows", spy)
    return lambda: [rows.dtype for rows in found]


def step(model, x, y, dtype=BF16):
    with torch.autocast("cpu", dtype):
        out = model(x, routing=fixed_routing(model))
        loss = hp.HubPathwayLoss()(out, y).total
    loss.backward()
    return out


def with_experts(make):
    torch.manual_seed(1)
    model = build()
    model.experts = nn.ModuleList(make() for _ in range(M))
    return model


@pytest.mark.parametrize("images", [torch.uint8, torch.float32])
@pytest.mark.parametrize("executor", ["sequential", ThreadsExecutor(2)], ids=["one", "threads"])
def test_rows_are_gathered_in_autocasts_precision_with_the_same_bits(
    gathered, monkeypatch, images, executor
):
    x, y = batch()
    mean = torch.arange(1.0, 1 + M * 3).view(M, 3) / 20
    if images == torch.uint8:
        x = torch.randint(0, 256, (24, 3, 8, 8), dtype=torch.uint8)
    model = with_experts(row_wise_expert)
    model.executor, model.input_mean, model.input_std = executor, mean, mean + 0.1
    twin = copy.deepcopy(model)
    found = [step(model, x, y) for _ in range(3)]
    assert gathered() == [torch.float32, BF16, BF16]
    monkeypatch.setattr(RowPrecision, "rows_dtype", lambda self, experts, x, dtype: dtype)
    expected = [step(twin, x, y) for _ in range(3)]
    assert gathered()[3:] == [torch.float32] * 3
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.prediction, b.prediction)
        assert torch.equal(a.expert_outputs, b.expert_outputs)
    assert_same(grads(model), grads(twin))


class Resizing(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = row_wise_expert()

    def forward(self, x):
        return self.body(nn.functional.interpolate(x, (8, 8), mode="bilinear"))


class Twice(Resizing):
    """Casts its input, and reads it otherwise as well."""

    def forward(self, x):
        return self.body(x) + x.mean()


NOT_ONLY_CASTS = {
    "resizes": Resizing,
    "reads it twice": Twice,
    "normalises": lambda: nn.Sequential(nn.BatchNorm2d(3), row_wise_expert()),
    "writes to it": lambda: nn.Sequential(nn.Hardtanh(0.2, 0.8, inplace=True), row_wise_expert()),
    "drops of it in training": lambda: nn.Sequential(nn.Dropout(0.1), row_wise_expert()),
}


@pytest.mark.parametrize("name", NOT_ONLY_CASTS)
def test_rows_stay_float32_where_one_expert_does_more_than_to_cast_them(gathered, name):
    x, y = batch()
    model = with_experts(row_wise_expert)
    model.experts[2] = NOT_ONLY_CASTS[name]()
    for _ in range(3):
        step(model, x, y)
    assert gathered() == [torch.float32] * 3


def test_training_and_evaluation_are_known_apart(gathered):
    x, y = batch()
    model = with_experts(row_wise_expert)
    model.experts[1] = nn.Sequential(nn.Dropout(0.1), row_wise_expert())
    model.eval()
    for _ in range(2):
        with torch.no_grad(), torch.autocast("cpu", BF16):
            model(x, routing=fixed_routing(model))
    model.train()
    step(model, x, y)
    assert gathered() == [torch.float32, BF16, torch.float32]


def test_experts_that_had_no_rows_yet_are_waited_for(gathered):
    x, y = batch()
    model = with_experts(row_wise_expert)
    for counts in ([12, 12, 0, 0], [12, 0, 12, 0], [12, 0, 6, 6], [6] * M):
        with torch.autocast("cpu", BF16):
            model(x, routing=fixed_routing(model, counts=counts))
    assert gathered() == [torch.float32] * 3 + [BF16]
    model.experts[0] = row_wise_expert()
    step(model, x, y)
    assert gathered()[-1] == torch.float32


def test_without_autocast_and_for_gradients_of_the_input_rows_are_as_they_were(gathered):
    x, y = batch()
    model = with_experts(row_wise_expert)
    for _ in range(2):
        step(model, x, y)
    hp.HubPathwayLoss()(model(x, routing=fixed_routing(model)), y).total.backward()
    step(model, x.double().float().requires_grad_(), y)
    assert gathered() == [torch.float32, BF16, torch.float32, torch.float32]


def test_an_expert_is_called_once_also_where_it_is_watched():
    calls = []

    class Counted(nn.Sequential):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)

    out = step(with_experts(lambda: Counted(*conv_expert())), *batch())
    assert calls == [6] * M
    assert out.expert_outputs.shape == (24, C)


CHANGES = {
    "another first layer": lambda expert: expert.insert(0, nn.BatchNorm2d(3)),
    "a hook": lambda expert: expert.register_forward_pre_hook(lambda _, x: (x[0] * 1.7 - 0.3,)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_changed_expert_is_watched_again(gathered, name):
    x, y = batch()
    model = with_experts(row_wise_expert)
    for change in (lambda _: None, CHANGES[name]):
        change(model.experts[3])
        for _ in range(2):
            step(model, x, y)
    assert gathered() == [torch.float32, BF16, torch.float32, torch.float32]
