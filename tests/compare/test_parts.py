"""The parts of ``hubpath compare``, against figures worked out here."""

from __future__ import annotations

import json
import re
import signal
from multiprocessing import forkserver
from pathlib import Path

import pytest
from support.compare import settings_of

from hubpath_fast.compare.methods import choose_methods, methods_of
from hubpath_fast.compare.paper import paper_numbers
from hubpath_fast.compare.plan import needed_runs, plan_jobs
from hubpath_fast.compare.results import RunFailed, SeedResults
from hubpath_fast.compare.settings import CompareSettings, make_settings
from hubpath_fast.compare.tables import as_table, make_rows, markdown
from hubpath_fast.compare.workers import start_server, workers_that_fit
from hubpath_fast.data.cache import free_memory
from hubpath_fast.tasks.classification import ACCURACY

NAN = float("nan")


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
            ({1e-3: (NAN, 0.5), 1e-2: (0.1, 0.9)}, 1e-2),  # NaN is not the best
            ({1e-3: (0.9, NAN), 1e-2: (0.9, 0.5)}, 1e-2),
            ({1e-3: (NAN, NAN), 1e-2: (NAN, 0.5)}, 1e-2),
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
        known = methods_for(["a", "b"], 2)
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
        assert [job.rate for job in jobs if job.run == "soup-greedy"] == [None]
        assert str(by_run["distill"]) == "seed 4: distill at 0.01"
        assert by_run["single-1"].name == "single:b at 0.01"
        assert all(job.seed == 4 for job in jobs)

    def test_experts_are_pretrained_before_what_needs_them_and_long_jobs_come_first(self):
        known = methods_for(["a", "b", "c"], 2)
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

    @pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux's /proc")
    def test_an_interrupt_does_not_reach_the_server_of_the_workers(self):
        """It goes to the whole terminal, also while the server imports; the command hands it on."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        start_server(1)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
        status = Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status").read_text()
        [blocked] = re.findall(r"^SigBlk:\s*(\w+)$", status, re.MULTILINE)
        assert int(blocked, 16) >> (signal.SIGINT - 1) & 1

    def test_workers_are_limited_by_memory(self, tmp_path):
        gib = 2**30
        assert workers_that_fit(4, 0, 16 * gib) == 4
        assert workers_that_fit(4, gib // 32, 3 * gib) == 2  # half a GiB each besides 500 MiB
        assert workers_that_fit(4, gib, gib) == 1
        assert workers_that_fit(4, gib, None) == 4
        (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable: 800 kB\n")
        assert free_memory(tmp_path, tmp_path) == 800 * 1024
        (tmp_path / "memory.max").write_text("5000\n")
        (tmp_path / "memory.current").write_text("1000\n")
        assert free_memory(tmp_path, tmp_path) == 4000
        (tmp_path / "memory.max").write_text("max\n")
        assert free_memory(tmp_path, tmp_path) == 800 * 1024
        assert free_memory(tmp_path, tmp_path / "none") is None

    def test_groups_of_methods(self):
        names = ["a", "b", "c"]
        known = methods_for(names, 2)
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
        methods = methods_for(["a"] * 5, 2)[5:]  # without the experts alone
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
        methods = methods_for(["a"], 1)[:1]
        (row,) = make_rows(settings, methods, (0, 1, 2), tmp_path)
        assert row["mean"] == pytest.approx(0.7)
        assert row["std"] == pytest.approx(0.1)  # of a sample: ((0.1^2 + 0.1^2 + 0) / 2)^0.5
        assert row["accuracies"] == [0.8, 0.6, 0.7]
        assert row["train_seconds"] == pytest.approx(3.0)
        assert row["peak_memory_mb"] is None  # unknown for some seeds
        assert row["best"]
        text = markdown(as_table([row], ACCURACY))
        assert "| **single: a** | **70.0** | 10.0 | 1 | 0.5 | 3 | 3 | 1 | – |" in text

    def test_a_run_after_another_at_a_rate_that_is_no_longer_chosen_is_no_result(
        self, data, tmp_path
    ):
        settings = settings_of(data, rates=(1e-3, 1e-2))
        folder = write_problem(tmp_path, settings, 0)
        write_result(folder / "pathway-lr-0.001", 0.5, 1.0, 1e-3)  # the other rate has failed
        result = {
            "validation": {"accuracy": 0.5, "loss": 1.0}, "test": {"accuracy": 0.5}, "rate": 1e-3,
            "train_seconds": 1.0, "forwards_per_sample": 1.0, "gflops_per_sample": 0.5,
            "milliseconds_per_sample": 3.0, "peak_memory_mb": None, "after": {"pathway": 1e-3},
        }  # fmt: skip
        (folder / "noise-off").mkdir()
        (folder / "noise-off/result.json").write_text(json.dumps(result))
        methods = choose_methods("noise-off", methods_of(settings))
        assert make_rows(settings, methods, (0,), tmp_path)[0]["status"] == "done"
        write_result(folder / "pathway-lr-0.01", 0.9, 1.0, 1e-2)  # done again, it is the best
        (row,) = make_rows(settings, methods, (0,), tmp_path)
        assert (row["status"], row["mean"]) == ("failed", None)
        assert "noise-off came after pathway at rate 0.001" in row["reason"]


def methods_for(experts: list[str], k: int):
    top = {"k": k, "pretrained": False}
    return methods_of(make_settings("digits", ",".join(experts), top=top))


def settings_of_hub(name: str) -> tuple[str, ...]:
    from hubpath_fast.hub.spec import HUBS

    return HUBS[name]
