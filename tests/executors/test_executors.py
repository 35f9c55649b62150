"""Executors: the same results, one host read, frozen parts for free, faults that leave no trace."""

import copy
import pickle

import pytest
import torch
from support.graphs import assert_same
from support.host_reads import host_reads
from support.models import C, Faulty, batch, build, train, without_dropout
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.groups import Group
from hubpath_fast.executors.sequential import SequentialExecutor
from hubpath_fast.executors.streams import assign
from hubpath_fast.executors.threads import ThreadsExecutor


def test_a_training_step_reads_the_host_once():
    model = build()
    x, y = batch()
    criterion = hp.HubPathwayLoss(task_loss=lambda p, y: (p - y[:, None]).square().mean(dim=1))
    for _ in range(3):
        with host_reads() as reads:
            criterion(model(x), y).total.backward()
        assert reads == ["tolist"]
    report = model.executor_report()
    assert (report.steps, report.host_reads_per_step) == (3, 1.0)


def test_the_report_says_what_runs_and_why():
    model = build()
    report = model.executor_report()
    assert (report.asked, report.executor, report.steps) == ("auto", "sequential", 0)
    assert report.host_reads_per_step is None
    model(batch()[0])
    report = model.executor_report()
    assert report.to_dict() == {
        "asked": "auto", "executor": "sequential", "steps": 1, "host_reads_per_step": 1.0,
        "reasons": ["the experts are on cpu, and torch has one thread"],
        "hits": 0, "misses": 0, "room": 0, "bytes_in": 0, "bytes_out": 0, "seconds_waited": 0.0,
        "seconds_copying": 0.0, "seconds_running": 0.0,
        "captured": {}, "captured_predictions": {}, "memory": 0,
        "eager": {}, "notes": [], "compiled": False,
        "exact": {}, "padded_rows": 0, "replayed_rows": 0,
    }  # fmt: skip
    assert "executor: sequential (asked for: auto)" in str(report)
    assert "because the experts are on cpu" in str(report)
    assert "1 host reads per step" in str(report)


@pytest.mark.parametrize("executor", ["streams", "graphs"])
def test_an_executor_of_another_device_is_refused_with_a_remedy(executor):
    model = build(executor)
    with pytest.raises(ValueError, match=rf"'{executor}' needs CUDA, .*cpu; move .*\"auto\""):
        model(batch()[0])
    with pytest.raises(ValueError, match="needs CUDA"):
        model.executor_report()


@pytest.mark.parametrize("executor", ["auto", SequentialExecutor()], ids=["named", "given"])
def test_copies_and_other_experts_start_with_nothing_counted(executor):
    model = build(executor)
    model(batch()[0])
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.executor_report().steps == 0
    assert model.executor_report().steps == 1
    model.remove_expert(0)
    assert model.executor_report().steps == 0


def test_an_executor_may_be_an_object():
    class Doubling(SequentialExecutor):
        name = "doubling"

        def run(self, *arguments):
            return 2 * super().run(*arguments)

    model, plain, (x, _) = build(Doubling()).eval(), build().eval(), batch()
    torch.testing.assert_close(model(x), 2 * plain(x))
    report = model.executor_report()
    assert (report.asked, report.executor) == ("doubling", "doubling")
    assert report.reasons == ("it was given",)


def test_groups_are_spread_over_streams_largest_first():
    groups = [Group(0, 0, 5), Group(1, 5, 20), Group(2, 25, 9), Group(3, 34, 8)]
    alone = [0, 1, 2, 3]
    assert assign(groups, 2, alone) == [1, 0, 1, 1]
    assert assign(groups[:1], 4, alone) == [0]
    assert assign(groups, 8, alone) == [3, 0, 1, 2]
    assert assign(groups, 8, [0, 1, 0, 0]) == [0, 1, 0, 0]  # 22 rows together, before the 20


@pytest.mark.parametrize(
    "executor", ["sequential", "threads", pytest.param("streams", marks=pytest.mark.gpu)]
)
def test_an_expert_that_raises_is_named_and_leaves_the_model_usable(executor):
    device = "cuda" if executor == "streams" else "cpu"
    model = build(ThreadsExecutor(2) if executor == "threads" else executor)
    model.experts[2] = Faulty()
    without_dropout(model.to(device))
    x, y = batch(device=device)
    # A group below min_group switches BatchNorm over; it must be back after an exception.
    for model.min_group in (2, 1000, 2):
        with pytest.raises(RuntimeError, match="out of luck") as caught:
            model(x)
        if hasattr(caught.value, "add_note"):
            assert "experts[2] (Faulty)" in caught.value.__notes__[0]
        assert all(m.training for m in model.modules())
    model.experts[2].broken = False
    hp.HubPathwayLoss()(model(x), y).total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_experts_may_write_to_their_input():
    model, twin = build(), build()
    for each, in_place in ((model, True), (twin, False)):
        for i, expert in enumerate(each.experts):
            each.experts[i] = nn.Sequential(nn.Hardtanh(0.2, 0.8, in_place), expert)
    assert_same(train(model, 2), train(twin, 2))


def saved_bytes(model):
    """What one forward keeps for its backward, parameters and buffers left out."""
    kept = {}
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(batch()[0])
    return sum(kept.values()), output


def test_frozen_experts_keep_nothing_for_the_backward():
    model = build()
    model.generator.requires_grad_(False)
    full, _ = saved_bytes(model)
    for expert in model.experts:
        expert.requires_grad_(False)
        expert[-1].requires_grad_(True)
    heads, _ = saved_bytes(model)
    model.experts.requires_grad_(False)
    none, output = saved_bytes(model)
    rows, features = 48, 4 * 8 * 4  # R, and the bytes of a head's input
    outputs = rows * C * 4
    assert heads - none == pytest.approx(rows * features, abs=outputs + 4096)
    assert full > 20 * heads
    assert not output.expert_outputs.requires_grad
    assert output.expert_outputs.grad_fn is None


def test_rows_take_the_layout_of_the_experts():
    seen = []
    model = build()
    model.experts[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x, _ = batch()
    plain = model.eval()(x)
    last = model.to(memory_format=torch.channels_last)(x)
    torch.testing.assert_close(last, plain, rtol=1e-5, atol=1e-6)  # float32, sums reordered
    assert seen[0].is_contiguous()
    assert seen[1].is_contiguous(memory_format=torch.channels_last)


def test_compiled_experts_give_the_same_training():
    plain, compiled = train(build(), 4), build()
    names = list(compiled.state_dict())
    assert compiled.compile_experts(backend="eager") is compiled
    assert compiled.executor_report().compiled
    assert not copy.deepcopy(compiled).executor_report().compiled
    state = train(compiled, 4)
    assert list(state) == names
    torch.testing.assert_close(state, plain)


@pytest.mark.gpu
def test_streams_give_the_same_training_to_the_bit():
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        states = [train(build(name, "cuda"), 20, "cuda") for name in ("sequential", "streams")]
    assert_same(*states)


@pytest.mark.gpu
@pytest.mark.parametrize("executor", ["sequential", "streams"])
def test_a_step_waits_for_the_device_only_for_the_counts(executor):
    model = build(executor, "cuda")
    x, y = batch(device="cuda")
    criterion = hp.HubPathwayLoss()
    criterion(model(x), y).total.backward()  # compiles kernels
    routing = model.route(x)
    routing.counts()
    torch.cuda.set_sync_debug_mode("error")
    try:
        criterion(model(x, routing=routing), y).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
