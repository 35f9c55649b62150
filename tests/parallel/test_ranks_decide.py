"""What one rank meets, all ranks act on at the same step: a signal, a loss that is not finite, an
exception, a stream that breaks; and settings that do not fit several ranks are refused by all."""

import json
import os
import signal
import warnings

import pytest
import torch
from support.processes import connected, run_ranks
from support.shared_runs import TASK, build, history_of, make, samples, state_of

from hubpath_fast.data.tensors import TensorBatches
from hubpath_fast.parallel import Ranks
from hubpath_fast.training import PathwayObjective, TrainerConfig, find_checkpoint
from hubpath_fast.training.agreement import check_ranks

STEPS = 6
FAILING = 1  # the rank that something happens to


def acting(step, act):
    """An objective that has ``act`` done in the forward of an update (from 1)."""
    plain, calls = PathwayObjective(TASK.criterion(0.5)), []

    def objective(model, x, y):
        calls.append(1)
        losses = plain(model, x, y)
        if len(calls) == step:
            losses = act(losses) or losses
        return losses

    return objective


def terminate(_=None):
    os.kill(os.getpid(), signal.SIGTERM)


def not_finite(losses):
    losses.total = losses.total * float("nan")
    return losses


class Signalling(TensorBatches):
    """Evaluation batches in whose second pass, at the second batch, a signal comes."""

    passes = 0

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(super().__iter__()):
            if (self.passes, i) == (2, 1):
                terminate()
            yield batch


def break_stream(trainer, step, error):
    plain = trainer._feed.stream.batches

    def batches(start):
        for number, batch in enumerate(plain(start), start):
            if number == step:
                raise error
            yield batch

    trainer._feed.stream.batches = batches


def fail_in_expert(model, index, call, error):
    """At a call in training."""
    calls = []

    def hook(module, _):
        calls.extend([1] * module.training)
        if len(calls) == call:
            raise error

    model.experts[index].register_forward_pre_hook(hook)


def spoil_expert(model, index, call):
    """Outputs of the expert that are not finite, at a call in training."""
    calls = []

    def hook(module, inputs, output):
        calls.extend([1] * module.training)
        return output * float("nan") if len(calls) == call else None

    model.experts[index].register_forward_hook(hook)


def outcome(trainer):
    try:
        result = trainer.fit()
    except Exception as error:
        return {
            "error": type(error).__name__,
            "message": str(error),
            "agreed": getattr(error, "agreed", False),
            "experts": getattr(error, "experts", None),
            "step": trainer.state.step,
        }
    return {
        "interrupted": result.interrupted,
        "steps": result.steps,
        "history": history_of(result),
        "whole": result,
        "reason": trainer._agreement.reason if result.interrupted else None,
    }


def scenarios(ranks, folder):
    """name: a trainer with what happens to the failing rank."""
    here = ranks.rank == FAILING
    settings = {"steps": STEPS, "eval_every": 2}

    def trainer(name, act=None, step=3, model=None, **more):
        objective = acting(step, act if here and act is not None else lambda losses: None)
        model = build(ranks=ranks) if model is None else model
        return make(model, folder / name, ranks, objective=objective, **settings, **more)

    yield "nothing", trainer("nothing")
    yield "a signal", trainer("a signal", terminate)
    made = trainer("stop")
    made.objective = acting(3, lambda losses: made.stop() if here else None)
    yield "stop", made
    batches = Signalling if here else TensorBatches
    validation = batches(samples(23, seed=6), 10, share=ranks.share())
    yield "a signal in an evaluation", trainer("a signal in an evaluation", validation=validation)
    yield "a loss", trainer("a loss", not_finite)
    model = build(ranks=ranks)
    if here:
        spoil_expert(model, 3, 3)
    yield "an expert that gives NaN", trainer("an expert that gives NaN", model=model)
    model = build(ranks=ranks)
    if here:
        fail_in_expert(model, 3, 3, ValueError("images are too small"))
    yield "an expert that raises", trainer("an expert that raises", model=model)
    broken = trainer("a stream that breaks")
    if here:
        break_stream(broken, 3, OSError("the disk is gone"))
    yield "a stream that breaks", broken
    broken = trainer("a stream that a signal breaks", terminate)
    if here:
        break_stream(broken, 3, RuntimeError("the worker is gone"))
    yield "a stream that a signal breaks", broken
    yield "a parameter", trainer("a parameter", step=STEPS, save_every=0)


def refused(ranks, folder):
    """What the trainer says of settings that do not fit, by a name."""
    cases = {
        "batch": {"batch_size": 21},
        "other": {"lr_expert": 0.01 if ranks.rank == FAILING else 0.02},
        "run": {"run": {"data": {"folder": "b" if ranks.rank == FAILING else "a"}}},
    }
    found = {}
    for name, settings in cases.items():
        with pytest.raises(ValueError) as info:
            make(build(ranks=ranks), folder / "refused", ranks, **settings)
        found[name] = str(info.value)
    config = TrainerConfig(batch_size=20, accumulate=11)
    with pytest.raises(ValueError) as info:
        check_ranks(ranks, config, build(ranks=ranks))
    found["parts"] = str(info.value)
    with pytest.raises(ValueError) as info:
        make(build(), folder / "refused", ranks)
    found["model"] = str(info.value)
    trainer = make(build(ranks=ranks), folder / "refused", ranks)
    trainer._feed.stream.places = None  # the whole batch instead of a share
    with pytest.raises(ValueError) as info:
        trainer.fit()
    found["share"] = str(info.value)
    return found


