"""Predictions that ask fewer experts: which are asked, that the others do not run, and what comes
out, against hand-computed values and a loop over samples in float64."""

import pytest
import torch
from support.pathway import CLOSE
from torch import nn

import hubpath_fast as hp
from hubpath_fast import _torch_ops
from hubpath_fast import functional as HF
from hubpath_fast.model import dense_weights, describe
from hubpath_fast.runs.measure import predict
from hubpath_fast.tasks import Classification
from hubpath_fast.training.routes import RouteMeter

# The softmax of each sample, M = 4.
P = torch.tensor(
    [
        [0.6, 0.2, 0.15, 0.05],
        [0.1, 0.45, 0.05, 0.4],
        [0.25, 0.2, 0.3, 0.25],
        [0.02, 0.03, 0.9, 0.05],
    ],
    dtype=torch.float64,
)
# With top_mass = 0.7 and K = 3: who is asked, by hand.
ASKED = [[0, 1], [1, 3], [2, 0, 3], [2]]


class Scores(nn.Module):
    """A generator that reads the logarithms of p off the sample itself."""

    def forward(self, x):
        clean = x[:, :4].flatten(2).mean(dim=2) if x.dim() > 2 else x[:, :4]
        return clean, torch.zeros_like(clean)


class Counted(nn.Module):
    """An expert that knows how many rows it has seen."""

    def __init__(self, num_outputs):
        super().__init__()
        self.linear, self.rows = nn.Linear(4, num_outputs, dtype=torch.float64), 0

    def forward(self, x):
        self.rows += len(x)
        return self.linear(x) if x.dim() == 2 else self.linear(x.movedim(1, -1)).movedim(-1, 1)


def build(aggregator=None, k=3, num_outputs=3, executor="sequential", **options):
    torch.manual_seed(0)
    experts = [Counted(num_outputs) for _ in range(4)]
    if aggregator is None:
        aggregator = hp.LinearAggregator(4, num_outputs).double()
        nn.init.normal_(aggregator.weight)
        nn.init.normal_(aggregator.bias)
    return hp.HubPathway(
        experts, Scores(), aggregator, k, num_outputs, executor=executor, **options
    ).eval()


def routing(top_mass, k=3, penalty=None, renormalize=False):
    policy = hp.RoutingPolicy(top_mass, penalty)
    return policy.route(P.log(), torch.zeros_like(P), k, renormalize)


def expected(model, x, asked, renormalize=False):
    """Sample by sample: each asked expert alone, weighted by p, and the aggregator on top."""
    found = []
    for n, experts in enumerate(asked):
        parts = [torch.zeros(1, 3, *x.shape[2:], dtype=torch.float64) for _ in range(4)]
        total = P[n, experts].sum() if renormalize else 1.0
        for i in experts:
            parts[i] = P[n, i] / total * model.experts[i](x[n : n + 1])
        found.append(model.aggregator(torch.cat(parts, dim=1)))
    return torch.cat(found)


def test_as_many_experts_are_asked_as_hold_the_share():
    found = routing(0.7)
    assert found.counts() == [2, 2, 2, 2]
    assert found.offsets.tolist() == [0, 2, 4, 6, 8]
    # By expert, then by sample: slot n*3 + j.
    assert found.rows.tolist() == [0, 7, 1, 3, 6, 9, 4, 8]
    assert found.experts.tolist() == [[0, 1, 0], [1, 3, 1], [2, 0, 3], [2, 2, 2]]
    assert found.positions.tolist() == [[0, 2, 0], [3, 6, 3], [4, 1, 7], [5, 5, 5]]
    weights = torch.tensor(
        [[0.6, 0.2, 0], [0.45, 0.4, 0], [0.3, 0.25, 0.25], [0.9, 0, 0]], dtype=torch.float64
    )
    torch.testing.assert_close(found.weights, weights, **CLOSE)
    torch.testing.assert_close(found.mean, P.mean(dim=0), **CLOSE)
    for name in ("offsets", "rows", "positions"):
        assert getattr(found, name).dtype == torch.int32, name


@pytest.mark.parametrize(
    ("top_mass", "rows"),
    [(1e-6, 4), (0.55, 6), (0.7, 8), (0.81, 9), (0.99, 12), (1.0, 12)],
)
def test_rows_grow_with_the_share_from_one_to_k(top_mass, rows):
    # Of 0.55: samples 1 (0.45) and 2 (0.3; with 0.25 it holds 0.55) need two.
    if top_mass == 0.55:
        top_mass -= 1e-9
    assert routing(top_mass).rows.numel() == rows


