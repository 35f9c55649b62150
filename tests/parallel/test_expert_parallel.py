"""Outputs, gradients and statistics of experts that several ranks share out are those of one
process that gets all samples in one batch."""

import pytest
import torch
from support.processes import connected, run_ranks
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.parallel import Gradients, Share, counted
from hubpath_fast.parallel.traffic import ep_bytes
from hubpath_fast.resting import rests

SHAPE, CLASSES = (3, 6, 6), 4
# name: (ranks, layout, experts, K, owners, the scores' bias)
CASES = {
    "balanced": (2, "ep", 4, 2, None, None),
    "all experts active": (2, "ep", 4, 4, None, None),
    "interleaved owners": (2, "ep", 5, 2, (1, 0, 1, 0, 1), None),
    "one expert takes all": (2, "ep", 4, 1, None, (9.0, 0.0, 0.0, 0.0)),
    "experts without rows": (2, "ep", 4, 2, None, (9.0, 9.0, 0.0, 0.0)),
    "two replicas": (4, "2x2", 4, 2, None, None),
    "four ranks": (4, "ep", 6, 2, None, None),
    "a rank that owns nothing": (4, "ep", 3, 2, (0, 1, 3), None),
}


class Router(nn.Module):
    def __init__(self, num_experts, bias):
        super().__init__()
        self.heads = nn.Linear(108, 2 * num_experts)
        self.bias = torch.zeros(num_experts) if bias is None else torch.tensor(bias)

    def forward(self, x):
        clean, noise = self.heads(x.flatten(1)).chunk(2, dim=1)
        return clean + 20 * self.bias.to(clean), noise


def build(num_experts, k, bias):
    torch.manual_seed(3)
    experts = [
        nn.Sequential(
            nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(80, CLASSES)
        )
        for _ in range(num_experts)
    ]
    mean = torch.rand(num_experts, 3)
    model = hp.HubPathway(experts, Router(num_experts, bias), k=k, normalization=(mean, mean + 0.5))
    return model.double()


def batch():
    torch.manual_seed(5)
    x = torch.randint(0, 256, (16, *SHAPE), dtype=torch.uint8)
    return x, torch.randint(0, CLASSES, (16,))


def step(model, share):
    """The outputs of the rank's rows by (sample, expert), gradients and buffers after one step."""
    x, y = batch()
    own = share.positions(len(x))
    eps = torch.randn(16, len(model.experts), generator=torch.Generator().manual_seed(1)).double()
    out = model(x[own], eps[own])
    hp.HubPathwayLoss()(out, y[own]).total.backward()
    sample = own[out.routing.rows.long() // model.k]
    expert = out.routing.experts.flatten()[out.routing.rows.long()]
    rows = {
        (s, e): row.detach().clone()
        for s, e, row in zip(sample.tolist(), expert.tolist(), out.expert_outputs, strict=True)
    }
    gradients = {
        name: None if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
        if not p.is_meta
    }
    buffers = {name: b.clone() for name, b in model.named_buffers() if not b.is_meta}
    model.eval()
    with torch.no_grad():
        prediction = model(x[own])
    return rows, gradients, buffers, (own, prediction)


def rank_main(rank, names):
    found = {}
    for name in names:
        _, layout, num_experts, k, owners, bias = CASES[name]
        ranks = connected(layout)
        model = build(num_experts, k, bias).distribute(ranks, owners)
        result = step(model, Share(rank, ranks.world))
        found[name] = (*result, traffic_of(name, ranks), str(model.executor_report()))
    if "interleaved owners" in names:
        found["resting"] = resting(rank)
    return found


def resting(rank):
    """The rows of a step whose experts come when they are used."""
    _, layout, num_experts, k, owners, bias = CASES["interleaved owners"]
    model = build(num_experts, k, bias)
    model.executor = ResidentExecutor(2, "sequential")
    model.distribute(connected(layout), owners)
    model.executor.settle(model.experts)
    own = [p for expert in model.experts for p in expert.parameters() if not p.is_meta]
    rested = all(map(rests, own))
    with torch.no_grad():
        model.eval()
        mine = Share(rank, 2).positions(16)
        prediction = model(batch()[0][mine])
    return rested, mine, prediction, model.executor_report().room


def traffic_of(name, ranks):
    """The bytes of a step in float32, by what for; and the rank's own rows by expert."""
    _, _, num_experts, k, owners, bias = CASES[name]
    model = build(num_experts, k, bias).float().distribute(ranks, owners)
    gradients = Gradients(model, ranks)
    x, y = batch()
    own = ranks.share().positions(len(x))
    for seed in range(2):  # the first one tells ranks of each other what does not change
        model.zero_grad()
        with counted() as traffic:
            out = model(x[own], hp.functional.NoiseDraw(seed, int(own[0])))
            hp.HubPathwayLoss()(out, y[own]).total.backward()
            gradients.average(out.routing.counts())
    return dict(traffic), out.routing.counts()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}
    for ranks in (2, 4):
        names = [name for name, case in CASES.items() if case[0] == ranks]
        folder = tmp_path_factory.mktemp("ranks")
        for each in run_ranks(rank_main, ranks, folder, names):
            for name, value in each.items():
                results.setdefault(name, []).append(value)
    return results


