"""The emulated device refuses, reports and computes what a device would (one process, once)."""

from __future__ import annotations

import math

import pytest
from support.on_emulated import found_by, needs_emulated

from hubpath_fast.serving import programs

pytestmark = needs_emulated
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices"


@pytest.fixture(scope="module")
def found():
    return found_by("device_program")


def test_tensors_of_two_devices_are_refused(found):
    refused = found["refusals"]
    for name in ("sum", "product", "concatenation", "layer", "written", "foreach"):
        assert refused[name].startswith(TWO_DEVICES), name
    assert refused["kernel"].startswith("noise: expected torch.float32 [4, 3] on cuda:0")
    assert "can't convert cuda:0 device type tensor to numpy" in refused["numpy"]
    assert refused["number"] == refused["index"] == ""  # allowed on CUDA


def test_new_memory_holds_no_numbers(found):
    single, half, whole, byte = found["new_memory"]
    assert all(map(math.isnan, single + half))
    assert min(whole) > 2**62
    assert byte == [107, 107]


def test_work_whose_order_nothing_says_is_found_and_no_other(found):
    races = found["races"]
    right = {"waits", "two halves", "freed and marked", "kernel that waits"}
    assert {name for name, reports in races.items() if not reports} == right
    wait = "and nothing waits in between"
    assert races["does not wait before"] == [
        f"aten::mul on stream 1 reads memory that aten::fill_ on stream 0 wrote, {wait}"
    ]
    assert races["does not wait after"] == [
        f"aten::add on stream 0 reads memory that aten::mul on stream 1 wrote, {wait}"
    ]
    assert races["freed"] == [
        "aten::fill_ on stream 0 writes memory that aten::mul (before it was freed) on stream 1 "
        f"reads, {wait}"
    ]
    assert "route_and_plan_kernel on stream 0 reads" in races["kernel"][0]


def test_copies_that_nobody_waited_for_are_late(found):
    copies = found["late_copies"]
    assert all(map(math.isnan, copies["before"]))
    assert copies["after"] == [0, 1, 2]
    assert copies["overwritten"] == [5, 5, 5]  # it reads when it likes
    assert copies["not pinned"] == [1, 1, 1]  # the driver copies these aside first
    assert all(map(math.isnan, copies["on its way"]))
    assert copies["and back"] == [0, 2, 4]  # the stream's order is enough for the device


def test_waits_of_the_host_are_counted_and_can_be_forbidden(found):
    waits = found["waits"]
    assert waits["counted"] == {
        "aten::_local_scalar_dense": 1, "aten::index": 1, "aten::nonzero": 1, "copy to the host": 1,
        "stream.synchronize": 1, "event.synchronize": 1, "torch.cuda.synchronize": 1,
    }  # fmt: skip
    assert "called a synchronizing CUDA operation" in waits["forbidden"]
    assert waits["free"] == ""


def test_a_captured_step_replays_to_what_it_computes_eagerly(found):
    captured = found["captured"]
    assert captured["untouched"]
    assert not captured["computed while capturing"]
    # The same operations on the same numbers; x + 1 - x is rounded twice.
    assert max(captured["errors"]) <= 4 * 2**-23


def test_what_cannot_be_captured_raises_and_leaves_the_device_usable(found):
    captured = found["captured"]
    failed = "operation failed due to a previous error during capture"
    for name in ("waits", "unjoined", "foreign"):
        assert failed in captured[name], name
    assert captured["after"] == ""


def test_inference_mode_makes_what_it_makes_on_the_cpu(found):
    inference = found["inference"]
    assert inference["cuda"] == inference["cpu"]
    assert inference["cpu"][:2] == [True, True]  # and a weight's view is none


def test_attention_is_the_cpus(found):
    assert found["attention"] < 1e-4  # sums of 4 and 5 numbers of some units, in float32


def test_a_storage_is_given_sizes_without_strides(found):
    assert found["storage"] == [1, 2, 3]


def test_programs_for_the_device_are_traced(found):
    assert found["traced"] == {"compiled": True, "exported": True}


def test_a_hub_with_batch_norm_is_exported_for_any_batch(found):
    """BatchNorm has two ways on CUDA, and is to keep to one: torch refuses a program that could
    need either."""
    assert found["packages"].keys() == {"any batch", "parts", "in a room"}
    for name, (form, most, difference) in found["packages"].items():
        assert form == ("parts" if name == "parts" else "sparse")
        assert most == programs.MOST_ON_CUDA
        assert difference < 1e-6


def test_memory_is_counted_by_storage(found):
    # 4,000 bytes are 4,096 of the allocator's; a view keeps its storage.
    assert found["memory"] == [8192, 4096, 0, 8192]


def test_training_is_the_cpus_whichever_executor_and_without_races(found):
    training = found["training"]
    # Three float32 steps; the orders of a few sums differ.
    assert all(error < 1e-5 for error in training["errors"].values()), training["errors"]
    assert set(training["errors"]) == {"sequential", "streams", "graphs"}
    assert training["races"] == []