def test_a_penalty_is_not_rounded_to_the_scores_precision():
    clean = torch.tensor([[8.0, 8.0, 0.0]]).bfloat16()  # whose neighbours are 1/16 apart
    policy = hp.RoutingPolicy(penalty=[0.01, 0.0, 0.0], k=1)
    found = policy.route(clean, torch.zeros_like(clean), 2)
    assert found.experts.tolist() == [[1]]
    expected = (clean.float() - torch.tensor([0.01, 0.0, 0.0])).softmax(1)[:, 1:2]
    torch.testing.assert_close(found.weights, expected, rtol=1e-6, atol=0)


def test_a_share_of_all_drops_nothing():
    found, full = routing(1.0), HF.noisy_topk(P.log(), torch.zeros_like(P), 3)
    for name in ("weights", "mean", "experts", "offsets", "rows", "positions"):
        assert torch.equal(getattr(found, name), getattr(full, name)), name


def test_a_penalty_is_subtracted_from_the_scores():
    # exp(-log 4) = 1/4: expert 2's odds fall to a quarter.
    found = dense_weights(routing(None, k=1, penalty=[0, 0, torch.tensor(4.0).log().item(), 0]))
    odds = P * torch.tensor([1, 1, 0.25, 1], dtype=torch.float64)
    odds = odds / odds.sum(dim=1, keepdim=True)
    best = [0, 1, 0, 2]
    truth = torch.zeros_like(P).scatter(1, torch.tensor(best)[:, None], 1) * odds
    # Penalties are float64; log 4 was rounded to float32, which shifts odds by 1e-8.
    torch.testing.assert_close(found, truth, rtol=1e-7, atol=0)


