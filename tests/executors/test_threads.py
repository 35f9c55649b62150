"""Experts on a CPU's threads: the results of one after another, to the bit, and when they stay
alone.

The tests run torch on one thread, so that an expert has as many on its own as side by side.
"""

import copy
import gc
import multiprocessing
import os
import signal
import threading
import time
from functools import partial

import pytest
import torch
from support import pathway as double
from support.graphs import backward, fixed_routing
from support.models import Faulty, M, batch, build, conv_expert, train
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import choose
from hubpath_fast.executors.threads.inspector import Inspector
from hubpath_fast.executors.threads.workers import Workers

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def without_dropout(executor="threads", seed=0):
    model = build(executor, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class Where(nn.Module):
    """An expert that keeps which threads its forwards and backwards ran on."""

    def __init__(self, body):
        super().__init__()
        self.body, self.forwards, self.backwards = body, [], []

    def forward(self, x):
        self.forwards.append(threading.current_thread().name)
        output = self.body(x)
        if output.requires_grad:
            names = self.backwards
            output.register_hook(lambda g: names.append(threading.current_thread().name))
        return output


def watched(model):
    model.experts = nn.ModuleList(map(Where, model.experts))
    return model


def names(model, kind="forwards"):
    return {name.split("_")[0] for expert in model.experts for name in getattr(expert, kind)}


def step(model, seed=0):
    x, y = batch(seed=seed)
    torch.manual_seed(seed)
    output = model(x, target=y)
    return hp.HubPathwayLoss()(output, y).total


@pytest.mark.parametrize("amp", [False, True])
def test_training_is_that_of_one_after_another_to_the_bit(amp):
    states = [train(without_dropout(name), 20, amp=amp) for name in ("sequential", "threads")]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_values_and_gradients_are_those_of_the_reference_in_float64(monkeypatch):
    ran, run = [], Workers.run
    monkeypatch.setattr(Workers, "run", lambda *args: ran.append(len(args[1])) or run(*args))
    ours, truth, x, y, eps = double.build(
        24, M, 2, torch.zeros(24, M), expert=double.conv_expert, executor="threads"
    )
    double.assert_equal_step(ours, truth, x, y, eps)
    assert ran == [M, M]  # forward and backward


def test_a_tensor_that_is_no_parameter_of_the_expert_gets_its_gradient():
    class Scaled(nn.Module):
        def __init__(self, body, scale):
            super().__init__()
            self.body, self.others = body, [scale]  # a list: not registered

        def forward(self, x):
            return self.body(x) * self.others[0]

    found = []
    for executor in ("sequential", "threads"):
        model, scale = without_dropout(executor), torch.tensor(2.0, requires_grad=True)
        model.experts[1] = Scaled(model.experts[1], scale)
        for seed in range(3):
            step(model, seed).backward()
        found.append([scale.grad, *(p.grad for p in model.experts.parameters())])
    assert found[0][0] != 0
    for expected, gradient in zip(*found, strict=True):
        assert torch.equal(gradient, expected)


def test_forward_and_backward_run_on_other_threads():
    model = watched(without_dropout())
    step(model).backward()
    assert names(model) == names(model, "backwards") == {"hubpath-expert"}
    assert all(p.grad is not None for e in model.experts if e.forwards for p in e.parameters())


def test_what_draws_random_numbers_draws_them_in_order():
    assert names_after(watched(build("threads"))) == {"MainThread"}  # all have dropout
    states = [train(build(name), 5) for name in ("sequential", "threads")]
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name
    model = watched(without_dropout())
    model.experts[1].body[3].p = 0.5
    step(model).backward()
    assert set(model.experts[1].forwards) == {"MainThread"}
    assert model.experts[2].forwards[0].startswith("hubpath-expert")
    assert model.executor_report().notes == (
        "experts[1] runs alone: it draws random numbers (Dropout)",
    )
    model.eval()(batch()[0])
    assert model.experts[1].forwards[-1].startswith("hubpath-expert")


def names_after(model):
    step(model).backward()
    return names(model)


def test_hidden_draws_end_it():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = without_dropout()
    model.experts[0].insert(0, Noisy())
    model = watched(model)
    assert "hubpath-expert" in names_after(model)
    assert model.experts[0].forwards  # it has rows
    for expert in model.experts:
        expert.forwards.clear()
    for seed in (1, 2):
        step(model, seed).backward()
    assert names(model) == {"MainThread"}
    assert "draws random numbers" in model.executor_report().notes[0]


@pytest.mark.parametrize("why", ["hook", "parameter hook", "shared module", "compiled"])
def test_what_belongs_to_all_threads_stays_on_the_callers(why):
    experts = [nn.Sequential(conv_expert(), nn.Identity()).eval() for _ in range(3)]
    assert [f.alone for f in Inspector()(experts)] == [None] * 3
    if why == "hook":
        experts[0][0][1].register_forward_hook(lambda *_: None)
        expected = ["has hooks (on BatchNorm2d)", None, None]
    elif why == "parameter hook":
        experts[1][0][0].weight.register_hook(lambda g: g)
        expected = [None, "has hooks on its parameters", None]
    elif why == "compiled":
        experts[2].compile(backend="eager")
        expected = [None, None, "is compiled"]
    else:
        experts[2][0] = experts[0][0]
        text = "shares modules with another expert"
        expected = [text, None, text]
    assert [f.alone for f in Inspector()(experts)] == expected


@pytest.mark.parametrize("rows", [12, 13])
def test_an_expert_with_more_than_half_of_the_rows_has_both_threads(rows):
    model = watched(without_dropout())
    backward(model, *batch(), fixed_routing(model, counts=[rows, 18 - rows, 3, 3]))
    assert names(model) == {"hubpath-expert" if rows == 12 else "MainThread"}


def test_a_hook_on_a_parameter_is_called_once():
    model = without_dropout()
    calls = []
    for expert in model.experts:
        expert[0].weight.register_hook(calls.append)
    step(model).backward()
    assert len(calls) == M


@pytest.mark.parametrize("state", ["input", "saved tensors", "mode"])
def test_states_of_the_callers_thread_hold_for_experts(state):
    model = watched(without_dropout())
    x, _ = batch()
    if state == "input":
        x.requires_grad_()
        output = model(x)
        output.prediction.sum().backward()
        assert x.grad.abs().sum() > 0
    elif state == "saved tensors":
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            model(x)
        assert any(t.shape[1:] == (8, 8, 8) for t in kept if t.dim() == 4)  # of experts
    else:
        with torch.device("cpu"):
            model(x)
    assert names(model) == {"MainThread"}
    assert "one after another" in model.executor_report().notes[0]


def test_predictions_stay_on_the_callers_thread():
    model = watched(without_dropout()).eval()
    x, _ = batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(x)
    assert names(model) == {"MainThread"}


def test_gradients_of_gradients_and_a_second_backward():
    found = []
    for executor in ("sequential", "threads"):
        model = without_dropout(executor).double()
        x, y = batch()
        torch.manual_seed(0)
        loss = hp.HubPathwayLoss()(model(x.double()), y).total
        parameters = list(model.parameters())
        first = torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True)
        penalty = sum(g.square().sum() for g in first if g is not None)
        second = torch.autograd.grad(penalty, parameters, retain_graph=True, allow_unused=True)
        loss.backward(retain_graph=True)
        loss.backward()
        found.append([*first, *second, *(p.grad for p in parameters)])
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
    for expected, gradient in zip(*found, strict=True):
        assert (expected is None) == (gradient is None)
        if expected is not None:
            # float64: gradients of both loss terms may be added in another order
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_frozen_experts_record_nothing():
    model = watched(without_dropout())
    model.experts[0].requires_grad_(False)
    loss = step(model)
    loss.backward()
    assert all(p.grad is None for p in model.experts[0].parameters())
    assert all(p.grad is not None for p in model.experts[1].parameters())
    model.experts.requires_grad_(False)
    model.generator.requires_grad_(False)
    assert model(batch()[0]).expert_outputs.grad_fn is None


