"""Heads of all experts on features that lie there, and their update, against loops over experts."""

from __future__ import annotations

import pytest
import torch
from hubpath_fast.kernels import head_table
from hubpath_fast.kernels.head_update import plan_update
from support.head_cases import (
    CASES,
    FP16,
    FP32,
    FP64,
    Case,
    Problem,
    assert_exact,
    check_updates,
    results,
)  # fmt: skip

pytestmark = pytest.mark.either
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)


@pytest.mark.parametrize(
    ("dtype", "features"),
    [(FP32, FP16), (FP32, FP32), (FP64, FP16), (FP16, FP16), (torch.bfloat16, FP32)],
    ids=str,
)
@every_case
def test_outputs_and_gradients_are_those_of_a_loop_over_experts(case, dtype, features, device):
    assert_exact(Problem(case, dtype, features, device))


@every_case
def test_experts_with_rows_are_marked_and_the_others_have_gradients_of_zero(case, device):
    problem = Problem(case, FP32, FP16, device)
    d_weights, d_biases = problem.split(results(problem)[1])
    asked = [len(own) > 0 for own in problem.own]
    assert problem.touched.tolist() == [int(a) for a in asked]
    for i, (weight, has_rows) in enumerate(zip(d_weights, asked, strict=True)):
        assert bool(weight.any()) == has_rows
        assert bool(d_biases[i].any()) == has_rows


def test_features_get_no_gradient_and_a_second_derivative_is_refused(device):
    problem = Problem(CASES[0], FP32, FP32, device)
    problem.flat.requires_grad_()
    out = problem()
    gradients = torch.autograd.grad(
        out.square().sum(), [problem.parameters, problem.flat], create_graph=True, allow_unused=True
    )
    assert gradients[1] is None
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradients[0].square().sum().backward()


def test_numbers_are_read_as_they_read(device):
    problem = Problem(CASES[0], FP32, FP32, device)
    expected = results(problem)
    numbers = problem.numbers.double()
    problem.numbers = torch.stack([numbers, numbers + 1], dim=1)[:, 0]
    assert all(map(torch.equal, results(problem), expected))
    problem.numbers = problem.numbers[:1].expand(len(problem.numbers))
    spread = results(problem)
    problem.numbers = problem.numbers.clone()
    assert all(map(torch.equal, results(problem), spread))


def test_repeats_are_bit_equal(device):
    problem = Problem(Case("", (130, 64, 16), n=40, c=37), FP32, FP16, device)
    first, second = results(problem), results(problem)
    assert all(map(torch.equal, first, second))


def test_the_launches_are_one_and_one_whatever_the_number_of_experts(launches, device):
    for m in (1, 5, 40):
        problem = Problem(Case("", (16,) * m, k=1), FP32, FP16, device)
        out = problem()
        assert launches == ["_heads_forward"]
        torch.autograd.grad(out, problem.parameters, problem.d_out)
        assert launches == ["_heads_forward", "_heads_backward"]
        launches.clear()


def test_the_table_counts_in_the_largest_unit_that_all_parts_are_multiples_of():
    found = head_table([0, 64, 88], [32, 8, 16], 3)
    assert found.table.tolist() == [[0, 8, 11], [0, 12, 15], [4, 1, 2]]
    assert found[1:] == (3, 8, 32)
    assert head_table([0, 37], [37, 2], 3).vec == 1
    assert head_table([0], [1024], 3).vec == 16


@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
def test_updates_are_those_of_adamw_for_experts_with_rows_and_none_for_the_others(dtype, device):
    check_updates(dtype, device)


def test_biases_are_updated_by_as_many_programs_as_they_take(device):
    check_updates(FP64, device, c=1100)


def test_no_program_updates_more_of_many_classes_than_of_few():
    def sizes(c):
        plan = plan_update(
            *4 * [torch.empty(2 * c * 5, device="meta")],
            torch.empty(3, 2, device="meta"), *4 * [None], 0.9, 0.999, 1e-8, c, 1, 4, 0.0, 0.0,
        )  # fmt: skip
        return [
            {k: v for k, v in launch.values.items() if k.startswith("BLOCK")}
            for launch in plan.launches
        ]

    assert sizes(21_843) == sizes(10)  # as ImageNet-21k
