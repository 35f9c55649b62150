"""``bench.emulated.kernels`` leaves no kernel out, and cuts sizes down to what takes seconds."""

from __future__ import annotations

import contextlib

import pytest
from hubpath_fast.kernels._tiles import expert_of

from bench.check_operations import CASES
from bench.emulated.checks import LARGEST, checks, smaller
from bench.emulated.kernels import entry_kernels
from bench.inputs import Size, batch_norm
from bench.no_device import cpu_tensors_go_to_kernels

SIZES = [size for _, sizes in CASES.values() for size in sizes]


def test_every_kernel_is_launched_by_a_check(monkeypatch):
    launched = set()
    monkeypatch.setattr(
        type(expert_of), "run", lambda self, *_, **__: launched.add(self.fn.__name__)
    )
    with cpu_tensors_go_to_kernels():
        for name, check in checks().items():
            if not name.startswith("images 48"):  # another size of images launches the same
                with contextlib.suppress(Exception):  # nothing was computed
                    check(lambda *_, **__: None)
    assert launched >= entry_kernels()


def test_kernels_that_are_launched_are_told_from_functions_of_kernels():
    found = entry_kernels()
    assert {"route_kernel", "_gather_kernel", "_heads_forward", "_total_loss"} <= found
    assert not found & {"perturbed", "draw", "expert_of", "sum_of_partials"}


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_sizes_are_cut_down_to_the_limit(size):
    small = smaller(size)
    rows = small.n if small.norm else small.n * small.k
    assert max(rows * small.c * small.positions, small.n * small.m) <= LARGEST
    assert small.n >= 3
    assert len(small.trailing) == len(size.trailing)
    if size.norm:
        assert 0 < small.norm.valid <= small.n
        assert (small.norm.valid < small.n) == (size.norm.valid < size.n)


def test_small_sizes_stay_as_they_are_and_odd_ones_odd():
    assert smaller(Size(48, 5, 2, 100)) == Size(48, 5, 2, 100)
    assert smaller(Size(4097, 7, 3, 53)).n % 2 == 1
    ragged = batch_norm(17, 19, 37, 5, 9, activation="relu6")
    assert smaller(ragged) == ragged
