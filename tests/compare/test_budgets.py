"""Budgets of a comparison: the same updates, or the same expert forwards in training."""

from __future__ import annotations

import io
import json
from fractions import Fraction

import pytest
from rich.console import Console
from support.command import hubpath, refused
from support.compare import EQUAL, QUIET, settings_of
from support.pages import read_csv

from hubpath_fast.compare import compare
from hubpath_fast.compare.methods import choose_methods, methods_of
from hubpath_fast.compare.plan import plan_jobs
from hubpath_fast.compare.settings import CompareSettings, make_settings
from hubpath_fast.compare.tables import as_table, describe, make_rows, terminal_table
from hubpath_fast.report import short_count
from hubpath_fast.tasks.classification import ACCURACY
from hubpath_fast.training import TrainerConfig
from hubpath_fast.training.config import with_steps

BARRED = (
    "distill", "soup-uniform", "soup-greedy", "knowledge-flow", "zoo-tuning-lite", "zoo-tuning",
)  # fmt: skip


def digits(experts: int, k: int, steps: int, budget: str = "passes", **trainer) -> CompareSettings:
    hub = ",".join("abcdefgh"[:experts])
    return make_settings(
        "digits", hub, top={"k": k, "pretrained": False}, trainer={"steps": steps, **trainer},
        distill={"budget": budget},
    )  # fmt: skip


def lengths(settings: CompareSettings) -> dict[str, int]:
    return {method.name: settings.steps(method.length) for method in methods_of(settings)}


class TestSteps:
    @pytest.mark.parametrize(
        ("experts", "k", "steps", "updates"),
        [
            (5, 2, 250, 625), (5, 1, 250, 1250), (5, 5, 250, 250), (3, 2, 150, 225),
            (4, 3, 100, 133), (7, 5, 3, 4),
            (3, 2, 75, 112), (7, 6, 3, 4),  # 112.5 and 3.5: to the even one, as round() does
        ],
    )  # fmt: skip
    def test_a_hub_pathway_has_as_many_forwards_as_all_experts_alone(
        self, experts, k, steps, updates
    ):
        found = lengths(digits(experts, k, steps))
        assert found["hub-pathway"] == updates
        assert found["single:a"] == found["ensemble"] == found["oracle"] == steps
        for variant in ("random-pathway", "without-explore", "without-exploit", "task-pathway"):
            assert found[variant] == updates
        for other in range(1, experts + 1):
            if other != k:
                assert found[f"hub-pathway-k{other}"] == round(experts * steps / other)

    @pytest.mark.parametrize(
        ("router", "updates"),
        [("image", 625), ("expert:1", 417), ("expert", 417), ("network:x", 625)],
    )
    def test_an_expert_that_the_router_looks_at_is_counted(self, router, updates):
        settings = digits(5, 2, 250)
        settings = settings.replace(fit=settings.fit.replace(router=router))
        methods = {method.name: method for method in methods_of(settings)}
        one_more = router.startswith("expert")
        assert methods["hub-pathway"].forwards == 2 + one_more
        assert methods["hub-pathway-k5"].forwards == 5 + one_more
        assert methods["hub-pathway-k5"].length == Fraction(5, 5 + one_more)
        for name in ("hub-pathway", "without-explore", "without-exploit", "noise-off"):
            assert settings.steps(methods[name].length) == updates
        for name in ("random-pathway", "task-pathway"):  # which have no such router
            assert methods[name].forwards == 2
            assert settings.steps(methods[name].length) == 625

    def test_by_default_all_take_the_same_updates(self):
        assert CompareSettings(digits(5, 2, 250).fit, (1e-3,)).budget == "steps"
        assert set(lengths(digits(5, 2, 250, "steps")).values()) == {250}

    def test_milestones_and_warm_up_keep_their_share(self):
        paper = TrainerConfig(
            steps=15_000, optimizer="sgd", schedule="steps", milestones=(6_000, 12_000),
            warmup_steps=300, eval_every=1_000,
        )  # fmt: skip
        longer = paper.replace(steps=37_500, milestones=(15_000, 30_000), warmup_steps=750)
        assert with_steps(paper, 37_500) == longer
        assert with_steps(paper, 15_000) == paper
        few = with_steps(paper, 2)  # 0.8 and 1.6 are 1 and 2, and 2 is the end
        assert (few.milestones, few.schedule, few.warmup_steps) == ((1,), "steps", 0)
        one = with_steps(paper, 1)
        assert (one.milestones, one.schedule) == ((), "constant")

    def test_the_trainer_of_a_run(self):
        settings = digits(5, 2, 250, warmup_steps=50)
        alone, routed = settings.trainer(3, 2e-3), settings.trainer(3, 2e-3, Fraction(5, 2))
        assert (alone.steps, alone.warmup_steps, alone.lr_expert) == (250, 50, 2e-3)
        assert routed == alone.replace(steps=625, warmup_steps=125)

    def test_long_runs_are_expected_to_take_longer(self):
        cost = {}
        for budget in ("steps", "passes"):
            methods = choose_methods(
                "single,hub-pathway,k-sweep", methods_of(digits(3, 2, 9, budget))
            )
            jobs = plan_jobs(methods, 0, (1e-3,), [1.0, 1.0, 4.0])
            cost[budget] = {job.run: (job.cost, job.length) for job in jobs}
        # Rows of small groups count twice; the mean expert costs 2.
        assert cost["steps"]["pathway"] == (2 * 2 * 2, 1)
        assert cost["passes"]["pathway"] == (1.5 * 2 * 2 * 2, 1.5)
        assert cost["passes"]["pathway-k1"] == (3 * 1 * 2 * 2, 3)
        for run in ("single-0", "single-2", "pathway-k3"):
            assert cost["passes"][run] == cost["steps"][run]


