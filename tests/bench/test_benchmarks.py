"""Benchmarks check before they time, write whole rows, and draw what they wrote."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import glue, inputs, jsonl, operations, ops, plot
from bench.inputs import ROUTINGS, Size, batch_norm
from bench.operations import NAMES

SMALL = Size(11, 4, 2, 6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_both_rows_of_an_operation_are_right(name, routing):
    norm = batch_norm(9, 11, 6, 3, 5, activation="relu6", residual=True).norm
    own = {"trailing": (3, 5), "norm": norm} if name == "masked_batch_norm" else {}
    operation = operations.make(name, SMALL._replace(routing=routing, **own), "cpu")
    expected = operations.truth(operation)
    for row in ("reference", "torch"):
        # a few float32 roundings (6e-8), of sums of 24 terms at most
        assert operations.error(operation, row, expected) < 2e-6


def test_a_wrong_result_and_nan_are_seen():
    operation = operations.make("gather", SMALL, "cpu")
    expected = operations.truth(operation)
    wrong = replace(operation, ours=lambda backend, x: (operation.reference(x)[0] * 1.001,))
    # results are off by 0.001 of themselves, and so are gradients
    assert operations.error(wrong, "torch", expected) == pytest.approx(1e-3, rel=0.01)
    nan = replace(operation, ours=lambda backend, x: (operation.reference(x)[0] * float("nan"),))
    assert operations.error(nan, "torch", expected) == float("inf")


def fails_without_a_word(*_):
    raise NotImplementedError


@pytest.mark.parametrize(
    ("ours", "note"),
    [
        (lambda operation: lambda backend, x: (operation.reference(x)[0] + 1,), "wrong: relative"),
        (lambda operation: fails_without_a_word, "does not run: NotImplementedError: "),
    ],
)
def test_a_wrong_row_is_noted_and_never_timed(monkeypatch, ours, note):
    make = operations.make

    def wrong(*arguments):
        operation = make(*arguments)
        return replace(operation, ours=ours(operation))

    monkeypatch.setattr(operations, "make", wrong)
    rows = ops.measure("gather", SMALL, "cpu", 0.0, False, roof=1e9)
    [noted] = [row for row in rows if row["row"] == "torch"]
    assert noted["note"].startswith(note)
    assert "p50" not in noted
    assert {row["direction"] for row in rows if row["row"] == "reference"} == set(ops.DIRECTIONS)


def test_no_kept_forward_has_the_leaves_of_a_captured_backward(monkeypatch):
    """Where one is alive on the default stream, a capture on another would have to wait for it."""
    met = []  # (the leaves of a forward, its result as long as somebody keeps it)
    operation = operations.make("combine", SMALL, "cpu")
    ours = operation.ours

    def recorded(backend, *leaves):
        results = ours("torch", *leaves)
        met.append((leaves, weakref.ref(results[0])))
        return results

    def capture(prepare):
        kept = {id(leaf) for leaves, result in met if result() is not None for leaf in leaves}
        del met[:]
        prepare()()
        captured = {id(leaf) for leaves, _ in met for leaf in leaves}
        assert captured
        assert not kept & captured
        return None

    monkeypatch.setattr(ops.timing, "capture", capture)
    monkeypatch.setattr(ops.timing, "replayed", lambda graphs, seconds, kept=None: {})
    monkeypatch.setattr(ops, "peak_memory", lambda function, device: None)
    monkeypatch.setattr(ops.timing, "interleaved", lambda functions, *_: {})
    arguments = (0.0, {"copy_bandwidth": 1e9})
    recording = replace(operation, ours=recorded)
    assert ops._direction(recording, "backward", {"torch": 0.0}, "cuda", *arguments) == []


def test_a_captured_glue_has_leaves_of_its_own(monkeypatch):
    kept = glue.make(6, 3, 2, 4, "cpu")
    met = []
    step = glue.step
    monkeypatch.setattr(glue, "step", lambda own, backend: met.append(own) or step(own, backend))
    monkeypatch.setattr(glue.timing, "capture", lambda prepare: prepare()())
    loss, *_ = glue._captured((6, 3, 2, 4), "cpu", "torch")
    assert torch.equal(loss, step(kept, "torch")()[0])
    assert not {id(leaf) for leaf in kept.leaves} & {id(leaf) for leaf in met[0].leaves}


def test_the_tensors_of_a_captured_glue_live_as_long_as_its_graph(cuda, monkeypatch):
    met, make = [], glue.make

    def recorded(*arguments):
        given = make(*arguments)
        met.extend(map(weakref.ref, (given.x, given.eps, given.target, *given.leaves)))
        return given

    monkeypatch.setattr(glue, "make", recorded)
    graph = glue._captured((6, 3, 2, 4), "cpu", "torch")
    gc.collect()
    assert met
    assert all(ref() is not None for ref in met)
    del graph
    gc.collect()
    assert all(ref() is None for ref in met)


def test_operations_are_checked_without_tf32(tf32):
    flags, operation = [], operations.make("aggregate", SMALL, "cpu")
    expected = operations.truth(operation)

    def looks(backend, *leaves):
        flags.append(tf32())
        return operation.ours(backend, *leaves)

    assert operations.error(replace(operation, ours=looks), "torch", expected) < 2e-6
    assert flags == [(False, False)]


def test_the_aggregate_of_maps_is_measured_and_named(monkeypatch, capsys):
    """Bytes: rows and y once forward, of 24 x 6 and 11 x 6 maps of 20 positions, and the rest."""
    size = SMALL._replace(trailing=(4, 5))
    rows = ops.measure("aggregate", size, "cpu", 0.0, False, 1e9, ["torch", "dense"], ["both"])
    assert [row["row"] for row in rows] == ["torch", "dense"]
    assert {row["maps"] for row in rows} == {"4x5"}
    n, m, k, c = size[:4]
    parameters = 4 * (c * m * c + c)
    forward = 4 * (n * k + n) * c * 20 + parameters + 8 * n * k
    backward = 4 * (2 * n * k + n) * c * 20 + parameters + 4 * c * m * c + 12 * n * k
    assert rows[0]["fewest_bytes"] == forward + backward
    ops.show(rows)
    assert "N=11" in capsys.readouterr().out
    assert plot.label(rows[0]) == "11, 4, 2, 6 4x5"


def test_a_size_too_large_to_check_is_noted(monkeypatch):
    monkeypatch.setattr(ops, "memory_at_hand", lambda device: 100)
    (row,) = ops.measure("combine", SMALL, "cpu", 0.0, False, roof=1e9)
    assert "not run" in row["note"]


class Memory(TorchDispatchMode):
    """Bytes of all tensors that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                self.add(tensor.untyped_storage())
        return results

    def add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self.known:
            self.known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.free, key, size)

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size


