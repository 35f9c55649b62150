"""A run that is cut short and resumed equals an uninterrupted one, to the bit."""

from types import SimpleNamespace

import pytest
import torch
from support.training import (
    VALIDATION,
    Stream,
    assert_same_run,
    before_step,
    crash,
    make,
    noisy_objective,
    pathway,
    records,
    single,
)
from torch import nn

from hubpath_fast.measure import Measure
from hubpath_fast.tasks import Classification
from hubpath_fast.training import CheckpointError, Losses, load_state, read_log


def stop_after(trainer, step):
    """Have ``trainer`` stop as by a signal once ``step`` updates are done."""
    return before_step(trainer, step, lambda _: trainer.stop())


SETTINGS = {
    "steps": 24,
    "accumulate": 3,  # of 8 samples: micro-batches of unequal size
    "clip_norm": 0.5,
    "log_every": 5,
    "eval_every": 6,
    "validation": VALIDATION,
    "objective": noisy_objective,
}


def trained(out_dir, seed=0, **settings):
    """A trainer after its run."""
    trainer = make(pathway(seed), out_dir, **(SETTINGS | settings))
    trainer.fit()
    return trainer


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize(
    "cut", [12, 13, 24]
)  # at an evaluation, between log lines, before the last
def test_n_steps_stop_and_n_more_equal_2n_steps(tmp_path, optimizer, cut):
    settings = {**SETTINGS, "optimizer": optimizer}
    first = stop_after(make(pathway(), tmp_path / "cut", **settings), cut).fit()
    assert first.interrupted
    assert first.steps == cut
    torch.manual_seed(12345)  # the second process starts from anywhere
    second = make(pathway(seed=7), tmp_path / "cut", resume=True, **settings)
    result = second.fit()
    assert not result.interrupted
    assert [r["step"] for r in result.history] == [5, 6, 10, 12, 15, 18, 20, 24]
    assert_same_run(trained(tmp_path / "whole", optimizer=optimizer), second)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_run_goes_on_in_another_memory_layout(tmp_path, optimizer):
    """Fused updates of a channels_last weight with a contiguous momentum would mix up elements."""

    def convolution():
        torch.manual_seed(0)
        layers = nn.Unflatten(1, (3, 1, 2)), nn.Conv2d(3, 8, (1, 2)), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(8, 3)).double()

    class Doubles(Stream):
        def batch(self, step):
            x, y = super().batch(step)
            return x.double(), y

    settings = {"stream": Doubles(), "optimizer": optimizer, "lr_expert": 0.1}
    whole = make(convolution(), tmp_path / "whole", **settings)
    whole.fit()
    assert stop_after(make(convolution(), tmp_path / "cut", **settings), 6).fit().interrupted
    again = convolution().to(memory_format=torch.channels_last)
    assert again[1].weight.stride() != whole.model[1].weight.stride()
    make(again, tmp_path / "cut", resume=True, **settings).fit()
    expected = whole.model.state_dict()
    torch.testing.assert_close(again.state_dict(), expected, rtol=1e-9, atol=1e-12)


def test_a_crash_repeats_the_steps_since_the_last_checkpoint_and_no_line_of_the_log(tmp_path):
    settings = {**SETTINGS, "save_every": 4}
    with pytest.raises(RuntimeError, match="power cut"):
        before_step(make(pathway(), tmp_path / "cut", **settings), 12, crash).fit()
    log = tmp_path / "cut/log.jsonl"
    assert [record["step"] for record in read_log(log)] == [5, 6, 10]
    log.write_text(log.read_text() + '{"step": 11, "lo')  # cut in the middle of a line
    second = make(pathway(seed=7), tmp_path / "cut", resume=True, **settings)
    assert second.state.step == 8
    assert second.fit().history == read_log(log)
    assert_same_run(trained(tmp_path / "whole", save_every=4), second)


def test_the_same_trainer_goes_on_after_a_stop(tmp_path):
    cut = stop_after(make(pathway(), tmp_path / "cut", **SETTINGS), 7)
    assert cut.fit().interrupted
    torch.rand(5)
    cut.fit()
    assert_same_run(trained(tmp_path / "whole"), cut)