class TestMethods:
    def test_methods_whose_passes_cannot_be_counted(self):
        methods = methods_of(digits(3, 2, 9))
        assert tuple(method.name for method in methods if method.barred) == BARRED
        assert not any(method.barred for method in methods_of(digits(3, 2, 9, "steps")))
        assert choose_methods("all", methods) == methods
        for name in BARRED:
            with pytest.raises(ValueError, match=f"^methods: {name} cannot take part: ") as error:
                choose_methods(f"single,{name}", methods)
            assert str(error.value).endswith("leave out what cannot, or use --budget steps")
        with pytest.raises(ValueError) as error:
            choose_methods("zoo_tuning,soup-greedy,hub-pathway,distill", methods)
        assert str(error.value) == (
            "methods: distill, soup-greedy cannot take part: what learns from the experts trained "
            "alone begins when these have spent all that --budget passes allows; zoo-tuning cannot "
            "take part: a network of kernels mixed from the experts' is none of them, and --budget "
            "passes counts passes of experts; leave out what cannot, or use --budget steps"
        )

    def test_the_command_refuses_in_a_sentence(self, data, tmp_path):
        usual = ["compare", "--data", data, "--hub", EQUAL, "--no-pretrained", "--image-size", 32]
        usual += ["--out", tmp_path / "out"]
        said = refused(*usual, "--budget", "passes", "--methods", "distill")
        assert "methods: distill cannot take part" in said
        assert "budget: expected one of steps, passes, got 'time'" in refused(
            *usual, "--budget", "time"
        )
        assert not (tmp_path / "out").exists()


class TestIdentity:
    def test_only_another_budget_than_that_of_older_folders_counts(self, data):
        old = settings_of(data).to_dict()
        assert old.pop("budget") == "steps"
        assert CompareSettings.from_dict(old) == settings_of(data)
        assert "budget" not in settings_of(data).identity()
        passes = settings_of(data).replace(budget="passes")
        assert passes.identity() == settings_of(data).identity() | {"budget": "passes"}
        assert CompareSettings.from_dict(passes.to_dict()) == passes


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """All methods at equal passes, two experts and K = 1, by the command: (folder, what it said,
    table.json)."""
    out = tmp_path_factory.mktemp("budget") / "out"
    said = hubpath(
        "compare", "--data", data, "--hub", EQUAL, "--no-pretrained", "--image-size", 32, "--k", 1,
        "--steps", 3, "--batch-size", 8, "--workers", 1, "--rates", "1e-3", "--budget", "passes",
        "--out", out,
    ).output  # fmt: skip
    return out, " ".join(said.split()), json.loads((out / "table.json").read_text())


