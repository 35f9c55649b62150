"""What the run says: evaluation, log lines, TensorBoard, the progress line, collapse."""

import io
import math
import re
import time
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from support.host_reads import host_reads
from support.training import (
    CLASSES,
    TASK,
    VALIDATION,
    Stream,
    before_step,
    crash,
    make,
    pathway,
    pathway_objective,
    single,
)
from torch import nn

from hubpath_fast.training import (
    Losses,
    PathwayObjective,
    Reporting,
    RoutingCollapseWarning,
    evaluate,
    read_log,
)
from hubpath_fast.training.collapse import CollapseWatch
from hubpath_fast.training.log import TensorBoardLog
from hubpath_fast.training.progress import ProgressLine
from hubpath_fast.training.step_window import StepWindow


def test_evaluate_equals_a_loop_without_noise_and_restores_the_mode():
    model = pathway().train()
    result = evaluate(model, VALIDATION, TASK)
    assert model.training
    x, y = (torch.cat(parts) for parts in zip(*VALIDATION, strict=True))
    with torch.no_grad():
        prediction = model.eval()(x)
    assert result["n"] == len(y) == 32
    assert result["accuracy"] == (prediction.argmax(1) == y).double().mean().item()
    # Sums of float32 losses in another order: some roundings of 6e-8.
    assert result["loss"] == pytest.approx(
        nn.functional.cross_entropy(prediction, y).item(), rel=1e-6
    )


def test_a_line_has_the_mean_losses_loads_weights_and_entropy_of_its_steps(tmp_path):
    seen = []

    def objective(model, x, y):
        losses = pathway_objective(model, x, y)
        seen.append(losses)
        return losses

    trainer = make(pathway(), tmp_path, objective=objective, steps=6, log_every=3, clip_norm=1.0)
    history = trainer.fit().history
    assert history == read_log(tmp_path / "log.jsonl")
    assert [r["step"] for r in history] == [3, 6]
    for record, steps in zip(history, (seen[:3], seen[3:]), strict=True):
        for name in ("task", "explore", "exploit"):
            mean = sum(s.parts[name].item() for s in steps) / 3
            assert record[name] == pytest.approx(mean, rel=1e-12)
        assert record["loss"] == pytest.approx(sum(s.total.item() for s in steps) / 3, rel=1e-12)
        counts = torch.tensor([s.routing.counts() for s in steps]).sum(0)
        assert counts.sum() == 3 * 8 * 2
        assert record["load"] == pytest.approx((counts / counts.sum()).tolist())
        p = sum(s.routing.mean.detach().double() for s in steps) / 3
        assert record["mean_weight"] == pytest.approx(p.tolist(), rel=1e-12)
        entropy = -(p * p.log()).sum().item()
        assert record["entropy"] == pytest.approx(entropy, rel=1e-12)
        assert record["entropy_fraction"] == pytest.approx(entropy / math.log(3), rel=1e-12)
        assert record["grad_norm"] > 0
        assert set(record["lr"]) == {"experts", "heads", "router"}
        assert record["time"]["images_per_second"] > 0
        assert 0 <= record["time"]["data_wait"] <= 1


def test_nothing_but_the_counts_is_read_between_two_lines():
    window = StepWindow()
    routing = SimpleNamespace(mean=torch.full((2,), 0.5), counts=lambda: [3, 5])
    with host_reads() as reads:
        for step in range(4):
            parts = {"task": torch.tensor(2.0)}
            window.add(step, 1.0, Losses(torch.tensor(1.0), parts, routing, torch.ones(8, 3)))
            window.add_norm(torch.tensor(3.0))
    assert reads == []
    summary = window.summary()
    assert (summary["loss"], summary["task"], summary["grad_norm"]) == (1.0, 2.0, 3.0)
    assert summary["load"] == [0.375, 0.625]