def test_a_stop_during_an_evaluation_leaves_it_to_the_resumed_run(tmp_path):
    def drawing_batches():
        for batch in VALIDATION:
            torch.rand(1)  # an evaluation's iterator may draw too
            yield batch

    def stopping_batches():
        for i, batch in enumerate(drawing_batches()):
            if i == 2 and cut.state.step == 12:
                cut.stop()
            yield batch

    cut = make(pathway(), tmp_path / "cut", **{**SETTINGS, "validation": stopping_batches})
    first = cut.fit()
    assert first.interrupted
    assert (first.steps, [r["step"] for r in first.history]) == (12, [5, 6, 10])
    assert cut.model.training
    second = trained(tmp_path / "cut", seed=7, resume=True, validation=drawing_batches)
    assert_same_run(trained(tmp_path / "whole", validation=drawing_batches), second)


COURSE = {2: 0.3, 4: 0.5, 6: 0.5, 8: 0.4, 10: 0.9, 12: 0.9}


class Scripted(Classification):
    """A task whose metric has a given course over the steps of ``trainer``."""

    trainer = None

    def meter(self, device):
        value = COURSE[Scripted.trainer.state.step]
        return SimpleNamespace(add=lambda *_: None, result=lambda: {self.metric.name: value})


def scripted(tmp_path, task, **settings):
    Scripted.trainer = make(
        single(), tmp_path, eval_every=2, validation=VALIDATION, task=task(()), **settings
    )
    return Scripted.trainer


@pytest.mark.parametrize("cut", [None, 5, 6, 7, 8])
def test_early_stopping_counts_across_a_resume(tmp_path, cut):
    def trainer(**more):
        return scripted(tmp_path, Scripted, patience=2, **more)

    if cut is None:
        result = trainer().fit()
    else:
        assert stop_after(trainer(), cut).fit().interrupted
        result = trainer(resume=True).fit()
    assert (result.steps, result.best_metric, result.best_step) == (8, 0.5, 4)
    assert result.stopped_early
    assert not result.interrupted
    again = trainer(resume=True).fit()  # a finished run has nothing left to do
    assert (again.steps, again.stopped_early) == (8, True)
    assert records(again) == records(result)


class Erring(Scripted):
    metric = Measure("error", "min")


@pytest.mark.parametrize(("task", "settings"), [(Scripted, {"metric_mode": "min"}), (Erring, {})])
def test_a_smaller_metric_can_be_the_better(tmp_path, task, settings):
    result = scripted(tmp_path, task, **settings).fit()
    assert (result.best_metric, result.best_step) == (0.3, 2)


def test_a_folder_with_another_run_is_refused_and_nothing_in_it_changes(tmp_path):
    make(single(), tmp_path).fit()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"holds another run .*resume=True, delete it, or choose"):
        make(single(), tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(ValueError, match="expected a folder, got the file"):
        make(single(), file)


def test_resuming_with_nothing_to_resume_starts_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 3, "loss": 1.0}\n')  # died before its first save
    result = make(single(), tmp_path, resume=True, log_every=4).fit()
    assert [r["step"] for r in result.history] == [4, 8, 12]


def test_resuming_another_configuration_names_every_key_with_both_values(tmp_path):
    make(single(), tmp_path, run={"hub": ["a", "b"], "data": {"folder": "x"}}).fit()
    with pytest.raises(CheckpointError) as info:
        make(
            single(), tmp_path, resume=True,
            run={"hub": ("a", "c"), "data": {"folder": "x"}, "k": 2},
            lr_expert=0.5, log_every=3, save_every=7,
        )  # fmt: skip
    assert (
        "(trainer.lr_expert: 0.01 there, 0.5 now; run.hub: ['a', 'b'] there, ['a', 'c'] now; "
        "run.k: 'absent' there, 2 now)"  # but how often it logs and saves may change
    ) in str(info.value)


def test_a_run_whose_metric_was_named_resumes_by_the_same_name(tmp_path):
    named = {"metric": "accuracy", "metric_mode": "max"}  # as files of the first version have it
    for _ in range(2):
        assert make(single(), tmp_path, resume=True, **named).fit().steps == 12


