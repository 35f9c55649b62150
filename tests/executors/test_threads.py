"""Experts on a CPU's threads: the results of one after another, to the bit; when they run alone;
how the threads are divided.

Most tests run torch on one thread, and let experts share two: so each has one in either case.
"""

import gc
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from support import pathway as double
from support.graphs import assert_same, backward, fixed_routing
from support.models import M, batch, build, conv_expert, train, without_dropout
from support.waiting import LIMIT
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import Workload, choose
from hubpath_fast.executors.threads import ThreadsExecutor
from hubpath_fast.executors.threads.inspector import Inspector
from hubpath_fast.executors.threads.pools import ThreadPools, divide

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sharing(executor=None):
    """A model whose experts share two threads, or with another executor, without dropout."""
    return without_dropout(build(executor or ThreadsExecutor(2)))


class Where(nn.Module):
    """An expert that keeps where its forwards and backwards ran: which threads, or ``where``."""

    def __init__(self, body, where=lambda: threading.current_thread().name):
        super().__init__()
        self.body, self.where, self.forwards, self.backwards = body, where, [], []

    def forward(self, x):
        self.forwards.append(self.where())
        output = self.body(x)
        if output.requires_grad:
            output.register_hook(lambda _: self.backwards.append(self.where()))
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


def names_after(model):
    step(model).backward()
    return names(model)


@pytest.mark.parametrize("amp", [False, True])
def test_training_is_that_of_one_after_another_to_the_bit(amp):
    assert_same(*(train(sharing(name), 20, amp=amp) for name in (None, "sequential")))


def test_values_and_gradients_are_those_of_the_reference_in_float64(monkeypatch):
    ran, run = [], ThreadPools.run
    monkeypatch.setattr(ThreadPools, "run", lambda *args: ran.append(len(args[1])) or run(*args))
    ours, truth, x, y, eps = double.build(
        24, M, 2, torch.zeros(24, M), expert=double.conv_expert, executor=ThreadsExecutor(2)
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
    for executor in ("sequential", None):
        model, scale = sharing(executor), torch.tensor(2.0)
        model.experts[1] = Scaled(model.experts[1], scale)
        for seed in range(3):
            scale.requires_grad_(seed > 0)  # thawed after a first step
            step(model, seed).backward()
        found.append([scale.grad, *(p.grad for p in model.experts.parameters())])
    assert found[0][0] != 0
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_forward_and_backward_run_on_other_threads():
    model = watched(sharing())
    assert names_after(model) == names(model, "backwards") == {"hubpath-expert"}
    assert all(p.grad is not None for e in model.experts if e.forwards for p in e.parameters())


def test_what_draws_random_numbers_draws_them_in_order():
    assert names_after(watched(build(ThreadsExecutor(2)))) == {"MainThread"}  # all have dropout
    assert_same(*(train(build(executor), 5) for executor in (ThreadsExecutor(2), "sequential")))
    model = watched(sharing())
    model.experts[1].body[3].p = 0.5
    step(model).backward()
    assert set(model.experts[1].forwards) == {"MainThread"}
    assert model.experts[2].forwards[0].startswith("hubpath-expert")
    assert model.executor_report().notes == (
        "experts[1] runs alone: it draws random numbers (Dropout)",
    )
    model.eval()(batch()[0])
    assert model.experts[1].forwards[-1].startswith("hubpath-expert")


def test_hidden_draws_end_it():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    model = sharing()
    model.experts[0].insert(0, Noisy())
    model = watched(model)
    assert "hubpath-expert" in names_after(model)
    assert model.experts[0].forwards  # it has rows
    for expert in model.experts:
        expert.forwards.clear()
    assert names_after(model) == {"MainThread"}
    assert "draws random numbers" in model.executor_report().notes[0]


ALONE = {
    "hook": (lambda e: e[0][0][1].register_forward_hook(print), [0], "has hooks (on BatchNorm2d)"),
    "its": (lambda e: e[1][0][0].weight.register_hook(print), [1], "has hooks on its parameters"),
    "compiled": (lambda e: e[2].compile(backend="eager"), [2], "is compiled"),
    "shared": (lambda e: e[2].insert(1, e[0][0]), [0, 2], "shares modules with another expert"),
}


@pytest.mark.parametrize(("change", "alone", "why"), ALONE.values(), ids=ALONE)
def test_what_belongs_to_all_threads_stays_on_the_callers(change, alone, why):
    experts = [nn.Sequential(conv_expert(), nn.Identity()).eval() for _ in range(3)]
    assert [f.alone for f in Inspector()(experts)] == [None] * 3
    change(experts)
    assert [f.alone for f in Inspector()(experts)] == [
        why if i in alone else None for i in range(3)
    ]


def test_a_hook_on_a_parameter_is_called_once():
    model = sharing()
    calls = []
    for expert in model.experts:
        expert[0].weight.register_hook(calls.append)
    step(model).backward()
    assert len(calls) == M


@pytest.mark.parametrize("state", ["input", "saved tensors", "mode"])
def test_states_of_the_callers_thread_hold_for_experts(state):
    model = watched(sharing())
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
    model = watched(sharing()).eval()
    x, _ = batch()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            model(x)
    assert names(model) == {"MainThread"}


def test_gradients_of_gradients_and_a_second_backward():
    found = []
    for executor in ("sequential", None):
        model = sharing(executor).double()
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
    # float64: gradients of both loss terms may be added in another order
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_frozen_experts_record_nothing():
    model = watched(sharing())
    model.experts[0].requires_grad_(False)
    loss = step(model)
    loss.backward()
    assert all(p.grad is None for p in model.experts[0].parameters())
    assert all(p.grad is not None for p in model.experts[1].parameters())
    model.experts.requires_grad_(False)
    model.generator.requires_grad_(False)
    assert model(batch()[0]).expert_outputs.grad_fn is None


@pytest.mark.parametrize(
    ("counts", "threads", "expected"),
    [
        ([6, 6, 6, 6], 1, []),  # nothing to divide
        ([], 4, []),
        ([9], 8, []),  # all threads are its own anyway
        ([6, 6], 2, [1, 1]),
        ([7, 6], 2, []),  # more than half
        ([5, 9, 4], 2, [1, 1, 1]),  # two at once; the third when one has ended
        ([5, 9, 4], 4, [1, 2, 1]),  # what is left over goes to the largest
        ([5, 9, 5], 5, [2, 2, 1]),  # of equals, to the first
        ([5, 9, 4], 8, [3, 3, 2]),
        ([5, 5, 5, 5, 5], 8, [2, 2, 2, 1, 1]),
    ],
)
def test_threads_are_divided_by_the_experts_rows(counts, threads, expected):
    assert divide(counts, threads) == expected


def hub(executor="auto"):
    """Its experts keep how many of torch's threads they ran on."""
    torch.manual_seed(0)
    bodies = [nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 6)) for _ in range(5)]
    parts = [Where(body, torch.get_num_threads) for body in bodies]
    return hp.HubPathway(parts, hp.PathwayGenerator(5, width=4), k=1, executor=executor).double()


