"""K = M: nothing is sorted, counted or scattered, and all is as it was.

The truth is the reference's loop, in float64; beside it the plan of the general path, entry by
entry.
"""

import copy
from functools import partial

import pytest
import torch
from support.host_reads import host_reads
from support.pathway import CLOSE, MapExpert, assert_equal_step, assert_same_state, build
from torch import nn

import hubpath_fast as hp
from hubpath_fast import functional as HF
from hubpath_fast import reference

# One sample, one expert, as many samples as experts, more experts than samples.
SIZES = [(1, 1), (1, 2), (7, 1), (5, 2), (4, 4), (3, 6), (33, 5)]


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("renormalize", [False, True])
def test_the_plan_is_the_references(n, m, renormalize):
    torch.manual_seed(n * m)
    clean, noise, eps = (torch.randn(n, m, dtype=torch.float64) for _ in range(3))
    clean[n // 2] = 0.0  # ties
    eps[n // 2] = 0.0
    found = HF.noisy_topk(clean, noise, m, eps, renormalize)
    truth = reference.noisy_topk(clean, noise, m, eps, renormalize)
    for name in ("experts", "offsets", "rows", "positions"):
        ours, expected = getattr(found, name), getattr(truth, name)
        assert torch.equal(ours, expected), name
        assert ours.dtype == expected.dtype, name
        assert ours.is_contiguous(), name
    torch.testing.assert_close(found.weights, truth.weights, **CLOSE)
    torch.testing.assert_close(found.mean, truth.mean, **CLOSE)
    assert found.counts() == truth.counts() == [n] * m


def test_rows_of_nan_have_a_plan_all_the_same():
    routing = HF.noisy_topk(torch.full((3, 4), torch.nan), torch.zeros(3, 4), 4)
    assert routing.experts.tolist() == [[0, 1, 2, 3]] * 3
    assert routing.rows.tolist() == [n * 4 + i for i in range(4) for n in range(3)]


@pytest.mark.parametrize(("n", "m"), SIZES)
@pytest.mark.parametrize("expert", [None, MapExpert], ids=["vectors", "maps"])
def test_a_step_equals_the_reference(n, m, expert):
    if expert is None:
        assert_equal_step(*build(n, m, m))
        return
    ours, truth, x, _, eps = build(n, m, m, expert=expert, num_outputs=7)
    out, expected = ours(x, eps), truth(x, eps)
    torch.testing.assert_close(out.prediction, expected.prediction, **CLOSE)
    torch.testing.assert_close(out.expert_outputs, expected.expert_outputs, **CLOSE)
    direction = torch.randn_like(out.prediction)
    for found in (out, expected):
        ((found.prediction * direction).sum() + found.expert_outputs.square().sum()).backward()
    assert_same_state(ours, truth)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float64])
def test_every_expert_gets_the_batch(scaled, layout, dtype):
    n, m = 5, 3
    x = (torch.rand(n, 4, 6, 6) * 255).to(dtype).contiguous(memory_format=layout)
    scale, shift = (torch.rand(m, 4) for _ in range(2)) if scaled else (None, None)
    routing = HF.noisy_topk(torch.randn(n, m), torch.randn(n, m), m)
    rows = HF.gather(x, routing, scale, shift)
    assert rows.is_contiguous(memory_format=layout)
    for i, own in enumerate(rows.split(n)):
        expected = x
        if scaled:
            by, to = (t[i].to(rows.dtype).view(1, 4, 1, 1) for t in (scale, shift))
            expected = x.to(rows.dtype) * by + to
        assert torch.equal(own, expected)


def test_the_gradient_of_the_batch_is_the_sum_over_experts():
    n, m = 4, 3
    x = torch.randn(n, 5, dtype=torch.float64, requires_grad=True)
    routing = HF.noisy_topk(torch.randn(n, m), torch.randn(n, m), m)
    direction = torch.randn(m * n, 5, dtype=torch.float64)
    HF.gather(x, routing).backward(direction)
    torch.testing.assert_close(x.grad, direction.view(m, n, 5).sum(0), **CLOSE)


class Overwrites(nn.Module):
    """Writes to its input, as a network does that begins with an in-place activation."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(48, 7)

    def forward(self, x):
        return self.head(x.mul_(0.5).flatten(1))


def test_an_expert_that_writes_to_its_input_spoils_no_others():
    ours, truth, x, *_ = build(6, 3, 3, expert=Overwrites)
    before = x.clone()
    out = ours(x, torch.zeros(6, 3))
    assert torch.equal(x, before)
    for i, expert in enumerate(truth.experts):
        torch.testing.assert_close(
            out.expert_outputs[6 * i : 6 * i + 6], expert.head(x.flatten(1) / 2)
        )


class Reads(nn.Module):
    """Promises to leave its input alone, and notes where that lies."""

    keeps_input = True

    def __init__(self):
        super().__init__()
        self.head, self.seen = nn.Linear(48, 7), []

    def forward(self, x):
        self.seen.append(x.data_ptr())
        return self.head(x.flatten(1))


def test_experts_that_promise_not_to_write_get_the_batch_itself():
    ours, truth, x, y, eps = build(6, 3, 3, expert=Reads)
    assert_equal_step(ours, truth, x, y, eps)
    assert [expert.seen for expert in ours.experts] == [[x.data_ptr()]] * 3

    def shared(model, x):
        model(x, eps)
        return [expert.seen[-1] == x.data_ptr() for expert in model.experts]

    assert shared(ours, x) == [True] * 3
    assert shared(ours, x.clone().requires_grad_()) == [False] * 3  # its gradient is of all
    ours.experts[1].keeps_input = False
    assert shared(ours, x) == [False] * 3
    normalization = torch.zeros(3, 3), torch.full((3, 3), 0.5)
    assert shared(build(6, 3, 3, expert=Reads, normalization=normalization)[0], x) == [False] * 3
    ours.experts[1].keeps_input, ours.k = True, 2
    assert shared(ours, x) == [False] * 3


def test_nothing_is_read_on_the_host():
    ours, _, x, y, eps = build(6, 3, 3)
    criterion = hp.HubPathwayLoss(task_loss=lambda p, y: (p - y).square().sum(1))
    y = torch.randn(6, 7, dtype=torch.float64)

    def step():
        with host_reads() as reads:
            criterion(ours(x, eps), y).total.backward()
        return len(reads)

    assert step() == 0
    assert ours.executor_report().host_reads_per_step == 0.0
    ours.k = 2
    assert step() == 1


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_combine_rounds_once_as_the_general_path_does(half):
    """The general path is that of a larger hub, whose last expert nobody chooses."""
    n, m = 9, 3
    clean = torch.randn(n, m)
    scores = torch.cat([clean, torch.full((n, 1), -1e9)], 1)
    outputs = torch.randn(n * m, 7, 2).to(half)
    combine = partial(HF.combine, outputs)
    found = combine(HF.noisy_topk(clean, clean, m))
    general = combine(HF.noisy_topk(scores, scores, m))
    assert found.dtype == half
    assert torch.equal(found, general[:, : 7 * m])


def test_autocast_and_copies_work_as_ever():
    ours, _, x, y, eps = build(8, 3, 3)
    twin = copy.deepcopy(ours)
    assert torch.equal(twin(x, eps).prediction, ours(x, eps).prediction)
    ours.float()
    with torch.autocast("cpu", torch.bfloat16):
        out = ours(x.float(), eps.float())
        losses = hp.HubPathwayLoss()(out, y)
    losses.total.backward()
    assert out.prediction.dtype == torch.bfloat16