def test_an_expert_that_raises_is_named_and_leaves_the_model_usable():
    model = without_dropout()
    model.experts[2] = Faulty()
    model.experts[2].body[3].p = 0.0
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of luck") as caught:
            step(model)
        if hasattr(caught.value, "add_note"):
            assert "experts[2] (Faulty)" in caught.value.__notes__[0]
    model.experts[2].broken = False
    step(model).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_threads_are_divided_and_the_callers_number_stays():
    torch.set_num_threads(4)
    workers = Workers(2)
    barrier = threading.Barrier(2)

    def number():
        barrier.wait()
        return torch.get_num_threads()

    assert workers.run([number, number], [1, 0]) == [2, 2]
    assert torch.get_num_threads() == 4
    assert workers.fit
    late = []  # a thread that starts later has the caller's number, too
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [4]
    torch.set_num_threads(1)
    assert not workers.fit


def test_an_interrupted_run_ends_what_it_began_and_begins_nothing_more():
    workers, ended = Workers(2), []

    def task():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.append(True)

    gc.collect()
    gc.disable()  # Python drops an interrupt that arrives while a collected object says goodbye
    try:
        with pytest.raises(KeyboardInterrupt):
            workers.run([task, lambda: time.sleep(0.1), ended.clear], [0, 1, 2])
    finally:
        gc.enable()
    assert ended == [True]
    assert workers.run([lambda: 1, lambda: 2], [1, 0]) == [1, 2]


def test_of_several_errors_the_first_tasks_is_raised_and_nothing_more_begins():
    workers, late = Workers(2), []
    barrier = threading.Barrier(2)

    def fail(error):
        barrier.wait()
        raise error

    tasks = [partial(fail, KeyError("a")), partial(fail, ValueError("b")), lambda: late.append(1)]
    with pytest.raises(KeyError):
        workers.run(tasks, [1, 0, 2])
    assert not late
    assert workers.run([lambda: 1], [0]) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_process_has_threads_of_its_own():
    model = without_dropout().eval()
    x, _ = batch()
    expected = model(x)

    def child(queue):
        queue.put(torch.equal(model(x), expected))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60)
    process.join()


def test_threads_end_with_the_model():
    model = without_dropout()
    before = set(threading.enumerate())
    step(model)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    twin = copy.deepcopy(model)
    assert twin.executor_report().steps == 0
    del model
    gc.collect()
    for thread in own:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_auto_takes_threads_where_they_were_measured():
    torch.set_num_threads(2)
    assert choose("auto", CPU, 4)[0] == "threads"
    name, [reason] = choose("auto", CPU, 3)
    assert (name, "4 experts or more" in reason) == ("sequential", True)
    torch.set_num_threads(8)
    name, [reason] = choose("auto", CPU, 4)
    assert name == "sequential"
    assert "8 threads" in reason
    with pytest.raises(ValueError, match=r"'threads' needs a CPU, .*cuda; move .*\"auto\""):
        choose("threads", torch.device("cuda"), 4)
