"""The generator as captured graphs: the eager results, and eagerly wherever it must be."""

import pytest
import torch
from support.graphs import FakeBackend, assert_same, backward, fixed_routing, grads
from support.models import M, batch, build
from support.tape_backend import TapeBackend
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import RowSource
from hubpath_fast.executors.graphs import MIN_SEEN, GraphsExecutor


def routed(model, x):
    """Gradients and buffers of the generator after a backward pass through the routing."""
    model.generator.zero_grad(set_to_none=True)
    routing = model.route(x, torch.zeros(len(x), M))
    (routing.weights.sum() + (routing.mean * torch.arange(M)).sum()).backward()
    return grads(model.generator) | dict(model.generator.named_buffers())


def sizes(model, what="training"):
    """Of the generator's graphs, as the report says."""
    start = f"the generator: {what} at sizes "
    notes = [n for n in model.executor_report().notes if n.startswith(start)]
    return notes[0].removeprefix(start) if notes else None


def both(model, generator):
    """The model, which captures graphs, and one that does not, of equal generators."""
    plain = build("sequential")
    model.generator, plain.generator = generator(), generator()
    return model, plain


class Own(nn.Module):
    """A generator of the user's: its scores of what two layers make of the images."""

    def __init__(self, scores):
        super().__init__()
        torch.manual_seed(5)
        self.linear, self.scale = nn.Linear(3 * 64, M), nn.Parameter(torch.ones(M))
        self.scores = scores

    def forward(self, x):
        return self.scores(self.linear(x.flatten(1)), self.scale)


class Compared(Own):
    """Couples samples: its scores are relative to the batch's."""

    def __init__(self):
        super().__init__(lambda clean, _: (clean - clean.mean(0), torch.zeros_like(clean)))


GENERATORS = {
    "usual": lambda: build().generator,
    "one score needs no gradient": lambda: Own(lambda clean, _: (clean, torch.zeros_like(clean))),
    "couples samples": Compared,
    "a constant": lambda: Own(lambda clean, scale: (clean, scale.expand_as(clean))),
}
usual = GENERATORS["usual"]


def assert_routed_alike(model, plain, sizes):
    """To the bit, by batches of these sizes."""
    for i, n in enumerate(sizes):
        x, _ = batch(n, seed=i)
        assert_same(routed(model, x), routed(plain, x))


@pytest.mark.parametrize(
    ("backend", "kind"),
    [(FakeBackend, kind) for kind in GENERATORS] + [(TapeBackend, "usual")],
)
def test_its_replays_give_the_eager_bits_and_move_its_buffers_once(backend, kind):
    model, plain = both(build(GraphsExecutor(backend)), GENERATORS[kind])
    assert_routed_alike(model, plain, [24] * (MIN_SEEN + 2))
    assert sizes(model) == "[24]"
    assert model.executor._backend.captures == 2


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_predictions_have_graphs_of_their_own_that_see_the_batchs_samples_only(make, mode, kind):
    model, plain = (m.eval() for m in both(make(), GENERATORS[kind]))
    with mode():
        for i in range(MIN_SEEN + 1):
            x, _ = batch(25, seed=i)  # which an expert's rows would be padded to 28
            assert torch.equal(model.route(x).weights, plain.route(x).weights)
    assert (sizes(model), sizes(model, "predictions")) == (None, "[25]")
    assert model.executor._backend.captures == 1


def test_a_smaller_last_batch_runs_eagerly(make):
    model, plain = both(make(), usual)
    assert_routed_alike(model, plain, [24] * MIN_SEEN + [7, 24])
    assert sizes(model) == "[24]"


def test_a_second_forward_before_the_backward_of_the_first_runs_eagerly(make):
    model, plain = both(make(), usual)
    assert_routed_alike(model, plain, [24] * MIN_SEEN)
    for each in (model, plain):
        each.generator.zero_grad(set_to_none=True)
        first, second = (each.route(batch(seed=s)[0], torch.zeros(24, M)) for s in (1, 2))
        (first.weights.sum() + second.weights.sum()).backward()
    assert_same(grads(model.generator), grads(plain.generator))


def test_another_generator_and_one_with_hooks_are_never_replayed_from_the_old_graphs(make):
    model = make()
    x, _ = batch()
    for _ in range(MIN_SEEN):
        routed(model, x)
    model.generator = hp.PathwayGenerator(M, width=4)
    routed(model, x)
    assert sizes(model) is None
    calls = []
    model.generator.register_forward_hook(lambda *args: calls.append(1))
    for _ in range(MIN_SEEN + 1):
        routed(model, x)
    assert len(calls) == MIN_SEEN + 1
    hooked = "the generator: eager, has hooks, which a replay would not call (on itself)"
    assert hooked in model.executor_report().notes


