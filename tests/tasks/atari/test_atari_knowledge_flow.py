"""Knowledge Flow as a policy, against its formulas written out in float64."""

import pytest
import torch
import torch.nn.functional as F
from support.rivals import (
    CLOSE,
    A,
    N,
    Z,
    atoms,
    batch,
    head,
    moved_flow,
    plain_noisy,
    sources,
)

from hubpath_fast.baselines.knowledge_flow import LOGIT_TRAVEL
from hubpath_fast.tasks.atari import categorical_loss, draw_noise
from hubpath_fast.tasks.atari.noisy import NoisyLinear
from hubpath_fast.tasks.atari.rivals import (
    KnowledgeFlowPolicy,
)


def written_out(policy, networks, student, states):
    """Logits of the helped student, layer by layer, in training mode."""
    gain = LOGIT_TRAVEL / (100 * policy.lr)
    exponents = (policy.flow.start + gain * policy.flow.travel).exp()
    weights = exponents / exponents.sum(1, keepdim=True)

    def depth(level, own, theirs):
        total = weights[level, 0] * own
        for t, outputs in enumerate(theirs):
            matrix = policy.flow.projections[level][t].weight
            total = total + weights[level, 1 + t] * torch.einsum("oi,...i->...o", matrix, outputs)
        return total

    x = states.double() / 255
    x = student.patches.pack(x).transpose(1, 2).flatten(2)
    own, theirs = x, [x] * len(networks)
    for level, name in enumerate(("first", "second")):
        apply = [getattr(net.trunk, name) for net in (student, *networks)]
        outputs = [
            F.relu(F.linear(h, layer.weight, layer.bias))
            for h, layer in zip((own, *theirs), apply, strict=True)
        ]
        own, theirs = depth(level, outputs[0], outputs[1:]), outputs[1:]
        reshape = student.trunk.by_block if name == "first" else lambda h: h.flatten(1)
        own, theirs = reshape(own), [reshape(h) for h in theirs]
    hidden = []
    for level, name in ((2, "value_hidden"), (3, "advantage_hidden")):
        mine = F.relu(plain_noisy(getattr(student, name), own))
        taught = [
            F.relu(F.linear(h, getattr(net, name).weight_mu, getattr(net, name).bias_mu))
            for h, net in zip(theirs, networks, strict=True)
        ]
        hidden.append(depth(level, mine, taught))
    return head(student, *hidden), weights


@pytest.mark.parametrize("count", [1, 3])
def test_the_helped_student_is_the_formula_layer_by_layer(count):
    policy = moved_flow(count)
    states, *_ = batch()
    expected, weights = written_out(policy, sources(count), policy.student, states)
    torch.testing.assert_close(policy(states), expected, **CLOSE)
    torch.testing.assert_close(policy.flow.weights(), weights, **CLOSE)


def test_the_student_is_alone_in_evaluation():
    policy = moved_flow().eval()
    for part in (*policy.teachers.modules(), *policy.flow.projections.modules()):
        part.register_forward_hook(lambda *_: pytest.fail("a teacher ran"))
    states, *_ = batch()
    assert torch.equal(policy(states), sources()[0].eval()(states))


def some_update(policy):
    with torch.no_grad():
        for name, parameter in policy.flow.named_parameters():
            scale = 0.05 / policy.flow.gain if name == "travel" else 0.05
            parameter.add_(scale * torch.randn_like(parameter))


def test_losses_by_hand():
    """The first call has no change to see; later ones see the update before them, and no more."""
    policy = moved_flow(dependency=0.75, keep=0.4)
    states, actions, target, weights = batch()
    first = policy.losses(states, actions, target, weights)
    assert abs(first.terms["keep"]) < 1e-12
    some_update(policy)
    policy.losses(states, actions, target, weights)
    before = policy(states).detach()
    some_update(policy)
    found = policy.losses(states, actions, target, weights)

    now, w = written_out(policy, sources(), policy.student, states)
    task = categorical_loss(now, actions, target)
    torch.testing.assert_close(found.task, task, **CLOSE)
    dependency = -w[:, 0].log().sum()
    keep = 0
    for n in range(N):
        for a in range(A):
            p, q = before[n, a].softmax(0), now[n, a].softmax(0)
            keep = keep + sum(p[z] * (p[z] / q[z]).log() for z in range(Z)) / (N * A)
    assert keep > 1e-3
    rise = 0.25 / 0.5
    total = (weights * task).mean() + 0.75 * rise * dependency + 0.4 * keep
    torch.testing.assert_close(found.total, total, **CLOSE)
    torch.testing.assert_close(found.terms["dependency"], dependency, **CLOSE)
    torch.testing.assert_close(found.terms["keep"], keep, **CLOSE)
    torch.testing.assert_close(found.terms["own"], w[:, 0].log().mean().exp(), **CLOSE)
    assert not any(value.requires_grad for value in (found.task, *found.terms.values()))

    # Gradients: of the written-out loss, but for the gain on what is learned in the logits' place.
    wanted = torch.autograd.grad(total, list(policy.flow.parameters()))
    found.total.backward()
    gain = LOGIT_TRAVEL / (100 * policy.lr)
    for (name, parameter), expected in zip(policy.flow.named_parameters(), wanted, strict=True):
        expected = expected / gain if name == "travel" else expected
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-7, atol=1e-9, msg=name)
    assert all(p.grad is None for p in policy.teachers.parameters())


def test_new_noise_alone_is_no_change():
    """The earlier parameters run under the noise of now."""
    policy = moved_flow()
    generator = torch.Generator().manual_seed(5)
    for _ in range(2):
        draw_noise(policy, generator)
        assert abs(policy.losses(*batch()).terms["keep"]) < 1e-12
    with torch.no_grad():
        policy.student.value_out.weight_mu.add_(
            torch.randn_like(policy.student.value_out.weight_mu)
        )
    assert policy.losses(*batch()).terms["keep"] > 1e-3


def test_the_weights_go_to_the_student_over_a_run_of_any_length():
    """By Adam at the rate of all; in the first half teachers help, in the end hardly any does.

    The dependency is all that pulls here: its gradient has one sign, so that a logit moves by
    LOGIT_TRAVEL in a run, less what Adam's start takes."""
    for steps in (20, 80):
        policy = KnowledgeFlowPolicy(sources(), atoms(), lr=1e-3, keep=0)
        assert policy.flow.weights()[:, 0].tolist() == pytest.approx([0.5] * 4)
        assert policy.flow.weights()[:, 1:].flatten().tolist() == pytest.approx([0.25] * 8)
        optimizer = torch.optim.Adam([policy.flow.travel], 1e-3, eps=1.5e-4)
        states, actions, target, weights = batch()
        rises = []
        for step in range(steps):
            policy.set_progress(step, steps)
            rises.append(policy.rise.item())
            losses = policy.losses(states, actions, target, 0 * weights)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
        quarter = steps // 4
        assert [rises[0], rises[quarter], rises[2 * quarter], rises[-1]] == [0, 0.5, 1, 1]
        assert (policy.flow.weights()[:, 0] > 0.995).all()


def test_noise_is_drawn_for_the_student_alone():
    policy = moved_flow(3)
    layers = [layer for layer in policy.modules() if isinstance(layer, NoisyLinear)]
    assert len(layers) == 4
    assert {id(layer) for layer in layers} < {id(layer) for layer in policy.student.modules()}
