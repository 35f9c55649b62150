"""``hubpath compare`` end to end on two tiny networks with random weights and a folder of digits,
and its parts against figures worked out here."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from hubpath_fast.baselines import SingleModel
from hubpath_fast.cli import app
from hubpath_fast.compare import compare
from hubpath_fast.compare.methods import choose_methods, methods_of
from hubpath_fast.compare.paper import paper_numbers
from hubpath_fast.compare.plan import Job, needed_runs, plan_jobs
from hubpath_fast.compare.problems import open_problem
from hubpath_fast.compare.results import RunFailed, SeedResults
from hubpath_fast.compare.settings import CompareSettings, make_settings, parse_rates
from hubpath_fast.compare.tables import CANNOT, as_table, make_rows, markdown
from hubpath_fast.compare.work import run_job
from hubpath_fast.compare.workers import Workers, available_memory, workers_that_fit
from hubpath_fast.data.digits import DigitsTask, write_image_folder
from hubpath_fast.recipes.analysis import report
from hubpath_fast.tasks.classification import ACCURACY
from hubpath_fast.training import load_weights

EQUAL, MIXED = "test_resnet,test_resnet", "test_resnet,test_efficientnet"
QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_image_folder(DigitsTask(0, 30), tmp_path_factory.mktemp("data") / "digits", 30)


def settings_of(data: Path, hub: str = EQUAL, rates=(1e-3,), steps: int = 3) -> CompareSettings:
    top = {"pretrained": False, "image_size": 32, "workers": 0, "k": 1}
    return make_settings(
        str(data), hub, rates=rates, top=top, trainer={"steps": steps, "batch_size": 8}
    )


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


def row_of(rows, method: str) -> dict:
    return next(row for row in rows if row["method"] == method)


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
        until = time.monotonic() + 300
        while not (log.is_file() and log.read_text()) and time.monotonic() < until:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert log.read_text()
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
            "import sys; from tests.compare.test_compare import settings_of, QUIET; "
            "from hubpath_fast.compare import compare; from pathlib import Path; "
            "s = settings_of(Path(sys.argv[1]), steps=100000); "
            "compare(s, 'single', (0,), sys.argv[2], 2, QUIET)"
        )
        root = Path(__file__).parents[2]
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(data), str(out)], cwd=root, stderr=subprocess.PIPE
        )
        logs = [out / f"runs/seed-0/single-{i}/log.jsonl" for i in range(2)]
        until = time.monotonic() + 300
        while not all(log.is_file() and log.read_text() for log in logs):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=300)
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


def write_problem(out: Path, settings: CompareSettings, seed: int, **noted) -> Path:
    """The files of a comparison that has read its data; its seed's folder."""
    (out / "compare.json").write_text(json.dumps({"settings": settings.to_dict()}))
    folder = out / f"runs/seed-{seed}"
    folder.mkdir(parents=True)
    problem = {"classes": ["0"], "difference": None, "experts": ["a"], **noted}
    (folder / "problem.json").write_text(json.dumps(problem))
    return folder


def write_result(folder: Path, accuracy: float, loss: float, rate: float) -> None:
    folder.mkdir(parents=True)
    validation = {"accuracy": accuracy, "loss": loss}
    (folder / "result.json").write_text(json.dumps({"validation": validation, "rate": rate}))


