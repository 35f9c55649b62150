"""What engines with experts on several ranks got wrong at first, one test for each: gradients too
large by the number of ranks, norms that differ by rank, statistics and means of a rank's own
samples, collectives that a rank leaves out, and rows that are dropped."""

import math
from typing import NamedTuple

import pytest
import torch
from support.processes import connected, run_ranks
from support.shared_runs import CLASSES, SIDE, Hub, build
from torch import nn

import hubpath_fast as hp
from hubpath_fast.parallel import Gradients, Ranks, reduce

SAMPLES = 16
ONE_TAKES_ALL = (9.0, 0.0, 0.0, 0.0)
NORMS = [(0.5, 2.0), (math.inf, 2.0), (0.5, math.inf), (0.5, 1.0), (1e9, 2.0)]
PLAIN = {"batch_norm": False}


class Case(NamedTuple):
    ranks: int
    layout: str
    hub: Hub


CASES = {
    "ep": Case(2, "ep", Hub()),
    "ep, one expert takes all": Case(2, "ep", Hub(k=1, bias=ONE_TAKES_ALL)),
    "dp": Case(2, "dp", Hub(8, 1, **PLAIN)),
    "dp, one expert takes all": Case(2, "dp", Hub(k=1, bias=ONE_TAKES_ALL, **PLAIN)),
    "2x2": Case(4, "2x2", Hub(5, **PLAIN)),
    "a rank without experts": Case(4, "ep", Hub(3, owners=(0, 1, 3))),
    "a router with BatchNorm": Case(4, "2x2", Hub(router_norm=True, **PLAIN)),
}


def backward(hub, ranks=Ranks(), explore=0.5, alone=False):
    """(model, its gradients averaged, the explore loss, rows here); ``alone``: samples are all of
    the first replica's."""
    model, draw = build(hub, ranks), torch.Generator().manual_seed(5)
    x = torch.randint(0, 256, (SAMPLES, 3, SIDE, SIDE), dtype=torch.uint8, generator=draw)
    y = torch.randint(0, CLASSES, (SAMPLES,), generator=draw)
    eps = torch.randn(SAMPLES, hub.num_experts, generator=draw).double()
    own = ranks.share().positions(SAMPLES)
    out = model(x[own], eps[own])
    losses = hp.HubPathwayLoss(explore=explore)(out, y[own])
    losses.total.backward()
    rows = out.routing.counts()
    gradients = Gradients(model, ranks)
    if not ranks.single:
        assert not gradients.average(rows)
    return model, gradients, float(losses.explore), rows


def grads_of(model):
    return {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if not p.is_meta
    }


def clipped(model, gradients, settings):
    """The norm and the gradients that each leaves, by the way of one process or of ranks."""
    before, found = grads_of(model), []
    parameters = [p for p in model.parameters() if not p.is_meta]
    single = gradients.ranks.single
    for max_norm, norm_type in settings:
        clip = nn.utils.clip_grad_norm_ if single else gradients.clip
        found.append((clip(parameters, max_norm, norm_type), grads_of(model)))
        for name, p in model.named_parameters():
            p.grad = p.grad if before.get(name) is None else before[name].clone()
    return found


def spoiled(model, gradients, value):
    """The norms of gradients of which one expert's last rank has one value that is not finite."""
    grads = [p.grad for p in model.experts[-1].parameters() if not p.is_meta]
    if grads and grads[0] is not None:
        grads[0].view(-1)[0] = value
    parameters = [p for p in model.parameters() if not p.is_meta]
    clip = nn.utils.clip_grad_norm_ if gradients.ranks.single else gradients.clip
    return [float(clip(parameters, math.inf, p)) for p in (2.0, math.inf)]


def all_of(case, ranks):
    model, gradients, explore, rows = backward(case.hub, ranks)
    found = {"grads": grads_of(model), "explore": explore, "rows": rows}
    found["norms"] = clipped(model, gradients, NORMS)
    found["nan"] = spoiled(model, gradients, math.nan)
    model, gradients, *_ = backward(case.hub, ranks)
    found["inf"] = spoiled(model, gradients, math.inf)
    return found