def test_counts_that_nobody_has_read_wait_for_the_line_of_the_log():
    """One step's are known, those of two others lie on the device as offsets."""
    window, p = StepWindow(), torch.full((2,), 0.5)
    known = SimpleNamespace(mean=p, counts=lambda: [3, 5], counts_known=True)
    asked = [torch.tensor([0, 8, 8], dtype=torch.int32), torch.tensor([0, 1, 8], dtype=torch.int32)]
    late = [SimpleNamespace(mean=p, offsets=offsets, counts_known=False) for offsets in asked]
    with host_reads() as reads:
        for step, routing in enumerate([late[0], known, late[1]]):
            window.add(step, 1.0, Losses(torch.tensor(1.0), {}, routing, torch.ones(8, 3)))
    assert reads == []
    assert [record[3] for record in window.state_dict()["records"]] == [[8, 0], [3, 5], [1, 7]]
    assert window.summary()["rows"] == [12, 12]
    rows = torch.zeros(8, 3)
    rows[4] = math.nan  # of the second expert, which has the last seven
    window.add(3, 1.0, Losses(torch.tensor(math.nan), {}, late[1], rows))
    assert window.first_bad().experts == [1]


def test_losses_must_keep_their_names():
    window = StepWindow()
    window.add(1, 1.0, Losses(torch.tensor(1.0), {"task": torch.tensor(2.0)}))
    with pytest.raises(ValueError, match=r"\['loss', 'distill'\], before \['loss', 'task'\]"):
        window.add(2, 1.0, Losses(torch.tensor(1.0), {"distill": torch.tensor(2.0)}))


def summary(rows, weights):
    entropy = -sum(w * math.log(w) for w in weights if w)
    fraction = entropy / math.log(len(weights))
    return {"rows": rows, "mean_weight": weights, "entropy_fraction": fraction}


def test_a_collapse_is_warned_about_once_and_names_the_expert():
    watch = CollapseWatch(0.1, ["a", "b"])
    assert watch.update(summary([10, 10], [0.5, 0.5])) == []
    (text,) = watch.update(summary([10, 10], [0.004, 0.996]))
    assert re.search(r"entropy is 0\.0\d\d of its maximum, expert 1 \(b\) has 99\.6%", text)
    assert watch.update(summary([10, 10], [0.004, 0.996])) == []


def test_an_idle_expert_is_warned_about_after_a_stretch_long_enough_to_tell():
    watch = CollapseWatch(0.1)
    told = [watch.update(summary([50, 0, 50], [0.5, 0.1, 0.4])) for _ in range(5)]
    assert [len(t) for t in told] == [0, 0, 1, 0, 0]
    assert "expert 1 has had none of the last 300 rows" in told[2][0]
    # Few rows prove nothing: a third of 5 x 9 rows might well be missed by chance.
    few = CollapseWatch(0.1)
    assert all(few.update(summary([5, 0, 4], [0.5, 0.1, 0.4])) == [] for _ in range(5))
    # Rows in between start the stretch over, and a restored watch remembers.
    watch = CollapseWatch(0.1)
    for rows in ([50, 0], [50, 0], [50, 1], [50, 0], [50, 0]):
        assert watch.update(summary(rows, [0.9, 0.1])) == []
    again = CollapseWatch(0.1)
    again.load_state_dict(watch.state_dict())
    assert len(again.update(summary([50, 0], [0.9, 0.1]))) == 1


def test_a_collapsed_run_warns_in_python_and_in_the_log(tmp_path):
    model = pathway()
    with torch.no_grad():
        model.generator.heads.weight.zero_()
        model.generator.heads.bias.copy_(torch.tensor([30.0, 0, 0, -30, -30, -30]))
    trainer = make(model, tmp_path, steps=4, log_every=2, lr_router=0.0)
    with pytest.warns(RoutingCollapseWarning, match="expert 0 has 100.0%") as caught:
        history = trainer.fit().history
    assert len(caught) == 1
    assert ["warnings" in record for record in history] == [True, False]