def test_it_is_not_counted_among_the_experts(make):
    model = make()
    for _ in range(MIN_SEEN + 1):
        routed(model, batch()[0])
    report = model.executor_report()
    assert (report.hits, report.misses, report.captured, report.eager) == (0, 0, {}, {})
    assert report.memory == 200 + batch()[0].nbytes  # its two graphs', and what they read


def test_its_failed_captures_are_told_and_then_given_up(make):
    model = make()
    routed(model, batch()[0])
    model.executor._backend.fail = RuntimeError("not permitted")
    for _ in range(MIN_SEEN):
        routed(model, batch()[0])
    failed = "the generator: a capture failed (RuntimeError: not permitted); it is tried once more"
    assert failed in model.executor_report().notes
    for _ in range(3 * MIN_SEEN):
        routed(model, batch()[0])
    given_up = "the generator: eager, cannot be captured: RuntimeError: not permitted"
    assert model.executor_report().notes == (given_up,)


def test_its_pending_backward_does_not_keep_rows_from_their_buffers(make, monkeypatch):
    model = make()
    x, y = batch()
    eps = torch.zeros(24, M)

    def step():
        model.zero_grad(set_to_none=True)
        hp.HubPathwayLoss()(model(x, eps, target=y), y).total.backward()

    for _ in range(2 * MIN_SEEN):  # the same routing each time, up to what the steps move it
        step()
    assert sizes(model) == "[24]"
    monkeypatch.setattr(RowSource, "rows", lambda source: pytest.fail("rows were gathered apart"))
    step()
    assert model.executor_report().hits > 0


@pytest.mark.parametrize("layout", ["samples inside", "expanded", "every second", "channels last"])
def test_batches_of_any_layout_are_read_as_they_are(make, layout):
    def arranged(x):
        return {
            "samples inside": lambda: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
            "expanded": lambda: x[:, :1].expand(-1, 3, -1, -1),
            "every second": lambda: x[::2],
            "channels last": lambda: x.contiguous(memory_format=torch.channels_last),
        }[layout]()

    model, plain = both(make(), usual)
    # A larger batch comes first, and is captured first, from one of the others.
    for i, n in enumerate([30, *[24] * (MIN_SEEN + 2), 30, 30]):
        x = arranged(batch(n, seed=i)[0])
        assert_same(routed(model, x), routed(plain, x))
    assert sizes(model) == {"every second": "[12, 15]"}.get(layout, "[24, 30]")
    input_bytes = {"every second": 12 + 15}.get(layout, 24 + 30) * 768
    assert model.executor_report().memory == 400 + input_bytes


def test_what_no_gradient_reaches_gets_none_as_it_does_eagerly(make):
    """Without noise the noise head has no part in it: no decay must move its weights."""
    model, plain = make(), build("sequential")
    for i in range(MIN_SEEN + 2):
        found = []
        for each in (model, plain):
            each.generator.zero_grad(set_to_none=True)
            each.eval().route(batch(seed=i)[0]).weights.sum().backward()
            found.append(grads(each.generator))
        assert found[0]["noise.weight"] is None
        assert_same(*found)
    assert sizes(model, "evaluation, with gradients") == "[24]"


def test_over_budget_experts_lose_their_graphs_before_the_generator(make, no_estimate):
    # The generator's two graphs and what they read take 18,632 bytes, an expert's at 6 rows 4,808.
    model = make(budget=18_632 + 2 * 4_808)
    x, y = batch()
    for _ in range(2 * MIN_SEEN):
        model.route(x)
        backward(model, x, y, fixed_routing(model))
    assert sizes(model) == "[24]"
    assert 0 < len(model.executor_report().captured) <= 2


class Counting(Compared):
    """Its scores depend on how often it has run."""

    def __init__(self):
        super().__init__()
        self.steps = 0

    def forward(self, x):
        self.steps += 1
        clean, noise = super().forward(x)
        return clean * self.steps, noise


class WithLoss(Compared):
    """Leaves a loss of its own for the training loop."""

    def forward(self, x):
        clean, noise = super().forward(x)
        self.aux_loss = clean.square().mean()
        return clean, noise


@pytest.mark.parametrize(("kind", "kept"), [(Counting, "steps"), (WithLoss, "aux_loss")])
def test_one_that_keeps_something_from_step_to_step_is_never_captured(make, kind, kept):
    model, plain = both(make(), kind)
    assert_routed_alike(model, plain, [24] * (MIN_SEEN + 2))
    why = f"the generator: eager, keeps {kind.__name__}.{kept} for later, which a replay would not"
    assert model.executor_report().notes == (why,)