class Odd(nn.Module):
    """A part of which a sample's sign says which of two parameters gets a gradient; a third never
    does, and a fourth is of another type."""

    def __init__(self):
        super().__init__()
        self.plus, self.minus, self.none = (nn.Parameter(torch.ones(3)) for _ in range(3))
        self.narrow = nn.Parameter(torch.ones(2, 2, dtype=torch.bfloat16))

    def forward(self, x):
        chosen = self.plus if x[0, 0] > 0 else self.minus
        return (x * chosen).sum(1, keepdim=True) + self.narrow.sum().float()


def odd_steps(ranks, steps=(True, False, True)):
    """Gradients of a router and an expert whose ranks each use other parameters, at each step."""
    model = nn.Module()
    model.router, model.experts = Odd(), nn.ModuleList([Odd(), Odd()])
    gradients, found = Gradients(model, ranks), []
    for differ in steps:
        model.zero_grad(set_to_none=True)
        sign = -1.0 if differ and ranks.rank else 1.0
        x = torch.full((2, 3), sign * (1 + ranks.rank))
        loss = model.router(x).mean()
        if differ and ranks.rank:  # the first expert has rows on one replica
            rows = [0, 0]
        else:
            loss, rows = loss + model.experts[0](x).mean(), [2, 0]
        loss.backward()
        gradients.average(rows)
        found.append(grads_of(model))
    return found


def statistics(ranks):
    """Running statistics of experts after a step in which a replica has rows, and another has
    none; and of one that is frozen."""
    model = nn.Module()
    model.experts = nn.ModuleList([nn.BatchNorm1d(2), nn.BatchNorm1d(2), nn.BatchNorm1d(2).eval()])
    model.router = nn.Linear(1, 1)
    model.experts[2].running_mean.fill_(1 / 3)
    gradients, counts = Gradients(model, ranks), (3, 5) if ranks.rank else (3, 3)
    rows = [counts[1], 0 if ranks.rank else 4, 2]
    for expert, count in zip(model.experts, rows, strict=True):
        if count:
            x = torch.arange(2.0 * count).view(count, 2) * (1 + ranks.rank)
            expert(x)
    own = [expert.running_mean.clone() for expert in model.experts]
    gradients.average(rows)
    return own, [dict(expert.named_buffers()) for expert in model.experts], rows


def rank_main(rank, names):
    found = {}
    for name in names:
        found[name] = all_of(CASES[name], connected(CASES[name].layout))
    if "dp" in names:
        ranks = connected("dp")
        found["odd"], found["statistics"] = odd_steps(ranks), statistics(ranks)
        gradients = backward(CASES["dp"].hub, ranks)[1]
        found["bad"] = gradients.average([0] * 8, bad=rank == 1)
        reduce.BUCKET_BYTES = 64
        found["buckets"] = grads_of(backward(CASES["dp"].hub, ranks)[0])
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}
    for ranks in (2, 4):
        names = [name for name, case in CASES.items() if case.ranks == ranks]
        for each in run_ranks(rank_main, ranks, tmp_path_factory.mktemp("ranks"), names):
            for name, value in each.items():
                results.setdefault(name, []).append(value)
    return results