def test_tensorboard_has_the_mean_of_samples_and_nothing_of_events(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = TensorBoardLog(tmp_path, 0, None)
    log.write({"step": 3, "evaluation": [1.0, 5.0], "loss": 2.0})
    events = [{"step": 2, "score": 7.0}, {"step": 3, "score": 9.0}]
    log.write({"step": 3, "episodes": events, "warnings": ["a word"], "share": [0.25, 0.75]})
    log.close()
    found = EventAccumulator(str(tmp_path)).Reload()
    scalars = {tag: found.Scalars(tag)[0].value for tag in found.Tags()["scalars"]}
    assert scalars == {"evaluation": 3.0, "loss": 2.0, "share/0": 0.25, "share/1": 0.75}


def test_tensorboard_has_the_experts_by_name_and_no_step_twice_after_a_resume(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(resume=False):
        return make(
            pathway(), tmp_path, steps=8, log_every=2, eval_every=4, save_every=4, resume=resume,
            validation=VALIDATION,
            reporting=Reporting(expert_names=["a", "b", "c"], progress=False),
        )  # fmt: skip

    with pytest.raises(RuntimeError, match="power cut"):
        before_step(run(), 8, crash).fit()  # step 6 is logged, step 4 is saved
    # Files of one second are read in the order of a count without leading zeros: 10 before 9.
    time.sleep(1.1)
    history = run(resume=True).fit().history
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = events.Tags()["scalars"]
    for tag in ("loss", "task", "load/b", "mean_weight/c", "entropy", "lr/router",
                "validation/accuracy", "time/data_wait"):  # fmt: skip
        assert tag in tags, tags
    assert [e.step for e in events.Scalars("load/b")] == [2, 4, 6, 8]
    assert [e.step for e in events.Scalars("validation/accuracy")] == [4, 8]
    values = [e.value for e in events.Scalars("load/b")]
    assert values == pytest.approx([r["load"][1] for r in history], rel=1e-6)  # float32 there


@pytest.mark.parametrize(("start", "count"), [(0, 20), (500, 10)])
def test_without_a_terminal_a_plain_line_for_every_twentieth_of_the_steps(start, count):
    """However often the log has one; what an evaluation said stays on the lines after it."""
    out = io.StringIO()
    line = ProgressLine(1000, start, Console(file=out, width=40), "demo")
    for step in range(start + 4, 1001, 4):
        record = {"step": step, "loss": 0.5, "time": {"images_per_second": 80.4}}
        line.advance(step)
        line.report(record | ({"validation": {"error": 0.25, "n": 9}} if step == 600 else {}))
    lines = out.getvalue().splitlines()
    assert len(lines) == count
    for text, step in zip(lines, range(start + 50, 1001, 50), strict=True):
        step += -step % 4  # the first line of the log that is not before
        value = " | val error 0.250" if step >= 600 else ""
        assert re.fullmatch(
            rf"demo step {step}/1000 {step / 1000:.0%} ETA \d+:\d\d \| 80 images/s"
            + re.escape(f"{value} | loss 0.5"),
            text,
        ), text


def test_on_a_terminal_one_line_renews_itself(tmp_path):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=200)
    reporting = Reporting(console, tensorboard=False)
    make(pathway(), tmp_path, reporting=reporting, steps=6, log_every=3).fit()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    assert "step 6/6" in text
    assert "100%" in text
    assert "images/s" in text
    assert len([line for line in text.split("\n") if line.strip()]) == 1


def test_the_pathway_objective_passes_on_what_the_criterion_returns():
    model = pathway()
    model.train()
    terms = {"total": 3, "task": 2, "explore": None, "exploit": 1}
    losses = PathwayObjective(lambda output, y: SimpleNamespace(**terms))(model, *Stream().batch(0))
    assert (losses.total, losses.parts) == (3, {"task": 2, "exploit": 1})
    assert losses.expert_outputs.shape == (16, CLASSES)
    assert sum(losses.routing.counts()) == 16


def test_bf16_autocast_reaches_the_model_and_not_the_log(tmp_path):
    seen = []

    def objective(model, x, y):
        prediction = model(x)
        seen.append(prediction.dtype)
        return Losses(nn.functional.cross_entropy(prediction, y))

    result = make(single(), tmp_path, objective=objective, amp="bf16", validation=VALIDATION).fit()
    assert set(seen) == {torch.bfloat16}
    assert math.isfinite(result.history[-1]["loss"])
    assert result.best_metric is not None


def test_the_best_weights_come_back_and_a_single_model_learns(tmp_path):
    trainer = make(
        single(), tmp_path, steps=120, eval_every=10, validation=VALIDATION, save_every=0,
        lr_expert=0.03, log_every=10,
    )  # fmt: skip
    result = trainer.fit()
    assert result.best_metric >= 0.8  # three classes by the largest of three features
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    with torch.no_grad():
        trainer.model.head.weight.zero_()
    trainer.load_best()
    assert evaluate(trainer.model, VALIDATION, TASK)["accuracy"] == result.best_metric
