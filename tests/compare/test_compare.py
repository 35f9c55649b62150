"""``hubpath compare`` end to end: two tiny networks with random weights, a folder of digits."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.compare import EQUAL, MIXED, QUIET, row_of, settings_of
from support.waiting import LIMIT, has_text, wait_until
from typer.testing import CliRunner

from hubpath_fast.baselines import SingleModel
from hubpath_fast.cli import app
from hubpath_fast.compare import compare
from hubpath_fast.compare.command import locked
from hubpath_fast.compare.plan import Job
from hubpath_fast.compare.problems import open_problem
from hubpath_fast.compare.settings import (
    CompareSettings,
    make_settings,
    open_folder,
    parse_rates,
)
from hubpath_fast.compare.tables import CANNOT
from hubpath_fast.compare.work import run_job
from hubpath_fast.compare.workers import Workers
from hubpath_fast.data.digits import DigitsTask, write_image_folder
from hubpath_fast.training import load_weights


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """A finished comparison of all methods: (folder, settings, rows)."""
    out = tmp_path_factory.mktemp("compare") / "all"
    settings = settings_of(data)
    return out, settings, compare(settings, "all", (0,), out, workers=1, console=QUIET)


@pytest.fixture(scope="module")
def alone(done):
    """What the fine-tuned experts say of the test images, from their checkpoints: ([2, n, C]
    probabilities, targets [n])."""
    out, settings, _ = done
    problem = open_problem(settings, 0)
    images = torch.cat([x for x, _ in problem.batches("test")])
    parts = []
    for i in range(2):
        model = SingleModel(problem.experts()[i])
        load_weights(model, out / f"runs/seed-0/single-{i}/last")
        with torch.no_grad():
            parts.append(model.eval()(images).softmax(dim=1))
    return torch.stack(parts), problem.targets["test"]


class TestAllMethods:
    def test_every_method_has_a_finished_row(self, done):
        _, _, rows = done
        assert [row["method"] for row in rows] == [
            "single:test_resnet #1", "single:test_resnet #2", "best-single",
            "best-single-in-hindsight", "ensemble-top-k", "ensemble", "ensemble-hard", "distill",
            "soup-uniform", "soup-greedy", "knowledge-flow", "zoo-tuning-lite", "zoo-tuning",
            "hub-pathway", "random-pathway", "without-explore", "without-exploit", "task-pathway",
            "noise-off", "hub-pathway-k2", "oracle",
        ]  # fmt: skip
        assert {row["status"] for row in rows} == {"done"}, [row["reason"] for row in rows]
        assert all(0 <= row["mean"] <= 1 and row["std"] == 0 for row in rows)
        assert all(row["seeds"] == [0] and row["dataset"] == "digits" for row in rows)

    def test_only_pathways_are_evaluated_while_they_train(self, done):
        """Reports show their curves and nobody else's; nothing is chosen among steps."""
        logs = {path.parent.name: path.read_text() for path in done[0].rglob("log.jsonl")}
        evaluated = {run for run, log in logs.items() if '"validation"' in log}
        routed = {run for run, log in logs.items() if '"entropy"' in log}
        assert evaluated == routed < set(logs)
        assert not list(done[0].rglob("best"))

    def test_votes_are_those_of_the_fine_tuned_experts(self, done, alone):
        _, _, rows = done
        probabilities, targets = alone
        right = probabilities.argmax(dim=2) == targets
        soft = (probabilities.sum(dim=0).argmax(dim=1) == targets).double().mean()
        assert row_of(rows, "ensemble")["mean"] == pytest.approx(soft.item())
        assert row_of(rows, "oracle")["mean"] == right.any(dim=0).double().mean().item()
        accuracies = right.double().mean(dim=1).tolist()
        for i in range(2):
            assert row_of(rows, f"single:test_resnet #{i + 1}")["mean"] == accuracies[i]
        assert row_of(rows, "best-single-in-hindsight")["mean"] == max(accuracies)

    def test_the_best_single_is_chosen_on_validation_data(self, done):
        out, _, rows = done
        results = [
            json.loads((out / f"runs/seed-0/single-{i}/result.json").read_text()) for i in range(2)
        ]
        best = max(results, key=lambda r: r["validation"]["accuracy"])
        assert row_of(rows, "best-single")["mean"] == best["test"]["accuracy"]
        assert row_of(rows, "ensemble-top-k")["mean"] == best["test"]["accuracy"]  # K is 1 here

    @pytest.mark.parametrize(
        ("method", "inference", "training"),
        [
            ("best-single", 1, 2), ("ensemble", 2, 2), ("oracle", 2, 2), ("distill", 1, 3),
            ("soup-uniform", 1, 0), ("knowledge-flow", 1, 4), ("zoo-tuning", 1, 1),
            ("hub-pathway", 1, 1), ("hub-pathway-k2", 2, 2), ("random-pathway", 1, 1),
        ],
    )  # fmt: skip
    def test_expert_forwards(self, done, method, inference, training):
        row = row_of(done[2], method)
        assert row["forwards_per_sample"] == inference
        assert row["train_forwards_per_sample"] == training

    def test_a_vote_costs_what_its_members_cost(self, done):
        out, _, rows = done
        results = [
            json.loads((out / f"runs/seed-0/single-{i}/result.json").read_text()) for i in range(2)
        ]
        row = row_of(rows, "ensemble")
        assert row["gflops_per_sample"] == sum(r["gflops_per_sample"] for r in results)
        assert row["train_seconds"] == sum(r["train_seconds"] for r in results)

    def test_without_exploit_reports_none(self, done):
        log = done[0] / "runs/seed-0/without-exploit/log.jsonl"
        assert json.loads(log.read_text().splitlines()[0])["exploit"] == 0

    def test_the_task_pathway_sends_all_images_the_same_way(self, done):
        weights = load_file(done[0] / "runs/seed-0/task-pathway/outputs.safetensors")["weights"]
        assert (weights == weights[0]).all()
        assert (weights > 0).sum(dim=1).unique().tolist() == [1]

    def test_random_pathways_have_equal_weights(self, done):
        weights = load_file(done[0] / "runs/seed-0/random-pathway/outputs.safetensors")["weights"]
        assert (weights > 0).sum(dim=1).unique().tolist() == [1]
        assert weights.max(dim=1).values.unique().tolist() == [1.0]
        assert (weights[:, 0] > 0).any()
        assert (weights[:, 1] > 0).any()

    def test_tables_say_the_same(self, done):
        out, _, rows = done
        table = json.loads((out / "table.json").read_text())
        assert table["rows"] == rows
        assert table["seeds"] == [0]
        best = max(row["mean"] for row in rows if not row["bound"])
        bold = [r["title"] for r in rows if f"{r['mean']:.3f}" == f"{best:.3f}" and not r["bound"]]
        lines = (out / "table.md").read_text().splitlines()
        assert [line.split("**")[1] for line in lines if line.startswith("| **")] == bold
        page = (out / "table.html").read_text()
        assert all(row["title"] in page for row in rows)

    def test_a_second_call_trains_nothing(self, done, monkeypatch):
        out, settings, rows = done

        def start(*_):
            raise AssertionError("a finished run is done again")

        monkeypatch.setattr(Workers, "_start", start)
        assert compare(settings, "all", (0,), out, console=QUIET) == rows
        some = compare(settings, "ensemble,hub_pathway", (0,), out, console=QUIET)
        assert [row["method"] for row in some] == ["ensemble", "hub-pathway"]
        assert (
            compare(settings, "all", (0,), out, console=QUIET) == rows
        )  # the table is whole again