class TestEqualPasses:
    def test_every_run_takes_its_share_of_the_budget(self, done):
        out, _, _ = done
        for run, steps in (("single-0", 3), ("pathway", 6), ("noise-off", 6), ("pathway-k2", 3)):
            folder = out / "runs/seed-0" / run
            last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
            result = json.loads((folder / "result.json").read_text())
            assert (last["step"], result["train_steps"]) == (steps, steps)
            assert result["train_forwards"] == (24 if run == "single-0" else 48)

    def test_rows_have_both_costs(self, done):
        rows = done[2]["rows"]
        costs = {row["method"]: (row.get("train_steps"), row.get("train_forwards")) for row in rows}
        for alone in ("single:test_resnet #1", "single:test_resnet #2"):
            assert costs.pop(alone) == (3, 24)
        for name in ("hub-pathway", "random-pathway", "without-explore", "noise-off"):
            assert costs[name] == (6, 48)
        for name in ("best-single", "ensemble-top-k", "ensemble", "hub-pathway-k2", "oracle"):
            assert costs[name] == (3, 48)
        assert {row["train_forwards_per_sample"] for row in rows if row["k"]} == {1, 2}

    def test_those_that_cannot_be_counted_are_left_out_in_a_sentence(self, done):
        out, said, table = done
        barred = [row for row in table["rows"] if row["status"] != "done"]
        assert tuple(row["method"] for row in barred) == BARRED
        assert {row["status"] for row in barred} == {"cannot run under this budget"}
        assert {row["mean"] for row in barred} == {None}
        sentence = (
            "Cannot run under this budget: Zoo-Tuning-Lite, Zoo-Tuning. A network of kernels mixed "
            "from the experts' is none of them, and --budget passes counts passes of experts."
        )
        assert sentence in said
        assert sentence in (out / "table.md").read_text()
        assert not list(out.glob("runs/seed-0/distill*"))

    def test_tables_say_which_budget_they_use(self, done):
        out, said, _ = done
        sentence = (
            "Budget: passes, so every method may run as many expert forwards in training as the 2 "
            "experts trained alone for 3 updates of 8 images take together, 48;"
        )
        assert sentence in said
        for name in ("table.md", "table.html"):
            text = (out / name).read_text()
            assert sentence in text
            assert "forwards in training" in text
            assert "updates" in text

    def test_another_budget_is_refused_in_the_folder(self, done, data):
        out, _, _ = done
        with pytest.raises(ValueError, match="budget: 'passes' there, 'absent' now"):
            compare(settings_of(data), "single", (0,), out, console=QUIET)

    def test_the_report_has_them_too(self, done):
        out, _, table = done
        hubpath("report", out)
        assert "Budget: passes, so every method" in (out / "report/report.html").read_text()
        head, *lines = read_csv(out / "report/figures/accuracy_against_cost.csv")
        found = {line[0]: dict(zip(head, line, strict=True)) for line in lines}
        assert len(found) == len([row for row in table["rows"] if row["status"] == "done"])
        for title, steps, forwards in (("Hub-Pathway", 6, 48), ("single: test_resnet #1", 3, 24)):
            assert float(found[title]["updates in training"]) == steps
            assert float(found[title]["expert forwards in training"]) == forwards


