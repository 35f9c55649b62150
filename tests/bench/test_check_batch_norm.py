"""BatchNorm's own checks on a CPU: kernels interpreted, a graph by a stand-in, wrong ones seen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from bench import check_batch_norm, check_kernels, operations
from bench.inputs import batch_norm
from hubpath_fast import functional as HF

pytestmark = pytest.mark.usefixtures("interpreted")
RAGGED = batch_norm(5, 7, 3, 2, 5, activation="relu", residual=True)
SIZES = {
    "residual": RAGGED,
    "contiguous": batch_norm(6, 9, 5, 3, 3, dtype="float16", activation="hardswish",
                             layout="contiguous"),
    "features": batch_norm(7, 7, 8, dtype="bfloat16", activation="silu"),
}  # fmt: skip


def again(function):  # stands for a graph
    return function


def cases(*sizes):
    return [("batch norm", "masked_batch_norm", size) for size in sizes]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("size", SIZES.values(), ids=list(SIZES))
def test_layers_that_are_right_are_ok(size, backend, write, device):
    arguments = (write, cases(size), device.type, backend)
    check_kernels.values(*arguments)
    check_batch_norm.statistics(*arguments)
    check_batch_norm.replays(*arguments, again)
    assert [(row["name"].split(" batch norm")[0], row["ok"]) for row in write] == [
        (f"batch norm {size.numbers}" + {"float32": "", "float16": " fp16", "bfloat16": " bf16"}[
            size.dtype], True), ("statistics", True), ("recount", True),
    ], write  # fmt: skip


@pytest.fixture
def wrong(monkeypatch):
    """Lets the public operation do something else after, or instead of, what is right."""
    right = HF.masked_batch_norm

    def become(function):
        monkeypatch.setattr(HF, "masked_batch_norm", lambda *a: function(right, *a))

    return become


def biased(right, x, count, weight, bias, mean, var, *rest):
    """Moves the variance by the biased one."""
    y = right(x, count, weight, bias, mean, var, *rest)
    n = int(count) * x[0, 0].numel()
    var.sub_(1).mul_((n - 1) / n).add_(1)
    return y


def uncounted(right, *arguments):
    return right(*arguments[:11], None)


def test_statistics_that_are_off_are_named(write, wrong):
    wrong(biased)
    check_batch_norm.statistics(write, cases(RAGGED), "cpu", "torch")
    assert "running variance, momentum 0.1: off by" in write[0]["note"]
    del write[:]
    wrong(uncounted)
    check_batch_norm.statistics(write, cases(RAGGED), "cpu", "torch")
    assert write[0]["note"] == "3 batches are counted, not 4"


def test_a_capture_that_keeps_its_count_is_seen(write, monkeypatch):
    call = check_batch_norm._call
    monkeypatch.setattr(
        check_batch_norm, "_call",
        lambda operation, count, *rest: call(operation, count.clone(), *rest),
    )  # fmt: skip
    check_batch_norm.replays(write, cases(RAGGED), "cpu", "torch", again)
    assert write[0]["note"].startswith("7 rows: y is not the eager one")


def test_padding_that_counts_is_seen(write, wrong):
    """Replays and eager calls agree, and are wrong together."""
    wrong(lambda right, x, count, *rest: right(x, torch.full_like(count, len(x)), *rest))
    check_batch_norm.replays(write, cases(RAGGED), "cpu", "torch", again)
    assert "2 rows: y: relative error" in write[0]["note"]


def test_an_error_is_a_line_and_the_others_go_on(write, wrong):
    def broken(right, x, *rest):
        if x.dim() == 2:
            raise RuntimeError("an illegal memory access")
        return right(x, *rest)

    wrong(broken)
    for check, options in ((check_batch_norm.statistics, ()), (check_batch_norm.replays, (again,))):
        check(write, cases(SIZES["features"], RAGGED), "cpu", "torch", *options)
    assert [row["ok"] for row in write] == [False, True] * 2
    assert write[0]["note"] == "RuntimeError: an illegal memory access"


def test_padding_is_poisoned_and_no_element_lies_on_a_kink():
    size = batch_norm(20, 24, 16, 28, 28, activation="relu6")
    x, weight, bias = operations.make("masked_batch_norm", size, "cpu").leaves
    assert x[20:].isnan().all()
    assert not x[:20].isnan().any()
    assert x.is_contiguous(memory_format=torch.channels_last)
    z = F.batch_norm(x[:20].double(), None, None, weight.double(), bias.double(), True)
    nearest = min((z - kink).abs().min().item() for kink in (0.0, 6.0))
    assert 1e-5 <= nearest < 1e-3  # of 250,000 elements, some would lie nearer


def test_the_fewest_bytes_are_two_reads_and_a_write():
    """Of 20 valid rows of 24; of statistics, weight and bias there is little."""
    bare = operations.make("masked_batch_norm", batch_norm(20, 24, 256, 56, 56), "cpu", None)
    both = operations.make(
        "masked_batch_norm",
        batch_norm(20, 24, 256, 56, 56, dtype="bfloat16", activation="relu", residual=True),
        "cpu", None,
    )  # fmt: skip
    row = 256 * 56 * 56
    vectors = 256 * 4
    assert bare.forward_bytes == (2 * 20 + 24) * row * 4 + 8 * vectors
    assert bare.backward_bytes == (4 * 20 + 24) * row * 4 + 5 * vectors
    assert both.forward_bytes == (3 * 20 + 24) * row * 2 + 8 * vectors
    assert both.backward_bytes == (5 * 20 + 2 * 24) * row * 2 + 5 * vectors


def test_the_reference_in_half_precision_may_be_further_off_than_what_is_fused():
    half = replace(
        operations.make("masked_batch_norm", SIZES["features"], "cpu"), size=SIZES["features"]
    )
    assert operations.tolerance(half, "reference") == 3 * operations.tolerance(half, "triton")
    plain = operations.make("masked_batch_norm", batch_norm(3, 4, 2, 2, 2), "cpu")
    assert operations.tolerance(plain, "reference") == operations.tolerance(plain, "torch")