@pytest.mark.parametrize("name", ["noisy_topk", "gather", "combine", "exploit_loss"])
def test_the_memory_that_a_check_needs_is_enough(name):
    (size,) = ops.ROOF[name]
    assert_enough(name, size._replace(n=size.n // 1024))


@pytest.mark.parametrize("size", ops.ROOF["masked_batch_norm"], ids=str)
def test_the_memory_that_a_check_of_batch_norm_needs_is_enough(size):
    assert_enough("masked_batch_norm", size._replace(c=16, trailing=(14, 14)))


def assert_enough(name, small):
    with Memory() as memory:
        operation = operations.make(name, small, "cpu")
        expected = operations.truth(operation)
        operations.error(operation, "torch", expected)
    assert 0.3 * ops.memory_needed(name, small) < memory.peak <= ops.memory_needed(name, small)


def test_sizes():
    names = [name for name in NAMES if name != "masked_batch_norm"]
    maps = [size for name in names for size in ops.sizes(name) if size.trailing]
    assert maps == [size for size in ops.sizes("aggregate", full=True) if size.trailing]
    assert str(maps[-1]) == "N=16 M=5 K=2 C=98 64x64 balanced"
    assert len(ops.sizes("combine", full=True)) == 4 * (2 + 2 + 3 + 3) * 3 * 2  # K = 8 > M = 2, 5
    assert len(ops.sizes("noisy_topk", full=True)) == 4 * 10 * 2
    assert all(size.k <= size.m for name in NAMES for size in ops.sizes(name, full=True))


def test_skewed_routing_is_skewed():
    def counts(skewed):
        random = torch.Generator().manual_seed(0)
        clean, noise, eps = inputs.scores(512, 8, 2, "cpu", random, skewed)
        return operations.HF.noisy_topk(clean, noise, 2, eps).counts()

    assert max(counts(False)) < 2 * 512 * 2 / 8
    assert counts(True)[0] > 3 * 512 * 2 / 8


def test_the_command_writes_rows_that_can_be_drawn(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ops, "SUBSET", [SMALL, SMALL._replace(routing="skewed")])
    monkeypatch.setattr(ops.timing, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(glue, "SIZES", [(7, 3, 2, 4)])
    path = tmp_path / "machine.jsonl"
    ops.main(["--device", "cpu", "--seconds", "0", "--only", "gather", "--only", "combine",
              "--out", str(path)])  # fmt: skip
    glue.main(["--device", "cpu", "--seconds", "0", "--out", str(path)])
    rows = jsonl.read(path)
    assert len(rows) == 2 * 2 * 3 * 2 + 2
    timed = [row for row in rows if row["benchmark"] == "ops"]
    for row in timed:
        assert 0 < row["p20"] <= row["p50"] <= row["p80"]
        assert row["moved_bytes"] >= row["fewest_bytes"] / 2
        assert row["share_of_copy"] == pytest.approx(row["fewest_bytes"] / row["p50"] / 1e9)
        assert row["peak_memory"] is None  # not known off the GPU
    assert all(row["speedup"] == 1 for row in rows if row["row"] == "reference")
    assert "combine" in capsys.readouterr().out
    written = plot.main([str(path)])
    assert [p.name for p in written] == ["machine-glue.png", "machine-ops.png"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in written)


def test_drawing_takes_the_last_row_of_a_size():
    row = {"benchmark": "glue", "direction": "both", "N": 1, "M": 2, "K": 1, "C": 3,
           "row": "torch", "mode": "eager", "p50": 1.0}  # fmt: skip
    found = plot.latest([row, row | {"p50": 2.0}, row | {"benchmark": "ops"}], "glue")
    assert [r["p50"] for r in found.values()] == [2.0]
    assert plot.figure([], "glue") is None


@pytest.mark.parametrize("size", [(9, 4, 2, 5), (3, 5, 1, 4)], ids=["usual", "idle experts"])
def test_the_glue_of_every_row_equals_the_reference(size):
    given = glue.make(*size, "cpu")
    truth = glue.reference_step(glue.double(given))()
    # float32 roundings (6e-8) through a softmax and sums of 20 terms
    assert glue.worst_error(glue.reference_step(given)(), truth) < 5e-6
    assert glue.worst_error(glue.step(given, "torch")(), truth) < 5e-6


@pytest.fixture
def glue_on_a_gpu(cuda, monkeypatch):
    """A glue that is measured on "cuda": its tensors are the CPU's, its kernels torch's."""
    make, step = glue.make, glue.step
    monkeypatch.setattr(glue, "make", lambda n, m, k, c, device: make(n, m, k, c, "cpu"))
    monkeypatch.setattr(glue, "step", lambda given, backend: step(given, "torch"))
    monkeypatch.setattr(glue.records, "environment", lambda device: {"device": "a GPU"})


def test_the_glue_is_captured_and_replayed_on_a_gpu(glue_on_a_gpu):
    rows = list(glue.measure((7, 3, 2, 4), "cuda", 0.0, False))
    assert [(row["row"], row.get("mode")) for row in rows] == [
        ("reference", "eager"), ("torch", "eager"), ("triton", "eager"),
        ("torch", "graph"), ("triton", "graph"),
    ]  # fmt: skip
    assert all(row["p50"] > 0 and row["error"] < 5e-6 for row in rows)


def test_a_glue_that_cannot_be_captured_costs_its_own_row(glue_on_a_gpu, monkeypatch):
    capture, captured = glue.timing.capture, []

    def fails_once(prepare):
        captured.append(prepare)
        if len(captured) == 1:
            raise RuntimeError("operation not permitted\nand more")
        return capture(prepare)

    monkeypatch.setattr(glue.timing, "capture", fails_once)
    rows = list(glue.measure((7, 3, 2, 4), "cuda", 0.0, False))
    noted = [row for row in rows if "note" in row]
    assert [(row["row"], row["note"]) for row in noted] == [
        ("torch", "not captured: RuntimeError: operation not permitted"),
    ]  # fmt: skip
    assert [row["row"] for row in rows if row.get("mode") == "graph"] == ["torch", "triton"]
    assert sum("p50" in row for row in rows) == 4
