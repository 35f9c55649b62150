"""The three forms of a hub, asked as plain modules: what the model says, and whom it asks."""

from __future__ import annotations

import pytest
import torch
from support.serving import MEAN, SIZE, STD, small_hub
from torch import nn

import hubpath_fast as hp
from hubpath_fast.serving.forms import FORMS, forwards, ladder, make_form

# The forms compute in another order than the model; of outputs near 1 in float64 these are a few
# roundings.
EXACT = {"rtol": 0, "atol": 1e-13}


def images(n, seed=1):
    random = torch.Generator().manual_seed(seed)
    flat = torch.randint(0, 256, (n, 3, 1, 1), generator=random)
    return (flat * torch.rand(n, 3, SIZE, SIZE, generator=random)).to(torch.uint8)


def double_hub(**options):
    """In float64, normalisation and all."""
    options = {"normalization": (MEAN.double(), STD.double()), **options}
    return small_hub(**options).double().eval()


def check_same(model, name, n):
    form, x = make_form(model, name, SIZE, probabilities=True, routing=True), images(n)
    with torch.no_grad():
        answer, experts, weights = form(x)
        routing = model.route(x)
        torch.testing.assert_close(answer, model(x).softmax(dim=1), **EXACT)
    assert torch.equal(experts, routing.experts)
    torch.testing.assert_close(weights, routing.weights, **EXACT)
    return form


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("n", [1, 2, 33])
def test_a_form_says_what_the_model_says(name, n):
    check_same(double_hub(), name, n)


@pytest.mark.parametrize("hub", [small_hub, double_hub])
def test_scores_are_moved_by_what_a_compiled_package_is_given(hub):
    """Its memory is filled with the bytes of a float32 tensor, whatever the hub's type."""
    form, x = make_form(hub().eval(), "dense", SIZE, probabilities=True, routing=True), images(4)
    assert (form.score_shift.dtype, form.score_shift.shape) == (torch.float32, (1, 3))
    form.score_shift.copy_(torch.tensor([0.0, 99.0, 0.0]))
    assert form(x)[1][:, 0].tolist() == [1] * 4


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("kind", ["sum", "mlp"])
def test_other_aggregators_and_renormalised_weights(name, kind):
    made = {"sum": hp.SumAggregator, "mlp": hp.MLPAggregator}[kind](3, 4)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    check_same(double_hub(aggregator=made, renormalize=True), name, 9)


@pytest.mark.parametrize("name", FORMS)
def test_channels_last_and_all_experts(name):
    model = double_hub(k=3).to(memory_format=torch.channels_last)
    assert check_same(model, name, 5).channels_last


def test_equal_scores_go_to_the_lowest_index():
    model = double_hub(generator=hp.PathwayGenerator(3, width=4))
    form = check_same(model, "sparse", 4)
    assert form(images(4))[1].tolist() == [[0, 1]] * 4


def test_fixed_routes_ask_their_experts_alone():
    model = double_hub()
    model.generator = hp.FixedRoutes([2, 0], [0.5, 0.75], 3)
    form = check_same(model, "dense", 6)
    assert ladder(model, None) == ("dense",)
    assert forwards(form, 6) == 12
    model.experts[1].register_forward_hook(lambda *_: pytest.fail("asked"))
    form(images(6))


class Counted(nn.Module):
    """Counts the images that it is asked about."""

    def __init__(self, body):
        super().__init__()
        self.body, self.seen = body, 0

    def forward(self, x):
        self.seen += len(x)
        return self.body(x)


def seen_by(form, x):
    """The images that go through each expert; torch.cond's branch is taken as Python would."""
    experts = [Counted(expert) for expert in form.experts]
    form.experts = nn.ModuleList(experts)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "cond", lambda wanted, run, skip, x: (run if wanted else skip)(*x))
        form(x)
    return [expert.seen for expert in experts]


@pytest.mark.parametrize(("name", "n", "total"), [("sparse", 8, 8 * 2 + 3), ("dense", 8, 24),
                                                   ("cond", 1, 2), ("cond", 8, 24)])  # fmt: skip
def test_as_many_forwards_as_the_package_says(name, n, total):
    form = make_form(small_hub().eval(), name, SIZE, True, False)
    x = images(n)
    if name == "cond" and n > 1:
        assert len(form(x[:1])) == 1
    assert sum(seen_by(form, x)) == forwards(form, n) == total


def test_a_batch_of_one_tries_cond_first():
    model = small_hub()
    assert ladder(model, None) == ("sparse", "cond", "dense")
    assert ladder(model, 1) == ("cond", "sparse", "dense")