class TestTrouble:
    def test_a_failed_run_is_a_failed_row_and_the_others_finish(self, data, tmp_path):
        settings, out = settings_of(data, MIXED, steps=1), tmp_path / "out"
        compare(settings, "single:test_resnet", (0,), out, 1, QUIET)
        in_the_way = out / "runs/seed-0/single-1/log.jsonl"
        in_the_way.mkdir(parents=True)
        rows = compare(settings, "single,ensemble,zoo-tuning", (0,), out, 1, QUIET)
        by_name = {row["method"]: row for row in rows}
        assert by_name["single:test_resnet"]["status"] == "done"
        assert by_name["single:test_efficientnet"]["status"] == "failed"
        assert "single-1" in by_name["single:test_efficientnet"]["reason"]
        assert by_name["ensemble"]["mean"] is None
        assert by_name["zoo-tuning"]["status"] == CANNOT
        assert "ResNet" in by_name["zoo-tuning"]["reason"]
        assert "failed" in (out / "table.md").read_text()

        in_the_way.rmdir()  # mended: the same command finishes it
        rows = compare(settings, "single,ensemble", (0,), out, 1, QUIET)
        assert {row["status"] for row in rows} == {"done"}

    def test_a_rate_that_diverges_is_not_chosen(self, data, tmp_path):
        settings = settings_of(data, rates=(1e30, 1e-3))
        rows = compare(settings, "single:test_resnet #1", (0,), tmp_path / "out", 1, QUIET)
        assert rows[0]["rates"] == [[1e-3]]
        failed = tmp_path / "out/runs/seed-0/single-0-lr-1e+30/failed.json"
        assert "finite" in json.loads(failed.read_text())["error"]

    def test_killed_and_started_again_it_gives_the_same_table(self, data, tmp_path):
        arguments = [
            sys.executable, "-c", "from hubpath_fast.cli import main; main()", "compare",
            "--data", str(data), "--hub", EQUAL, "--methods", "single,ensemble", "--seeds", "0",
            "--no-pretrained", "--image-size", "32", "--k", "1", "--steps", "40",
            "--batch-size", "8", "--workers", "1", "--rates", "1e-3", "--out",
        ]  # fmt: skip
        whole, cut = tmp_path / "whole", tmp_path / "cut"
        process = subprocess.Popen([*arguments, str(cut)], stdout=subprocess.DEVNULL)
        log = cut / "runs/seed-0/single-1/log.jsonl"
        wait_until(lambda: has_text(log), "the first line of the log")
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (cut / "table.json").exists()
        settings = settings_of(data, steps=40)
        found = [compare(settings, "single,ensemble", (0,), out, 1, QUIET) for out in (whole, cut)]
        whole_rows, cut_rows = [[(r["method"], r["accuracies"]) for r in rows] for rows in found]
        assert whole_rows == cut_rows
        losses = [
            json.loads((out / "runs/seed-0/single-1/result.json").read_text())["test"]["loss"]
            for out in (whole, cut)
        ]
        assert losses[0] == losses[1]

    def test_a_signal_stops_it_and_all_that_it_started(self, data, tmp_path):
        out = tmp_path / "out"
        code = (
            "import sys; from tests.support.compare import settings_of, QUIET; "
            "from hubpath_fast.compare import compare; from pathlib import Path; "
            "s = settings_of(Path(sys.argv[1]), steps=100000); "
            "compare(s, 'single', (0,), sys.argv[2], 2, QUIET)"
        )
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(data), str(out)], cwd=root, stderr=subprocess.PIPE
        )
        logs = [out / f"runs/seed-0/single-{i}/log.jsonl" for i in range(2)]
        wait_until(lambda: all(map(has_text, logs)), "the first lines of both logs")
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=LIMIT)
        assert b"stopped by SIGTERM; the same command goes on from here" in said
        for log in logs:
            assert (log.parent / "last").is_dir()  # saved where it stood
            assert not (log.parent / "failed.json").exists()

    def test_other_settings_are_refused_with_what_differs(self, data, done, tmp_path):
        out, settings, _ = done
        for changed, text in (
            (settings_of(data, MIXED), "hub: .*test_efficientnet"),
            (settings_of(data, steps=4), r"trainer.steps: 3 there, 4 now"),
            (settings_of(data, rates=(1e-3, 1e-2)), r"rates: \[0.001\] there, \[0.001, 0.01\] now"),
        ):
            with pytest.raises(ValueError, match=text):
                compare(changed, "single", (0,), out, console=QUIET)
        (tmp_path / "notes.txt").write_text("mine")
        with pytest.raises(ValueError, match="holds something that is no comparison"):
            compare(settings, "single", (0,), tmp_path, console=QUIET)

    def test_another_at_work_keeps_its_settings(self, data, tmp_path):
        out = tmp_path / "out"
        open_folder(out, settings_of(data))
        before = (out / "compare.json").read_text()
        with locked(out), pytest.raises(ValueError, match="another comparison is at work"):
            compare(settings_of(data, steps=4), "single", (0,), out, console=QUIET)
        assert (out / "compare.json").read_text() == before

    def test_data_that_changed_is_refused(self, done, data, tmp_path):
        out, settings, _ = done
        job = Job(0, "single-0", settings.rates[0])
        other = write_image_folder(DigitsTask(1, 30), data.parent / "other", 30)
        moved = CompareSettings.from_dict(
            {**settings.to_dict(), "fit": {**settings.to_dict()["fit"], "data": str(other)}}
        )
        with pytest.raises(ValueError, match="the data is not what it was"):
            run_job(moved, job, out, tmp_path)

    def test_wrong_input_is_said_before_anything_is_made(self, data, tmp_path):
        out = tmp_path / "out"
        settings = settings_of(data)
        with pytest.raises(ValueError, match="'zoo-tunning' is unknown; did you mean zoo-tuning"):
            compare(settings, "zoo-tunning", (0,), out, console=QUIET)
        with pytest.raises(ValueError, match=r"seeds: expected different .* got \[0, 0\]"):
            compare(settings, "all", (0, 0), out, console=QUIET)
        with pytest.raises(ValueError, match="workers: expected an integer of at least 1, got 0"):
            compare(settings, "all", (0,), out, workers=0, console=QUIET)
        assert not out.exists()
        for text in ("fast", "1e-3,,2"):
            with pytest.raises(ValueError, match="rates: expected numbers"):
                parse_rates(text)
        with pytest.raises(ValueError, match="rates: expected different numbers above 0"):
            settings_of(data, rates=(1e-3, 1e-3))
        with pytest.raises(ValueError, match="'nowhere' is no folder, and as a name"):
            make_settings("nowhere", EQUAL)
        with pytest.raises(ValueError, match="data: nothing given"):
            make_settings(None, EQUAL)
        with pytest.raises(ValueError, match="temperature: expected a number above 0, got 0"):
            make_settings(str(data), EQUAL, distill={"temperature": 0})

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--methods", "ensembel"], "did you mean ensemble"),
            (["--seeds", "0,1,0"], "seeds: expected different whole numbers such as 0,1,2"),
            (["--hub", "test_resnett,test_resnet"], "did you mean test_resnet"),
            (["--data", "cifar-10"], "did you mean cifar-100"),
            (["--distill-weight", "2"], "distill_weight: expected a number from 0 to 1, got 2"),
            (["--k", "3"], "k: expected an integer in 1..2"),
            (["--data", "digits", "--image-size", "64"], "image_size: the digits have images and"),
            (["--data", "digits", "--validation", "0.3"], "validation: the digits have"),
            (["--device", "gpu0"], "device: expected cpu, cuda, cuda:0, ..., got 'gpu0'"),
        ],
    )
    def test_the_command_says_what_is_wrong(self, data, tmp_path, arguments, message):
        usual = ["--data", str(data), "--hub", EQUAL, "--no-pretrained", "--workers", "1"]
        usual += ["--out", str(tmp_path / "out"), "--steps", "1"]
        result = CliRunner().invoke(app, ["compare", *usual, *arguments])
        assert result.exit_code == 2, result.output
        assert message in " ".join(result.output.split())

    def test_the_report_command_names_its_page(self, done):
        result = CliRunner().invoke(app, ["report", str(done[0])])
        assert result.exit_code == 0, result.output
        assert (done[0] / "report" / "report.html").is_file()

    def test_no_held_out_images_are_refused(self, data, tmp_path):
        folder = tmp_path / "data"
        (folder).mkdir()
        for split in ("train", "test"):
            (folder / split).symlink_to(data / split)
        top = {"pretrained": False, "image_size": 32, "workers": 0, "validation": 0.0}
        settings = make_settings(str(folder), EQUAL, top=top, trainer={"steps": 1})
        with pytest.raises(ValueError, match="chooses on held-out images"):
            compare(settings, "single", (0,), tmp_path / "out", 1, QUIET)