@pytest.mark.parametrize("active", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("threads", [1, 2, 3, 4, 8])
def test_any_number_of_threads_and_experts(threads, active):
    torch.set_num_threads(threads)
    counts = [4 * (i < active) for i in range(5)]
    x, y = batch(sum(counts))
    found = []
    for model in (hub(), hub(), hub("sequential")):
        backward(model, x.double(), y, fixed_routing(model, counts=counts))
        found.append([p.grad for p in model.experts.parameters() if p.grad is not None])
        if model.executor == "auto":
            assert model.executor_report().executor == ("threads" if threads > 1 else "sequential")
            each = divide(counts[:active], threads) or [threads] * active
            expected = [[n] for n in each] + [[]] * (5 - active)
            assert [e.forwards for e in model.experts] == expected
            assert [e.backwards for e in model.experts] == expected
    assert torch.get_num_threads() == threads
    one, again, expected = found
    torch.testing.assert_close(one, again, rtol=0, atol=0)
    # float64: other numbers of threads may sum in another order
    torch.testing.assert_close(one, expected, rtol=1e-12, atol=1e-14)


def test_threads_are_kept_when_the_number_of_active_experts_changes():
    torch.set_num_threads(4)
    model, (x, y), started = hub(), batch(24), []
    before = set(threading.enumerate())
    for counts in [[12, 12, 0, 0, 0], [8, 8, 8, 0, 0], [6, 6, 6, 6, 0]] * 2:
        backward(model, x.double(), y, fixed_routing(model, counts=counts))
        started.append(set(threading.enumerate()) - before)
    assert len(started[2]) == 2 + 4  # of two of torch's threads each, and of one
    assert started[2] == started[-1]
    torch.set_num_threads(3)
    backward(model, x.double(), y, fixed_routing(model, counts=[12, 12, 0, 0, 0]))
    assert [expert.backwards[-1] for expert in model.experts[:2]] == [2, 1]


def test_the_callers_number_of_threads_stays():
    torch.set_num_threads(4)
    pools, barrier = ThreadPools(4), threading.Barrier(2)

    def number():
        barrier.wait()
        return torch.get_num_threads()

    assert pools.run([number, number], [3, 1], [1, 0]) == [3, 1]
    assert torch.get_num_threads() == 4
    late = []  # a thread that starts later has the caller's number, too
    thread = threading.Thread(target=lambda: late.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert late == [4]


def test_an_interrupted_run_ends_what_it_began_and_begins_nothing_more():
    pools, ended = ThreadPools(2), []

    def task():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        ended.append(True)

    gc.collect()
    gc.disable()  # Python drops an interrupt that arrives while a collected object says goodbye
    # A shell without job control starts what runs in its background with Ctrl-C ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            pools.run([task, lambda: time.sleep(0.1), ended.clear], [1, 1, 1], [0, 1, 2])
    finally:
        signal.signal(signal.SIGINT, before)
        gc.enable()
    assert ended == [True]
    assert pools.run([lambda: 1, lambda: 2], [1, 1], [1, 0]) == [1, 2]


def test_a_task_is_waited_for_whose_submission_was_interrupted(monkeypatch):
    """Ctrl-C when a worker has the task, and its caller not yet the worker's future."""
    pools, began, ended = ThreadPools(2), threading.Event(), []
    pools.run([lambda: 1, lambda: 2], [1, 1], [0, 1])
    submit = ThreadPoolExecutor.submit

    def interrupted(*arguments):
        submit(*arguments)
        began.wait()
        raise KeyboardInterrupt

    def task():
        began.set()
        time.sleep(0.1)
        ended.append(True)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pools.run([task, ended.clear], [1, 1], [0, 1])
    assert ended == [True]
    monkeypatch.undo()
    assert pools.run([lambda: 1, lambda: 2], [1, 1], [1, 0]) == [1, 2]


def test_an_interrupted_start_of_workers_leaves_the_number_of_threads(monkeypatch):
    """One worker has set its own number and waits for the other, which never comes."""
    before, pools, submit = torch.get_num_threads(), ThreadPools(2 * 3), ThreadPoolExecutor.submit
    calls = iter([submit])

    def interrupted(*arguments):
        call = next(calls, None)
        if call is None:
            raise KeyboardInterrupt
        return call(*arguments)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pools.run([lambda: 1, lambda: 2], [3, 3], [0, 1])
    monkeypatch.undo()
    own, own_of_new = torch.get_num_threads(), []
    new = threading.Thread(target=lambda: own_of_new.append(torch.get_num_threads()))
    new.start()
    new.join()
    assert [own, *own_of_new] == [before, before]
    found = pools.run([torch.get_num_threads] * 2, [3, 3], [0, 1])
    assert found == [3, 3]
    assert torch.get_num_threads() == before


def test_of_several_errors_the_first_tasks_is_raised_and_nothing_more_begins():
    pools, late = ThreadPools(2), []
    barrier = threading.Barrier(2)

    def fail(error):
        barrier.wait()
        raise error

    tasks = [partial(fail, KeyError("a")), partial(fail, ValueError("b")), lambda: late.append(1)]
    with pytest.raises(KeyError):
        pools.run(tasks, [1, 1, 1], [1, 0, 2])
    assert not late
    assert pools.run([lambda: 1], [1], [0]) == [1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the platform has no fork")
def test_a_forked_process_has_threads_of_its_own():
    model = sharing().eval()
    x, _ = batch()
    expected = model(x)

    def child(queue):
        queue.put(torch.equal(model(x), expected))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=LIMIT)
    process.join()


def test_threads_end_with_the_model():
    model = sharing()
    before = set(threading.enumerate())
    step(model)
    own = set(threading.enumerate()) - before
    assert len(own) == 2
    del model
    gc.collect()
    for thread in own:
        thread.join(timeout=LIMIT)
        assert not thread.is_alive()


def test_auto_takes_threads_where_there_are_several_and_experts_enough():
    for threads in (2, 8):
        torch.set_num_threads(threads)
        name, [reason], _ = choose("auto", Workload(CPU), [nn.Identity()] * 4, 2)
        assert name == "threads"
        assert f"at most {threads} at once, share torch's {threads} threads" in reason
        name, [reason], _ = choose("auto", Workload(CPU), [nn.Identity()] * 3, 2)
        assert (name, "4 experts or more" in reason) == ("sequential", True)
    with pytest.raises(ValueError, match=r"'threads' needs a CPU, .*cuda; move .*\"auto\""):
        choose("threads", Workload(torch.device("cuda")), [nn.Identity()] * 4, 2)