class TestParts:
    @pytest.mark.parametrize(
        ("measured", "chosen"),
        [
            ({1e-3: (0.8, 0.5), 1e-2: (0.9, 0.9)}, 1e-2),  # accuracy before loss
            ({1e-3: (0.9, 0.5), 1e-2: (0.9, 0.4)}, 1e-2),  # equal: the lower loss
            ({1e-3: (0.9, 0.5), 1e-2: (0.9, 0.5)}, 1e-3),  # equal in both: the first
            ({1e-3: (0.2, 2.0)}, 1e-3),  # the other has failed
        ],
    )
    def test_the_rate_is_chosen_on_validation(self, data, tmp_path, measured, chosen):
        write_problem(tmp_path, settings_of(data), 3)
        for rate, (accuracy, loss) in measured.items():
            write_result(tmp_path / f"runs/seed-3/distill-lr-{rate:g}", accuracy, loss, rate)
        results = SeedResults(tmp_path, 3, (1e-3, 1e-2))
        assert results.result("distill")["rate"] == chosen
        assert results.folder("distill").name == f"distill-lr-{chosen:g}"
        with pytest.raises(RunFailed, match="zoo-tuning is not done"):
            results.result("zoo-tuning")

    def test_jobs_wait_for_what_their_methods_need(self):
        known = methods_of(["a", "b"], 2)
        chosen = choose_methods("distill,soup-greedy,hub-pathway-k1,oracle", known)
        methods = needed_runs(chosen, known)
        assert [m.run for m in methods] == [
            "single-0", "single-1", "distill", "soup-greedy", "pathway", "pathway-k1",
        ]  # fmt: skip
        jobs = plan_jobs(methods, 4, (1e-3, 1e-2), [1.0, 3.0])
        by_run = {job.run: job for job in jobs}
        assert (by_run["pathway-k1"].follows, by_run["pathway-k1"].rate) == ("pathway", None)
        assert by_run["pathway-k1"].needs == ("pathway",)
        assert by_run["distill"].needs == ("single-0", "single-1")
        assert by_run["soup-greedy"].needs == ("single-0", "single-1")
        assert [job.rate for job in jobs if job.run == "single-0"] == [1e-3, 1e-2]
        assert [job.rate for job in jobs if job.run == "soup-greedy"] == [1e-3]
        assert str(by_run["distill"]) == "seed 4: distill at 0.01"
        assert all(job.seed == 4 for job in jobs)

    def test_experts_are_pretrained_before_what_needs_them_and_long_jobs_come_first(self):
        known = methods_of(["a", "b", "c"], 2)
        methods = needed_runs(choose_methods("single,hub-pathway", known), known)
        jobs = plan_jobs(methods, 0, (1e-3,), [1.0, 9.0, 2.0], {0: (), 1: (0,), 2: ()}, 2.0)
        needs = {job.run: job.needs for job in jobs}
        everyone = ("pretrain-0", "pretrain-1", "pretrain-2")
        assert needs == {
            "pretrain-0": (), "pretrain-1": ("pretrain-0",), "pretrain-2": (),
            "single-0": everyone[:1], "single-1": everyone[1:2], "single-2": everyone[2:],
            "pathway": everyone,
        }  # fmt: skip
        # Chains: 2 + 18 + 16, 18 + 16, 4 + 16; the pathway's cost is 2 * 2 * the mean, 4.
        assert [job.run for job in jobs] == [
            "pretrain-0", "pretrain-1", "pretrain-2", "pathway", "single-1", "single-2", "single-0",
        ]  # fmt: skip

    def test_workers_are_limited_by_memory(self, tmp_path):
        gib = 2**30
        assert workers_that_fit(4, 0, 16 * gib) == 4
        assert workers_that_fit(4, gib // 32, 3 * gib) == 2  # half a GiB each besides 500 MiB
        assert workers_that_fit(4, gib, gib) == 1
        assert workers_that_fit(4, gib, None) == 4
        (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
        assert available_memory(tmp_path, tmp_path) == 800 * 1024
        (tmp_path / "memory.max").write_text("5000\n")
        (tmp_path / "memory.current").write_text("1000\n")
        assert available_memory(tmp_path, tmp_path) == 4000
        (tmp_path / "memory.max").write_text("max\n")
        assert available_memory(tmp_path, tmp_path) == 800 * 1024
        assert available_memory(tmp_path / "none", tmp_path) is None

    def test_groups_of_methods(self):
        names = ["a", "b", "c"]
        known = methods_of(names, 2)
        assert [m.name for m in choose_methods("single", known)] == [f"single:{n}" for n in names]
        sweep = choose_methods("K_sweep, hub-pathway", known)
        assert [m.name for m in sweep] == ["hub-pathway", "hub-pathway-k1", "hub-pathway-k3"]
        assert choose_methods("all", known) == known
        with pytest.raises(ValueError, match="got none"):
            choose_methods(" , ", known)

    def test_the_papers_numbers(self):
        homogeneous = paper_numbers(settings_of_hub("paper-homogeneous"), "cars")
        assert homogeneous["HubPathway"] == {"mean": pytest.approx(0.9172)}
        assert homogeneous["single-1"] == {"mean": pytest.approx(0.8538)}  # MoCo
        assert homogeneous["RandomPath"]["mean"] == pytest.approx(0.9061)
        assert homogeneous["Oracle"]["mean"] == pytest.approx(0.9486)
        heterogeneous = paper_numbers(settings_of_hub("paper-heterogeneous"), "cifar-100")
        assert heterogeneous["Ensemble"] == pytest.approx({"mean": 0.8772, "std": 0.0019})
        assert heterogeneous["single-4"]["mean"] == pytest.approx(0.7912)  # Mask R-CNN
        assert paper_numbers(("timm/test_resnet",), "cars") == {}
        assert paper_numbers(settings_of_hub("paper-homogeneous"), "digits") == {}

    def test_the_paper_stands_beside_the_same_method(self):
        methods = methods_of(["a"] * 5, 2)[5:]  # without the experts alone
        keys = {m.name: m.paper for m in methods if m.paper}
        numbers = paper_numbers(settings_of_hub("paper-homogeneous"), "coco-70")
        assert all(key in numbers for key in keys.values())
        shown = {name: 100 * numbers[key]["mean"] for name, key in keys.items()}
        assert shown == pytest.approx(
            {
                "best-single": 81.97, "ensemble-top-k": 83.24, "ensemble": 82.81,
                "distill": 82.44, "soup-greedy": 82.94, "knowledge-flow": 81.91,
                "zoo-tuning-lite": 83.50, "zoo-tuning": 84.91, "hub-pathway": 84.36,
                "random-pathway": 80.97, "without-explore": 81.34, "without-exploit": 80.10,
                "oracle": 89.17,
            }
        )  # fmt: skip

    def test_mean_and_spread_over_seeds(self, data, tmp_path):
        settings = settings_of(data)
        for seed, right in ((0, 8), (1, 6), (2, 7)):
            folder = write_problem(tmp_path, settings, seed)
            (folder / "single-0").mkdir()
            result = {
                "validation": {"accuracy": 0.5, "loss": 1.0}, "test": {"accuracy": right / 10},
                "rate": 1e-3, "train_seconds": 2.0 + seed, "train_forwards_per_sample": 1,
                "forwards_per_sample": 1.0, "gflops_per_sample": 0.5,
                "milliseconds_per_sample": 3.0, "peak_memory_mb": None if seed else 10.0,
            }  # fmt: skip
            (folder / "single-0/result.json").write_text(json.dumps(result))
        methods = methods_of(["a"], 1)[:1]
        (row,) = make_rows(settings, methods, (0, 1, 2), tmp_path)
        assert row["mean"] == pytest.approx(0.7)
        assert row["std"] == pytest.approx(0.1)  # of a sample: ((0.1^2 + 0.1^2 + 0) / 2)^0.5
        assert row["accuracies"] == [0.8, 0.6, 0.7]
        assert row["train_seconds"] == pytest.approx(3.0)
        assert row["peak_memory_mb"] is None  # unknown for some seeds
        assert row["best"]
        text = markdown(as_table([row], ACCURACY))
        assert "| **single: a** | **70.0** | 10.0 | 1 | 0.5 | 3 | 3 | 1 | – |" in text


class TestOlder:
    """A folder that ``hubpath compare`` of commit 78f8c81 left, without its checkpoints:
    ``--data digits --hub test_resnet,test_efficientnet --k 1 --quick --steps 3 --no-pretrained``,
    its methods single, best-single, ensemble, hub-pathway, k-sweep and zoo-tuning."""

    @pytest.fixture
    def older(self, tmp_path) -> Path:
        archive = Path(__file__).parents[1] / "data_files" / "old_comparison.tar.xz"
        with tarfile.open(archive) as file:
            file.extractall(tmp_path, filter="data")
        return tmp_path / "before"

    def test_it_goes_on(self, older):
        before = json.loads((older / "table.json").read_text())
        settings = make_settings(
            "digits", MIXED, quick=True, top={"pretrained": False, "k": 1}, trainer={"steps": 3}
        )
        methods = "single,best-single,ensemble,hub-pathway,k-sweep,zoo-tuning"
        kept = {p: p.stat().st_mtime_ns for p in older.glob("runs/seed-0/*/result.json")}
        rows = compare(settings, f"{methods},without-explore", (0,), older, 1, QUIET)
        added = row_of(rows, "without-explore")
        assert added["status"] == "done"
        assert added["rates"] == [[2e-3]]  # the pathway's
        assert len(kept) == 4
        assert all(path.stat().st_mtime_ns == time_ns for path, time_ns in kept.items())
        for old in before["rows"]:
            now = row_of(rows, old["method"])
            assert {key: now[key] for key in old} == old

    def test_it_is_reported(self, older):
        page = report(older)
        table = json.loads((older / "table.json").read_text())
        value = row_of(table["rows"], "hub-pathway")["mean"]
        assert f"{100 * value:.1f}" in page.read_text()
        assert (older / "report/figures/mean_weight.csv").is_file()


def settings_of_hub(name: str) -> tuple[str, ...]:
    from hubpath_fast.hub.spec import HUBS

    return HUBS[name]