class TestTables:
    def test_counts_in_three_digits(self):
        shown = {24: "24", 999: "999", 999.6: "1 k", 12_000: "12 k", 60_000: "60 k"}
        shown |= {999_600: "1 M", 3_600_000: "3.6 M", 3_613_000: "3.61 M", 2.5e9: "2.5 G"}
        assert {count: short_count(count) for count in shown} == shown

    def test_costs_of_methods_and_of_older_results(self, data, tmp_path):
        settings = settings_of(data, steps=1000)  # batches of 8
        (tmp_path / "compare.json").write_text(json.dumps({"settings": settings.to_dict()}))
        folder = tmp_path / "runs/seed-0"
        noted = {"classes": ["0"], "difference": None, "experts": ["a", "b"]}
        result = {
            "validation": {"accuracy": 0.5, "loss": 1.0}, "test": {"accuracy": 0.5}, "rate": 1e-3,
            "train_seconds": 1.0, "forwards_per_sample": 1.0, "gflops_per_sample": 0.5,
            "milliseconds_per_sample": 3.0, "peak_memory_mb": None,
        }  # fmt: skip
        new = {"train_steps": 1000, "train_forwards": 8000, "train_forwards_per_sample": 1}
        found = {
            "single-0": new, "single-1": {"train_forwards_per_sample": 1},  # of before
            "distill": {"train_steps": 900, "train_forwards": 21_600},
            "soup-greedy": {"train_steps": 0, "train_forwards": 0},
            "pathway": new | {"router_share": 0.0456},
        }  # fmt: skip
        for run, more in found.items():
            (folder / run).mkdir(parents=True)
            (folder / run / "result.json").write_text(json.dumps(result | more))
        (folder / "problem.json").write_text(json.dumps(noted))
        chosen = choose_methods("single,distill,soup-greedy,hub-pathway", methods_of(settings))
        rows = make_rows(settings, chosen, (0,), tmp_path)
        costs = {row["method"]: (row["train_steps"], row["train_forwards"]) for row in rows}
        assert list(costs.values()) == [
            (1000, 8000), (1000, 8000), (1000, 16_000 + 21_600), (1000, 16_000), (1000, 8000),
        ]  # fmt: skip
        assert [row["router_share"] for row in rows] == [None] * 4 + [0.0456]
        table = as_table(rows, ACCURACY)
        heads = ("updates", "forwards in training", "router / K experts")
        columns = [list(table.columns).index(head) for head in heads]
        assert [table.text(2, j) for j in columns] == ["1,000", "37.6 k", "–"]
        assert [table.text(4, j) for j in columns] == ["1,000", "8 k", "4.6%"]
        older = [{k: v for k, v in row.items() if not k.startswith("train_")} for row in rows]
        assert [as_table(older, ACCURACY).text(4, j) for j in columns] == ["–", "–", "4.6%"]

    def test_a_terminal_of_80_columns_has_room_for_it(self):
        row = {
            "title": "Hub-Pathway, random pathway", "status": "done", "reason": None, "mean": 0.934,
            "std": 0.036, "seeds": [0, 1], "paper": None, "bound": False, "train_seconds": 57.2,
            "forwards_per_sample": 2.0, "train_steps": 15_000.0, "train_forwards": 3.6e6,
        }  # fmt: skip
        rows = [row, row | {"title": "single: test_efficientnet", "seeds": [0]}]
        console = Console(file=io.StringIO(), width=80)
        console.print(terminal_table(as_table(rows, ACCURACY), "Budget: [so]."))
        text = console.file.getvalue()
        lines = [[cell.strip() for cell in line.split("│")] for line in text.splitlines()]
        cells = ["2", "15,000", "3.6 M", "57"]
        assert ["", "Hub-Pathway, random", "93.4 ± 3.6", *cells, ""] in lines
        assert any("test_efficientnet" in line for line in lines)
        assert any(line[2:-1] == ["93.4", *cells] for line in lines)
        assert "…" not in text
        assert "Budget: [so]." in text

    def test_a_sentence_on_the_budget(self, data):
        steps = settings_of(data, steps=1500)
        assert (
            "Budget: steps, so every method takes the same 1,500 updates of 8 images"
            in describe(steps, (0,))
        )
        assert "Figures are of the test images, on which nothing is chosen" in describe(steps, (0,))
        said = describe(steps, (0,), "validation")
        assert "Figures are of the validation images, on which rates and experts are chosen" in said
        passes = describe(steps.replace(budget="passes"), (0,))
        assert "1,500 updates of 8 images take together, 24 k; a Hub-Pathway" in passes
        assert "the same 1,500" not in passes