@pytest.mark.parametrize(
    ("kind", "trailing"),
    [
        ("linear", ()), ("linear", (5, 4)), ("sum", ()), ("sum", (5, 4)), ("mlp", ()),
        ("module", ()), ("module", (5, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("renormalize", [False, True])
def test_a_prediction_is_the_loops_over_the_asked_experts_alone(kind, trailing, renormalize):
    aggregators = {
        "linear": None,
        "sum": hp.SumAggregator(4, 3).double(),
        "mlp": hp.MLPAggregator(4, 3).double(),
        "module": nn.Identity(),
    }
    model = build(aggregators[kind], renormalize=renormalize)
    x = P.log().view(4, 4, *[1] * len(trailing)).expand(4, 4, *trailing).contiguous()
    full = model(x)
    for expert in model.experts:
        expert.rows = 0
    model.policy = hp.RoutingPolicy(top_mass=0.7)
    found = model(x)
    assert [expert.rows for expert in model.experts] == [2, 2, 2, 2]
    torch.testing.assert_close(found, expected(model, x, ASKED, renormalize), **CLOSE)
    assert not torch.allclose(found, full)
    assert torch.equal(model.predict(x), found)
    assert torch.equal(model(x, routing=model.route(x)), found)


@pytest.mark.parametrize("executor", ["sequential", "threads"])
def test_experts_that_nobody_needs_are_not_called(executor):
    model = build(executor=executor)
    model.policy = hp.RoutingPolicy(top_mass=0.4)
    found = model(P.log()[[0, 3]])
    assert [expert.rows for expert in model.experts] == [1, 0, 1, 0]
    truth = build()
    truth.policy = hp.RoutingPolicy(k=1)
    torch.testing.assert_close(found, truth(P.log()[[0, 3]]), **CLOSE)


@pytest.mark.parametrize(
    ("trailing", "form"), [((), "grouped"), ((6,), "grouped"), ((6,), "by_row")]
)
def test_every_form_of_aggregate_leaves_dropped_slots_out(trailing, form):
    found = routing(0.7)
    outputs = torch.randn(8, 3, *trailing, dtype=torch.float64)
    matrix, bias = torch.randn(2, 12, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    concat = torch.zeros(4, 4, 3, *trailing, dtype=torch.float64)
    for row, slot in enumerate(found.rows.tolist()):
        n, j = divmod(slot, 3)
        concat[n, found.experts[n, j]] = found.weights[n, j] * outputs[row]
    torch.testing.assert_close(HF.combine(outputs, found), concat.flatten(1, 2), **CLOSE)
    truth = torch.einsum("oc,nc...->no...", matrix, concat.flatten(1, 2))
    truth = truth + bias.view(-1, *[1] * len(trailing))
    forms = {"grouped": (True, False), "by_row": (False, True)}
    ours = _torch_ops.aggregate(outputs, found.weights, found, matrix, bias, *forms[form])
    torch.testing.assert_close(ours, truth, **CLOSE)
    torch.testing.assert_close(HF.aggregate(outputs, found, matrix, bias), truth, **CLOSE)


def test_where_k_is_m_a_dropped_row_is_not_gathered():
    found = routing(0.7, k=4)
    x = torch.arange(4.0)[:, None].double()
    assert HF.gather(x, found).flatten().tolist() == [0, 2, 0, 1, 2, 3, 1, 2]
    out = torch.full((16, 1), -1.0, dtype=torch.float64)
    HF.gather_into(out, x, found)
    assert out.view(4, 4).tolist() == [
        [0, 2, -1, -1],
        [0, 1, -1, -1],
        [2, 3, -1, -1],
        [1, 2, -1, -1],
    ]


def test_training_follows_no_policy():
    model = build().train()
    model.policy = hp.RoutingPolicy(top_mass=0.1)
    assert model(P.log()).expert_outputs.shape == (12, 3)
    assert model.route(P.log(), noisy=False).rows.numel() == 12


def test_fixed_routes_keep_the_share_of_their_own_sum():
    model = build(k=3)
    model.generator = hp.FixedRoutes([3, 0, 2], [0.5, 1.0, 0.3], 4)  # 0.556, 0.278, 0.167
    x, concat = P.log(), torch.zeros(4, 12, dtype=torch.float64)
    concat[:, :3], concat[:, 9:] = model.experts[0](x), 0.5 * model.experts[3](x)
    for policy in (hp.RoutingPolicy(top_mass=0.8), hp.RoutingPolicy(k=2)):
        model.policy = policy
        # Their weights are float32 but for float64 samples.
        torch.testing.assert_close(model(x), model.aggregator(concat), **CLOSE)
    model.policy = hp.RoutingPolicy(top_mass=0.8, k=1)
    assert model.route(x).counts() == [4, 0, 0, 0]
    model.policy = hp.RoutingPolicy(penalty=[0, 0, 0, 0])
    with pytest.raises(ValueError, match=r"penalty: .* fixed routes"):
        model(x)


def test_what_is_stored_of_a_prediction_says_who_was_asked():
    model = build()
    model.policy = hp.RoutingPolicy(top_mass=0.7)
    task = Classification(("a", "b", "c"))
    _, weights = predict(model, task, [(P.log(), None)], "cpu")
    asked = [[i for i in range(4) if row[i] > 0] for row in weights]
    assert asked == [sorted(experts) for experts in ASKED]
    torch.testing.assert_close(weights.double(), dense_weights(routing(0.7)), rtol=1e-7, atol=0)
    meter = RouteMeter()
    meter.add(routing(0.7), torch.tensor([0, 1, 2, 0]))
    assert meter.result()["share"] == [0.5, 0.5, 0.5, 0.5]


def test_gradients_and_losses_are_refused_with_a_sentence():
    model = build()
    model.policy = hp.RoutingPolicy(top_mass=0.7)
    assert not model(P.log()).requires_grad
    with pytest.raises(ValueError, match=r"x: requires a gradient.*model.policy = None"):
        model(P.log().requires_grad_())
    found, outputs = routing(0.7), torch.randn(8, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="N\\*K = 12 rows of all slots for losses, got 8"):
        HF.exploit_loss(outputs, found, torch.tensor([0, 1, 2, 0]))
    with pytest.raises(ValueError, match="for gradients, got 8"):
        HF.combine(outputs.requires_grad_(), found)
    with pytest.raises(ValueError, match="for gradients, got 8"):
        HF.gather(P.log().requires_grad_(), found)
    with torch.no_grad():
        assert HF.combine(outputs, found).shape == (4, 12)
    with pytest.raises(ValueError, match="R = 8 rows as routed"):
        HF.combine(torch.randn(12, 3), found)
    model.policy = hp.RoutingPolicy(top_mass=0.7)
    with pytest.raises(ValueError, match="a policy routes without noise"):
        model(P.log(), eps=torch.zeros_like(P))


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"top_mass": 0}, "top_mass: expected a number above 0 and up to 1, got 0;"),
        ({"top_mass": 1.5}, "top_mass: .* got 1.5"),
        ({"top_mass": float("nan")}, "top_mass: .* got nan"),
        ({"penalty": [0.0, float("inf")]}, "penalty: expected a finite number for each expert"),
        ({"penalty": [1.0, 2.0]}, "penalty: expected 4 numbers, one for each expert, got 2"),
        ({"k": 0}, "k: expected an integer of at least 1, got 0"),
        ({"k": 4}, r"k: expected an integer in 1..3 .*got 4"),
        ({"mass": 0.5}, r"policy: expected top_mass, penalty and k, got \['mass'\]"),
    ],
)
def test_a_wrong_policy_says_what_is_allowed(values, says):
    model = build()

    def predict_with(policy):
        model.policy = hp.RoutingPolicy.from_dict(policy)
        model(P.log())

    with pytest.raises(ValueError, match=says):
        predict_with(values)


def test_a_description_has_the_policy():
    model = build()
    assert describe(model)["policy"] is None
    model.policy = hp.RoutingPolicy(0.9, [0.1, 0.2, 0.3, 0.4], 2)
    assert hp.RoutingPolicy.from_dict(describe(model)["policy"]) == model.policy
