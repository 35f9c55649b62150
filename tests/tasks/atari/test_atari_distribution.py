"""Projection, double-Q target and loss, against plain Python in float64."""

import math

import pytest
import torch
import torch.nn.functional as F

from hubpath_fast.tasks.atari import categorical_loss, categorical_projection, double_q_target
from hubpath_fast.tasks.atari.distribution import expected_values, greedy_actions, make_atoms

F64 = torch.float64


def project(probabilities, returns, discounts, v_min, v_max):
    """Each value's mass goes to the atoms beside it, one value at a time."""
    rows = []
    for p, r, g in zip(probabilities.tolist(), returns.tolist(), discounts.tolist(), strict=True):
        z, row = len(p), [0.0] * len(p)
        delta = (v_max - v_min) / (z - 1)
        for i, mass in enumerate(p):
            place = (min(max(r + g * (v_min + i * delta), v_min), v_max) - v_min) / delta
            below = min(math.floor(place), z - 2)
            row[below] += mass * (below + 1 - place)
            row[below + 1] += mass * (place - below)
        rows.append(row)
    return torch.tensor(rows, dtype=F64)


def drawn(n, z, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    probabilities = torch.randn(n, z, generator=generator, dtype=F64).mul(2).softmax(1)
    returns = torch.randn(n, generator=generator, dtype=F64) * 4
    discounts = 0.99 ** torch.randint(1, 21, (n,), generator=generator).double()
    discounts[::5] = 0
    return tuple(t.to(dtype) for t in (probabilities, returns, discounts))


@pytest.mark.parametrize(("z", "v_min", "v_max"), [(51, -10, 10), (2, -1, 1), (7, 0.5, 30)])
def test_projection_equals_the_loop(z, v_min, v_max):
    inputs = drawn(64, z)
    found = categorical_projection(*inputs, v_min, v_max)
    assert found.dtype == F64
    torch.testing.assert_close(found, project(*inputs, v_min, v_max), rtol=1e-12, atol=1e-14)


def test_projection_in_float32_keeps_the_mass():
    """Two roundings of shares and a sum of 51: mass within 1e-6, values within some 2^-22."""
    inputs = drawn(256, 51, torch.float32)
    found = categorical_projection(*inputs, -10, 10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.sum(1), inputs[0].sum(1), rtol=0, atol=1e-6)
    expected = project(*inputs, -10, 10).float()
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-7)
    assert (found >= 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_return_on_an_atom_keeps_all_its_mass_there(dtype):
    """The usual code loses it: floor and ceiling are the same atom, and both shares are 0."""
    atoms = make_atoms(51, -10, 10, dtype=F64)
    p = torch.full((51, 51), 1 / 51, dtype=dtype)
    found = categorical_projection(p, atoms.to(dtype), torch.zeros(51), -10, 10)
    # A terminal: all the mass at the return. In float32 a return of 0.4 is not quite an atom.
    torch.testing.assert_close(found, torch.eye(51, dtype=dtype), rtol=0, atol=1e-6)
    assert found[25, 25] == pytest.approx(1, abs=1e-6)
    # Nothing earned, nothing discounted: the distribution itself, to the bit where it is one-hot.
    one_hot = torch.eye(51, dtype=dtype)
    same = categorical_projection(one_hot, torch.zeros(51), torch.ones(51), -10, 10)
    torch.testing.assert_close(same, one_hot, rtol=0, atol=1e-12)


def test_shifts_scales_and_edges():
    p = torch.tensor([[0.1, 0.2, 0.4, 0.2, 0.1]], dtype=F64)  # atoms -2 .. 2

    def of(r, g):
        found = categorical_projection(p, torch.tensor([r]), torch.tensor([g]), -2, 2)
        return pytest.approx(found[0].tolist(), abs=1e-9)

    assert of(1.0, 1.0) == [0, 0.1, 0.2, 0.4, 0.3]  # the last two meet at the edge
    assert of(0.5, 1.0) == [0.05, 0.15, 0.3, 0.3, 0.2]
    assert of(0.0, 0.5) == [0, 0.2, 0.6, 0.2, 0]
    assert of(-1.25, 0.0) == [0.25, 0.75, 0, 0, 0]  # a terminal: the return itself
    assert of(100.0, 0.0) == [0, 0, 0, 0, 1]
    assert of(-100.0, 1.0) == [1, 0, 0, 0, 0]
    assert of(2.0, 0.0) == [0, 0, 0, 0, 1]
    assert of(-2.0, 0.0) == [1, 0, 0, 0, 0]
    # Of n steps the discount is gamma ** n; the mean is R + g * mean while nothing is cut off.
    found = categorical_projection(p, torch.tensor([0.3]), torch.tensor([0.5**3]), -2, 2)
    mean = (found[0] * torch.tensor([-2.0, -1, 0, 1, 2])).sum()
    assert mean.item() == pytest.approx(0.3, abs=1e-7)


def test_projection_gives_no_gradient():
    p, r, g = drawn(3, 5)
    found = categorical_projection(p.requires_grad_(), r.requires_grad_(), g, -1, 1)
    assert not found.requires_grad


@pytest.mark.parametrize(
    ("p", "r", "g", "bounds", "message"),
    [
        ((3, 2, 5), (3,), (3,), (-1, 1), r"probabilities: expected floats \[N, Z\]"),
        ((3, 5), (3, 1), (3,), (-1, 1), r"returns: expected \[3\], one a state, got \[3, 1\]"),
        ((3, 5), (3,), (2,), (-1, 1), r"discounts: expected \[3\]"),
        ((3, 1), (3,), (3,), (-1, 1), "num_atoms: expected at least 2, got 1"),
        ((3, 5), (3,), (3,), (1, 1), "v_min, v_max: expected two finite numbers in order"),
        ((3, 5), (3,), (3,), (-1, math.inf), "v_min, v_max"),
    ],
)
def test_projection_refuses(p, r, g, bounds, message):
    with pytest.raises(ValueError, match=message):
        categorical_projection(torch.rand(p), torch.rand(r), torch.rand(g), *bounds)
    with pytest.raises(ValueError, match="probabilities: expected floats"):
        categorical_projection(torch.ones(3, 5, dtype=torch.int64), *torch.rand(2, 3), -1, 1)


def test_target_takes_the_action_of_the_online_network_and_values_it_by_the_target():
    n, a, z = 16, 4, 11
    online, target = torch.randn(2, n, a, z, dtype=F64).mul(3)
    _, returns, discounts = drawn(n, z)
    found = double_q_target(online, target, returns, discounts, -3, 5)
    atoms = [-3 + 8 * i / (z - 1) for i in range(z)]
    chosen = []
    for row in range(n):
        values = []
        for action in range(a):
            weights = [math.exp(value) for value in online[row, action].tolist()]
            total = sum(w * atom for w, atom in zip(weights, atoms, strict=True))
            values.append(total / sum(weights))
        chosen.append(target[row, values.index(max(values))].softmax(0))
    expected = project(torch.stack(chosen), returns, discounts, -3, 5)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    # Not the best by the target's own values, or by the highest logit:
    assert not torch.equal(found, double_q_target(target, target, returns, discounts, -3, 5))


@pytest.mark.parametrize("atoms", [2, 51, 64])
@pytest.mark.parametrize("actions", [2, 3, 18, 33])
def test_the_first_of_equal_actions_is_taken(atoms, actions):
    """Equal logits are equal values wherever they stand, and the first of the best is taken."""
    row = torch.randn(5, 1, atoms)
    online = row.expand(5, actions, atoms).contiguous()
    online[1, 0] = torch.linspace(
        5, -5, atoms
    )  # worse, so that the second is the first among equals
    values = expected_values(online, make_atoms(atoms, -10, 10))
    assert (values[0] == values[0, 0]).all()
    assert greedy_actions(values).tolist() == [0, 1, 0, 0, 0]
    target = torch.randn(5, actions, atoms)
    found = double_q_target(online, target, torch.zeros(5), torch.ones(5), -10, 10)
    first = target[[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]].softmax(1)
    torch.testing.assert_close(found, first, rtol=0, atol=1e-6)


def test_a_value_that_is_no_number_is_no_index_out_of_range():
    assert greedy_actions(torch.tensor([[math.nan, 1, 2]])).tolist() == [2]


@pytest.mark.gpu
def test_the_first_of_equal_actions_is_taken_on_a_gpu():
    values = torch.zeros(4096, 18, device="cuda")
    assert greedy_actions(values).max() == 0
    online = torch.randn(64, 1, 51, device="cuda").expand(64, 18, 51).contiguous()
    assert greedy_actions(expected_values(online, make_atoms(51, -10, 10, "cuda"))).max() == 0


@pytest.mark.gpu
def test_a_gpu_projects_as_the_loop_does_and_repeats():
    inputs = drawn(256, 51, torch.float32)
    found = [categorical_projection(*(t.cuda() for t in inputs), -10, 10) for _ in range(2)]
    assert torch.equal(*found)
    expected = project(*inputs, -10, 10).float()
    torch.testing.assert_close(found[0].cpu(), expected, rtol=0, atol=5e-7)


def test_loss_is_the_cross_entropy_of_what_was_done():
    logits = torch.randn(6, 4, 9, dtype=F64, requires_grad=True)
    actions = torch.tensor([0, 3, 1, 2, 2, 0])
    target = torch.randn(6, 9, dtype=F64).softmax(1)
    found = categorical_loss(logits, actions, target)
    expected = F.cross_entropy(logits[range(6), actions], target, reduction="none")
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for row in range(6):
        values = logits[row, actions[row]].tolist()
        total = math.log(sum(map(math.exp, values)))
        by_hand = -sum(t * (v - total) for t, v in zip(target[row].tolist(), values, strict=True))
        assert found[row].item() == pytest.approx(by_hand, rel=1e-12)
    found.sum().backward()
    probabilities = logits.detach()[range(6), actions].softmax(1)
    assert torch.allclose(logits.grad[range(6), actions], probabilities - target)
    done = torch.zeros(6, 4, dtype=torch.bool)
    done[range(6), actions] = True
    assert logits.grad[~done].abs().max() == 0


def test_loss_of_half_precision_is_computed_in_float32():
    logits = torch.randn(3, 2, 51).bfloat16()
    target, actions = torch.rand(3, 51).softmax(1), torch.tensor([0, 1, 1])
    found = categorical_loss(logits, actions, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, categorical_loss(logits.float(), actions, target))


def test_loss_refuses():
    logits, actions, target = torch.rand(3, 2, 5), torch.tensor([0, 1, 1]), torch.rand(3, 5)
    for arguments, message in (
        ((logits[0], actions, target), r"logits: expected floats \[N, A, Z\]"),
        ((logits, actions[:2], target), r"actions: expected int64 \[3\] as logits"),
        ((logits, actions.int(), target), "actions: expected int64"),
        ((logits, actions, target[:, :4]), r"target: expected probabilities \[3, 5\] as logits"),
        ((logits, actions, target.long()), "target: expected probabilities"),
        ((logits, torch.tensor([0, 2, 1]), target), r"actions: expected 0\.\.1 of 2 .*got 2"),
        ((logits, torch.tensor([0, -1, 1]), target), r"actions: expected 0\.\.1.*got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            categorical_loss(*arguments)
    with pytest.raises(ValueError, match=r"target_logits: expected \[3, 2, 5\] as online_logits"):
        double_q_target(logits, logits[:, :1], target[:, 0], target[:, 0], -1, 1)
