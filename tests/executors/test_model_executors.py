"""The executors of a model: chosen for each kind of batch, kept, and reported."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from support.graphs import FakeBackend
from support.models import M, batch, build, conv_expert
from torch import nn

from hubpath_fast.executors import SequentialExecutor, Workload, choice, of_model, remembered
from hubpath_fast.executors.graphs import GraphsExecutor
from hubpath_fast.executors.of_model import ModelExecutors

pytestmark = pytest.mark.usefixtures("user_cache")
CPU = torch.device("cpu")


class Counting(SequentialExecutor):
    """Stands for captured graphs, which need CUDA."""

    name, obstacle = "graphs", None


class OnStreams(SequentialExecutor):
    name = "streams"


@pytest.fixture
def as_on_cuda(monkeypatch):
    """``auto`` chooses as on CUDA, and what it makes runs on a CPU. Returns how often it chose."""
    asked = []

    def on_cuda(work, experts, obstacle=None):
        asked.append(work)
        return choice._on_cuda(work.samples, experts, obstacle)

    monkeypatch.setattr(choice, "by_rule", on_cuda)
    made = {"graphs": Counting, "streams": OnStreams, "sequential": SequentialExecutor}
    monkeypatch.setattr(of_model, "make_executor", lambda name: made[name]())
    return asked


def test_a_large_batch_between_training_steps_keeps_the_graphs(as_on_cuda):
    model = build()
    model(batch(48)[0])
    graphs = model._executors.made["graphs"]
    with torch.no_grad():
        model.eval()(batch(300)[0])
        model(batch(40)[0])
    model.train()(batch(48)[0])
    assert model._executors.made["graphs"] is graphs
    assert graphs.counters.steps == 3
    assert model._executors.made["sequential"].counters.steps == 1


def test_the_report_tells_of_training_and_of_what_runs_otherwise(as_on_cuda):
    model = build()
    with torch.no_grad():
        model(batch(300)[0])
        assert model.executor_report().executor == "sequential"
        assert model.executor_report().notes == ()
    model(batch(48)[0])
    model(batch(48)[0])
    with torch.no_grad():
        model(batch(300)[0])
    report = model.executor_report()
    assert (report.executor, report.steps) == ("graphs", 2)
    assert "every expert can be captured" in report.reasons[0]
    [note] = report.notes
    assert note.startswith("predictions of more than 256 samples: sequential (2 steps), because ")
    assert note in str(report)


def test_a_step_looks_nothing_up_but_what_was_chosen(as_on_cuda, monkeypatch):
    model = build()
    for _ in range(2):
        model(batch(48)[0])
        with torch.no_grad():
            model(batch(48)[0])
            model(batch(300)[0])
        looked = len(as_on_cuda)
        monkeypatch.setattr(choice, "refused", pytest.fail)
        monkeypatch.setattr(remembered, "stored", pytest.fail)
    assert looked == len(as_on_cuda) == 3


def test_experts_are_looked_at_again_when_they_are_others(as_on_cuda):
    model = build()
    model(batch(8)[0])
    assert model.executor_report().executor == "graphs"
    model.experts[1] = conv_expert()
    model.experts[1].not_captured = "has its reasons"
    model(batch(8)[0])
    report = model.executor_report()
    assert report.executor == "streams"
    assert "experts[1] (Sequential) has its reasons" in report.reasons[0]
    model.remove_expert(1)
    model(batch(8)[0])
    assert model.executor_report().executor == "graphs"
    model.add_expert(conv_expert())
    model.experts[M - 1].register_forward_hook(lambda *_: None)
    model(batch(8)[0])
    assert "has hooks" in model.executor_report().reasons[0]


def test_auto_asks_again_once_graphs_do_not_fit(as_on_cuda):
    model, (x, _) = build(), batch(8)
    model(x)
    model._executors.made["graphs"].obstacle = "graphs would need 31 GiB, and may hold 24"
    for steps in (1, 2, 3):
        model(x)
        report = model.executor_report()
        assert (report.executor, report.steps) == ("sequential", steps)
        assert report.reasons[0].startswith("graphs would need 31 GiB, and may hold 24")
    assert "graphs" not in model._executors.made
    model.experts[0] = conv_expert()
    model(x)
    assert model.executor_report().executor == "graphs"  # of other experts nothing is known


def test_an_obstacle_of_graphs_that_were_asked_for_changes_nothing(monkeypatch):
    monkeypatch.setattr(choice, "runs_on", lambda name, device: True)
    monkeypatch.setattr(of_model, "make_executor", lambda name: Counting())
    model, (x, _) = build("graphs"), batch(8)
    model(x)
    model._executors.made["graphs"].obstacle = "too large"
    model(x)
    assert model._executors.made["graphs"].counters.steps == 2


def test_another_executor_may_be_asked_for_at_any_time(as_on_cuda):
    model, (x, _) = build(), batch(8)
    model(x)
    model.executor = "sequential"
    model(x)
    report = model.executor_report()
    assert (report.asked, report.executor, report.steps) == ("sequential", "sequential", 1)
    assert (report.reasons, report.notes) == (("it was asked for",), ())
    model.executor = "auto"
    model(x)
    assert model.executor_report().steps == 2


@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_starts_with_nothing(as_on_cuda, again):
    model = build()
    model(batch(8)[0])
    twin = again(model)
    assert twin._executors.made == {}
    assert twin._executors is not model._executors
    assert twin.executor_report().steps == 0
    twin(batch(8)[0])
    assert model._executors.made["graphs"].counters.steps == 1


def test_what_was_measured_is_followed_and_named():
    model, (x, _) = build(), batch(8)
    work = Workload(CPU, 8, True, tuple(x.shape[1:]))
    times = {"sequential": 15.0, "threads": 12.3}
    remembered.remember([remembered.made(work, model.experts, model.k, "threads", times)])
    model(x)
    with torch.no_grad():
        model(x)
    report = model.executor_report()
    assert report.executor == "threads"
    assert "12.3 ms against 15 ms (sequential)" in report.reasons[0]
    [note] = report.notes[-1:]
    assert note.startswith("predictions of 8 samples: sequential (1 steps), because ")
    model.k = 1
    model(x)
    assert model.executor_report().executor == "sequential"


def test_other_precisions_are_other_cases():
    model, (x, _) = build(), batch(8)
    work = Workload(CPU, 8, True, tuple(x.shape[1:]), torch.bfloat16)
    times = {"sequential": 15.0, "threads": 12.3}
    remembered.remember([remembered.made(work, model.experts, model.k, "threads", times)])
    model(x)
    assert model.executor_report().executor == "sequential"
    with torch.autocast("cpu", torch.bfloat16):
        model(x)
    assert model.executor_report().executor == "threads"


def test_graphs_that_are_given_are_taken_as_they_are():
    model = build(GraphsExecutor(FakeBackend))
    model(batch(8)[0])
    assert model._executors.made == {}
    report = model.executor_report()
    assert (report.asked, report.reasons) == ("graphs", ("it was given",))


def test_the_scores_of_the_generator_come_from_the_executor_that_runs_the_batch(as_on_cuda):
    seen = []
    model = build()
    model(batch(48)[0])
    graphs = model._executors.made["graphs"]
    graphs.scores = lambda generator, x: seen.append(len(x)) or generator(x)
    model(batch(48)[0])
    with torch.no_grad():
        model(batch(300)[0])
    assert seen == [48]


def test_executors_of_no_model_hold_nothing():
    executors = pickle.loads(pickle.dumps(ModelExecutors()))
    experts, x = nn.ModuleList([nn.Linear(2, 2)]), torch.zeros(3, 2)
    first = executors("auto", experts, 1, x)
    assert executors("auto", experts, 1, x) is first


class FakeGraphs(GraphsExecutor):
    """Captured graphs that a CPU can hold."""

    def __init__(self):
        super().__init__(FakeBackend)


@pytest.fixture
def held_by_graphs(monkeypatch):
    """held_by_graphs(asked) -> a model that has run a batch by graphs, and what holds their memory
    (a weak reference)."""

    def run(asked):
        model = build(asked)
        model(batch(8)[0])
        return model, weakref.ref(model._executors.made["graphs"]._store)

    monkeypatch.setattr(
        of_model,
        "make_executor",
        lambda name: FakeGraphs() if name == "graphs" else SequentialExecutor(),
    )
    return run


@pytest.mark.parametrize("other", ["sequential", SequentialExecutor()])
def test_graphs_free_their_memory_once_another_executor_is_asked_for(
    held_by_graphs, monkeypatch, other
):
    monkeypatch.setattr(choice, "runs_on", lambda name, device: True)
    model, store = held_by_graphs("graphs")
    model(batch(8)[0])
    assert store() is not None
    model.executor = other
    model(batch(8)[0])
    gc.collect()
    assert store() is None


def test_graphs_free_their_memory_once_the_model_is_elsewhere(held_by_graphs, monkeypatch):
    monkeypatch.setattr(choice, "by_rule", lambda *_: choice.Choice("graphs", ("so it is",)))
    model, store = held_by_graphs("auto")
    monkeypatch.setattr(choice, "by_rule", lambda *_: choice.Choice("sequential", ("so it is",)))
    executors, x = model._executors, torch.zeros(8, 3, device="meta")
    assert executors("auto", model.experts, model.k, x).name == "sequential"
    gc.collect()
    assert store() is None


def test_auto_keeps_what_may_run_on_the_device(monkeypatch):
    monkeypatch.setattr(of_model, "make_executor", lambda name: pytest.fail("it was dropped"))
    executors, cuda = ModelExecutors(), torch.device("cuda")
    executors.made = {"graphs": FakeGraphs(), "sequential": SequentialExecutor()}
    executors._let_go("auto", cuda)
    assert list(executors.made) == ["graphs", "sequential"]
    executors._let_go("graphs", cuda)
    assert list(executors.made) == ["graphs", "sequential"]
    executors._let_go("sequential", cuda)
    assert list(executors.made) == ["sequential"]


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_auto_follows_the_number_of_threads(set_threads):
    model, (x, _) = build(), batch(8)
    for threads, name in ((1, "sequential"), (2, "threads"), (1, "sequential")):
        set_threads(threads)
        assert model.executor_report().executor == name
        model(x)
        assert model.executor_report().executor == name
        assert not any("steps of at most" in note for note in model.executor_report().notes)


def test_what_was_measured_with_other_threads_is_not_followed(set_threads):
    model, (x, _) = build(), batch(8)
    work = Workload(CPU, 8, True, tuple(x.shape[1:]))
    set_threads(1)
    times = {"sequential": 15.0, "threads": 12.3}
    remembered.remember([remembered.made(work, model.experts, model.k, "threads", times)])
    for threads, reason in (
        (1, "it was the fastest"),
        (2, "the experts that have rows"),
        (1, "it "),
    ):
        set_threads(threads)
        model(x)
        assert model.executor_report().reasons[0].startswith(reason)


def hooked(model):
    model.experts[1][0].register_forward_hook(lambda *_: None)


def replaced(model):
    model.experts[1][0] = copy.deepcopy(model.experts[1][0])


def frozen(model):
    model.experts[1][0].requires_grad_(False)


@pytest.mark.parametrize("change", [hooked, replaced, frozen])
def test_what_changes_inside_an_expert_is_seen_before_long(change):
    executors, experts = ModelExecutors(), nn.ModuleList(conv_expert() for _ in range(2))
    model, x = nn.Module(), torch.zeros(3, 3, 8, 8)
    model.experts = experts

    def choice_after(batches):
        for _ in range(batches):
            executors("auto", experts, 1, x)
        [found] = executors._choices.values()
        return found

    first = choice_after(1)
    change(model)
    second = choice_after(of_model.LOOK_EVERY)
    assert second is not first
    assert choice_after(2 * of_model.LOOK_EVERY) is second


def test_a_measurement_of_frozen_experts_is_left_once_they_are_trained():
    model, (x, _) = build(), batch(8)
    model.experts[0].requires_grad_(False)
    work = Workload(CPU, 8, True, tuple(x.shape[1:]))
    times = {"sequential": 15.0, "threads": 12.3}
    remembered.remember([remembered.made(work, model.experts, model.k, "threads", times)])
    model(x)
    assert model.executor_report().executor == "threads"
    model.experts[0].requires_grad_(True)
    assert model.executor_report().executor == "sequential"  # a report looks at once
    model(x)
    assert model.executor_report().executor == "sequential"


def test_hooks_that_are_gone_are_forgotten(as_on_cuda):
    model, (x, _) = build(), batch(8)
    handle = model.experts[0].register_forward_hook(lambda *_: None)
    model(x)
    assert model.executor_report().executor == "streams"
    handle.remove()
    assert model.executor_report().executor == "graphs"