def test_resuming_another_model_or_other_groups_says_which(tmp_path):
    make(single(), tmp_path).fit()
    wider = single()
    wider.head = torch.nn.Linear(12, 5)
    with pytest.raises(
        CheckpointError,
        match=r"head\.bias is float32 \[3\] in the file, float32 \[5\] in the model",
    ):
        make(wider, tmp_path, resume=True)
    frozen = single()
    frozen.body.requires_grad_(False)
    with pytest.raises(CheckpointError, match="parameter groups are not the ones given now"):
        make(frozen, tmp_path, resume=True)


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    """Without parts that couple the batch; micro-batches of 3, 3 and 2 samples weigh as such."""

    def objective(model, x, y):
        return Losses(torch.nn.functional.cross_entropy(model.head(model.body[0](x)), y))

    gradients = {}
    for accumulate in (1, 3):
        model = single().double()
        stream = Stream()
        x, y = stream.batch(0)
        stream.batches = lambda start, x=x, y=y: iter([(x.double(), y)])
        trainer = make(
            model, tmp_path / str(accumulate), stream, objective, steps=1, accumulate=accumulate,
            optimizer="sgd", momentum=0.0, weight_decay=0.0, schedule="constant", lr_expert=1.0,
        )  # fmt: skip
        before = model.head.weight.detach().clone()
        result = trainer.fit()
        gradients[accumulate] = before - model.head.weight.detach()
        gradients[f"loss {accumulate}"] = torch.tensor(result.history[0]["loss"])
    # float64 sums in another order
    torch.testing.assert_close(gradients[1], gradients[3], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients["loss 1"], gradients["loss 3"], rtol=1e-12, atol=0)


def test_a_batch_smaller_than_its_micro_batches_and_a_stream_that_ends_are_errors(tmp_path):
    with pytest.raises(ValueError, match="samples of a batch, got 4 for the 2 of step 0"):
        make(single(), tmp_path / "a", Stream(size=2), accumulate=4).fit()
    short = Stream()
    short.batches = lambda start: iter([short.batch(0)])
    with pytest.raises(ValueError, match="stream: ended at step 1 of 12"):
        make(single(), tmp_path / "b", short).fit()


@pytest.mark.parametrize(
    "content",
    ["{}", "[]", "5", '{"trainer": 5, "run": {}}', '{"trainer": {"stepz": 1}, "run": {}}'],
)
def test_a_checkpoint_whose_settings_are_none_is_named(tmp_path, content):
    make(single(), tmp_path).fit()
    (tmp_path / "last/config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"last/config\.json does not hold the settings of a"):
        make(single(), tmp_path, resume=True)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.clear(), r"last/state\.pt cannot be resumed from: it lacks run"),
        (lambda state: state["run"].update(extra=1), "last cannot be resumed from .*extra"),
        (lambda state: state.update(window=5), "last cannot be resumed from"),
        (lambda state: state.update(watch=None), "last cannot be resumed from"),
    ],
)
def test_a_state_that_is_none_is_named(tmp_path, change, words):
    make(single(), tmp_path).fit()
    state = load_state(tmp_path / "last")
    change(state)
    torch.save(state, tmp_path / "last/state.pt")
    with pytest.raises(CheckpointError, match=words):
        make(single(), tmp_path, resume=True)


@pytest.mark.parametrize(
    "line", [b"5", b"[1]", b'{"loss": 1}', b'{"step": "3"}', b"\0\0\xff", b"{"]
)
def test_a_line_of_the_log_that_is_no_record_ends_it(tmp_path, line):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"step": 5}\n' + line + b'\n{"step": 10}\n')
    assert read_log(log) == [{"step": 5}]


def test_what_kills_left_unfinished_is_gone_when_the_run_goes_on(tmp_path):
    make(single(), tmp_path, validation=VALIDATION).fit()
    for name in (".last.new", ".last.old", ".best.new", ".best.old"):  # halfway made or removed
        (tmp_path / name).mkdir()
    make(single(), tmp_path, validation=VALIDATION, resume=True).fit()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last", "log.jsonl"]