def assert_equal(grads, expected):
    """Sums in another order: some 1e-17 of gradients of about 0.1."""
    for name, grad in grads.items():
        assert (grad is None) == (expected[name] is None), name
        if grad is not None:
            torch.testing.assert_close(grad, expected[name], rtol=0, atol=1e-13, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_mean_over_the_global_batch(found, name):
    expected = all_of(CASES[name], Ranks())["grads"]
    seen = set()
    for each in found[name]:
        assert_equal(each["grads"], expected)
        seen |= set(each["grads"])
    assert seen == set(expected)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("index", range(len(NORMS)))
def test_there_is_one_norm_and_all_ranks_clip_by_it(found, name, index):
    norm, grads = all_of(CASES[name], Ranks())["norms"][index]
    norms = {float(each["norms"][index][0]) for each in found[name]}
    assert len(norms) == 1  # to the bit: by anything else the routers drift apart
    assert norms.pop() == pytest.approx(float(norm), rel=1e-13)
    for each in found[name]:
        assert_equal(each["norms"][index][1], grads)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_norm_that_is_not_finite_is_so_on_all_ranks(found, name, value):
    expected = all_of(CASES[name], Ranks())[value]
    for each in found[name]:
        assert each[value] == pytest.approx(expected, nan_ok=True)


@pytest.mark.parametrize("name", CASES)
def test_the_explore_loss_is_of_all_ranks_mean(found, name):
    expected = all_of(CASES[name], Ranks())["explore"]
    for each in found[name]:
        assert each["explore"] == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_no_row_is_dropped(found, name):
    rows = [sum(column) for column in zip(*(each["rows"] for each in found[name]), strict=True)]
    assert rows == list(all_of(CASES[name], Ranks())["rows"])
    assert sum(rows) == SAMPLES * CASES[name].hub.k


def test_parameters_without_a_gradient_on_any_rank_keep_none(found):
    for one, other in zip(*found["odd"], strict=True):
        assert all(one[f"{part}.none"] is None for part in ("router", "experts.0"))
        assert all(grad is None for name, grad in one.items() if name.startswith("experts.1"))
        for name, grad in one.items():
            assert (grad is None) == (other[name] is None), name
            assert grad is None or torch.equal(grad, other[name])


def test_a_gradient_that_one_replica_lacks_counts_as_zero(found):
    differ, same, again = found["odd"][0]
    # x is 1 on rank 0 and -2 on rank 1, or 2 where both have the same sign.
    assert differ["router.plus"].tolist() == [0.5] * 3
    assert differ["router.minus"].tolist() == [-1.0] * 3
    assert differ["experts.0.plus"].tolist() == [0.5] * 3
    assert differ["experts.0.minus"] is None
    assert same["router.plus"].tolist() == same["experts.0.plus"].tolist() == [1.5] * 3
    assert same["router.minus"] is None
    assert again["router.minus"].tolist() == [-1.0] * 3
    assert differ["router.narrow"].dtype == torch.bfloat16
    assert differ["router.narrow"].tolist() == [[1.0] * 2] * 2
    assert differ["experts.0.narrow"].tolist() == [[0.5] * 2] * 2


def test_running_statistics_are_averaged_by_rows(found):
    (own, buffers, rows), (other, other_buffers, other_rows) = found["statistics"]
    for i in (0, 1):
        total = rows[i] + other_rows[i]
        expected = (own[i] * rows[i] + other[i] * other_rows[i]) / total
        for each in (buffers, other_buffers):
            torch.testing.assert_close(each[i]["running_mean"], expected, rtol=1e-6, atol=1e-7)
            assert each[i]["num_batches_tracked"] == 1
        assert torch.equal(buffers[i]["running_var"], other_buffers[i]["running_var"])
    assert torch.equal(buffers[2]["running_mean"], own[2])


def test_where_one_rank_is_bad_none_averages(found):
    assert found["bad"] == [True, True]


def test_buckets_change_nothing(found):
    for each, whole in zip(found["buckets"], found["dp"], strict=True):
        assert_equal(each, whole["grads"])


def test_an_expert_with_sync_batch_norm_is_refused():
    model = build()
    model.experts[2][1] = nn.SyncBatchNorm(5)
    with pytest.raises(ValueError, match=r"SyncBatchNorm, which waits for ranks.*--parallel ep"):
        model.distribute(Ranks(0, 2, 2, 1))


def test_a_router_with_a_batch_norm_of_another_class_is_refused():
    class Own(nn.BatchNorm2d):
        pass

    model = build(Hub(router_norm=True))
    model.generator.first[1] = Own(3)
    with pytest.raises(ValueError, match=r"1: expected torch's BatchNorm.*got Own"):
        model.distribute(Ranks(0, 2, 2, 1))