@pytest.mark.parametrize("name", CASES)
def test_ranks_equal_one_process(found, name):
    ranks, layout, num_experts, k, _, bias = CASES[name]
    model = build(num_experts, k, bias)
    rows, gradients, buffers, (_, prediction) = step(model, Share())
    replicas = 2 if layout == "2x2" else 1
    router = {}
    for own_rows, own_gradients, own_buffers, (own, own_prediction), *_ in found[name]:
        if replicas == 1:  # else BatchNorm sees a replica's samples
            for place, row in own_rows.items():
                assert torch.equal(row, rows[place]), place
            for key, buffer in own_buffers.items():
                torch.testing.assert_close(buffer, buffers[key], rtol=0, atol=1e-14)
            torch.testing.assert_close(own_prediction, prediction[own], rtol=1e-12, atol=1e-12)
        for key, gradient in own_gradients.items():
            if not key.startswith("experts."):
                router.setdefault(key, []).append(gradient)
            elif replicas == 1:
                assert (gradient is None) == (gradients[key] is None), key
                if gradient is not None:
                    torch.testing.assert_close(gradient, gradients[key], rtol=1e-10, atol=1e-12)
    for key, each in router.items():
        assert len(each) == ranks
        if replicas == 1:
            mean = torch.stack(each).mean(0)
            torch.testing.assert_close(mean, gradients[key], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["balanced", "interleaved owners", "a rank that owns nothing"])
def test_the_bytes_that_are_counted_are_those_of_the_formula(found, name):
    ranks, _, num_experts, _, owners, _ = CASES[name]
    owners = owners or tuple(i * ranks // num_experts for i in range(num_experts))
    model = build(num_experts, 1, None)
    router = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("experts."))
    counts = [each[4][1] for each in found[name]]
    for rank, (*_, (traffic, own), _) in enumerate(found[name]):
        sent = sum(rows for rows, owner in zip(own, owners, strict=True) if owner != rank)
        received = sum(
            rows[i]
            for other, rows in enumerate(counts)
            for i, owner in enumerate(owners)
            if owner == rank != other
        )
        expected = ep_bytes(sent, 3 * 6 * 6, CLASSES, 4, num_experts, ranks, router, received)
        expected["agreement"] -= 2 * 8  # on stopping, which the trainer alone asks for
        assert traffic == expected


def test_experts_of_ranks_may_rest_in_files(found):
    _, _, num_experts, k, _, bias = CASES["interleaved owners"]
    model = build(num_experts, k, bias).eval()
    with torch.no_grad():
        expected = model(batch()[0])
    for rested, mine, prediction, room in found["resting"]:
        assert rested
        # float64: where memory is aligned otherwise, products may be summed in another order.
        torch.testing.assert_close(prediction, expected[mine], rtol=1e-12, atol=1e-12)
        assert room > 0


def test_the_report_says_who_has_what(found):
    report = found["interleaved owners"][1][-1]
    assert "executor: parallel" in report
    assert "rank 1 of 2 (1 x 2): experts 0, 2, 4" in report