def rank_main(rank, folder):

    ranks = connected("ep")
    found = {}
    for name, trainer in scenarios(ranks, folder):
        if name == "a parameter" and rank == FAILING:
            spoil_last_update(trainer)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            found[name] = outcome(trainer)
        found[name]["warned"] = len(warned)
    found["refused"] = refused(ranks, folder)
    settings = {"steps": STEPS, "eval_every": 2, "resume": True}
    for name in ("a signal", "a signal in an evaluation"):
        trainer = make(build(ranks=ranks), folder / name, ranks, **settings)
        found[f"{name}, resumed"] = outcome(trainer)
    return found


def spoil_last_update(trainer):
    """An expert's parameter is not finite after it, though no loss shows it."""
    plain, calls = trainer.optimizer.step, []

    def step(*args):
        plain(*args)
        calls.append(1)
        if len(calls) == STEPS:
            with torch.no_grad():
                trainer.model.experts[3][0].weight.fill_(float("inf"))

    trainer.optimizer.step = step


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decide")
    return run_ranks(rank_main, 2, folder, folder), folder


def of(found, name):
    return [each[name] for each in found[0]]


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("a signal", 3),
        ("stop", 3),
        ("a signal in an evaluation", 4),
        ("a stream that a signal breaks", 3),
    ],
)
def test_what_asks_one_rank_to_stop_stops_all_at_the_same_step(found, name, step):
    first, second = of(found, name)
    assert first["interrupted"]
    assert second["interrupted"]
    assert first["steps"] == second["steps"] == step
    asked = "stop()" if name == "stop" else "SIGTERM"
    assert first["reason"] == second["reason"] == f"{asked} to rank {FAILING}"
    checkpoint = find_checkpoint(found[1] / name / "last")
    assert checkpoint is not None


@pytest.mark.parametrize("name", ["a signal", "a signal in an evaluation"])
def test_a_stopped_run_goes_on_as_if_it_had_not_been_stopped(found, name):
    for each, whole in zip(of(found, f"{name}, resumed"), of(found, "nothing"), strict=True):
        assert not each["interrupted"]
        assert each["history"] == whole["history"]


def test_results_are_the_same_on_all_ranks(found):
    first, second = of(found, "nothing")
    assert first["whole"] == second["whole"]
    assert [line["step"] for line in first["history"]] == list(range(1, STEPS + 1))


def test_one_rank_writes_the_log_and_warns(found):
    lines = (found[1] / "nothing" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    assert of(found, "nothing")[1]["warned"] == 0


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_with_the_same_error(found):
    first, second = of(found, "a loss")
    assert first == second
    assert first["error"] == "NonFiniteLoss"
    assert first["agreed"]
    assert "the loss of step 3 is not finite on rank 1: loss nan" in first["message"]
    assert first["step"] == 2  # there was no update


def test_the_expert_whose_outputs_are_not_finite_is_named_on_all_ranks(found):
    first, second = of(found, "an expert that gives NaN")
    assert first == second
    assert first["error"] == "NonFiniteLoss"
    assert first["experts"] == ["expert 3"]
    assert "so are the outputs of expert 3" in first["message"]


def test_a_parameter_that_is_not_finite_on_one_rank_is_saved_by_none(found):
    first, second = of(found, "a parameter")
    assert first == second
    assert first["error"] == "NonFiniteLoss"
    assert f"a parameter is not finite after step {STEPS} on rank 1" in first["message"]
    assert find_checkpoint(found[1] / "a parameter" / "last") is None


def test_an_exception_in_one_ranks_expert_is_raised_by_all(found):
    first, second = of(found, "an expert that raises")
    assert first["error"] == second["error"] == "ValueError"
    assert "rank 1" in first["message"]
    assert "images are too small" in first["message"]
    assert "images are too small" in second["message"]
    assert first["step"] == second["step"] == 2
    assert first["agreed"]
    assert second["agreed"]


def test_a_stream_that_breaks_on_one_rank_ends_all(found):
    first, second = of(found, "a stream that breaks")
    assert first["error"] == second["error"] == "OSError"
    assert first["message"] == "rank 1, reading the batch of step 3: the disk is gone"
    assert first["step"] == second["step"] == 3


def test_what_does_not_fit_ranks_is_refused_by_all(found):
    for each in of(found, "refused"):
        assert each["batch"].startswith(
            "batch_size: expected a multiple of 2, the number of ranks, got 21; take 20 or 22"
        )
        assert each["parts"].startswith("accumulate: expected an integer in 1..10")
        assert "trainer.lr_expert: expected the same on every rank, got 0.02 on" in each["other"]
        assert "run.data.folder: expected the same on every rank, got 'a'" in each["run"]
        assert each["model"].startswith("model: expected one that is distributed over the 2 ranks")
        assert "expected 10 of the 20 samples of a batch" in each["share"]


def test_one_process_needs_no_agreement(tmp_path):
    trainer = make(build(), tmp_path, Ranks(), steps=2)
    result = trainer.fit()
    assert result.steps == 2
    assert state_of(trainer.model)
