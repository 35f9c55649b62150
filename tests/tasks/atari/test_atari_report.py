"""What a comparison's folder is reported as: tables, labels, what is missing, and pictures."""

from __future__ import annotations

import csv
import json
import math
import re

import pytest
from scipy import stats
from support.atari_folders import asked, read_json, write_comparison, write_run

from hubpath_fast.files import write_json
from hubpath_fast.recipes.atari_report import report_atari
from hubpath_fast.tasks.atari import report as pages
from hubpath_fast.tasks.atari.comparison import read_outcome, run_place
from hubpath_fast.tasks.atari.games import SCORES
from hubpath_fast.tasks.atari.results import read_results, short_steps
from hubpath_fast.tasks.atari.run_report import as_history
from hubpath_fast.tasks.atari.settings import AtariSettings

SCRATCH = {0: 100.0, 1: 140.0, 2: 120.0}
HUB = {0: 300.0, 1: 345.0, 2: 315.0}
TUNED = {0: 310.0, 1: 290.0, 2: 330.0}
WORSE = {0: 60.0, 1: 101.0, 2: 80.0}
METHODS = ("scratch", "finetune-seaquest", "finetune-riverraid", "hub")
GOPHER = {
    ("gopher", name, seed): score
    for name, of in zip(METHODS, (SCRATCH, WORSE, TUNED, HUB), strict=True)
    for seed, score in of.items()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Gopher with all its runs, and its report."""
    made = write_comparison(tmp_path_factory.mktemp("cmp"), asked(methods=METHODS), GOPHER)
    report_atari(made)
    return made


def rows_of(path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestTables:
    def test_the_numbers(self, folder):
        table = read_json(folder / "report/table.json")
        rows = {row["method"]: row for row in table["rows"]}
        hub, human, random = rows["hub"], *SCORES["gopher"]
        assert hub["score"] == pytest.approx(320)
        assert hub["deviation"] == pytest.approx(math.sqrt(525))
        assert hub["human-normalised"] == pytest.approx((320 - random) / (human - random))
        assert (hub["score low"], hub["score high"]) == (300, 345)
        assert [hub[f"seed {i}"] for i in range(3)] == list(HUB.values())
        assert hub["over scratch"] == pytest.approx(200)
        theirs = stats.ttest_rel(list(HUB.values()), list(SCRATCH.values()))
        interval = theirs.confidence_interval(0.95)
        assert (hub["over scratch low"], hub["over scratch high"]) == pytest.approx(tuple(interval))
        assert hub["best fine-tuned"] == "finetune-riverraid"
        assert hub["over best"] == pytest.approx(10)
        assert rows["scratch"]["over scratch"] is None
        assert rows["scratch"]["over best"] == pytest.approx(-190)
        assert rows["finetune-riverraid"]["over best"] is None
        assert table["missing"] == []
        assert table["label"] == "20k of 100k, sources 20k"

    def test_better_is_said_only_where_the_interval_leaves_out_0(self, folder):
        text = (folder / "report/table.md").read_text(encoding="utf-8")
        lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines()}
        hub = lines["Hub-Pathway"].split(" | ")
        assert re.fullmatch(r"320\.0 ± 22\.9", hub[1])
        assert hub[4].startswith("+200.0 [+187.6, +212.4], better")
        assert hub[5].startswith("+10.0 [-87.0, +107.0] |")
        assert ", worse" in lines["fine-tuned from seaquest"]
        assert "better" not in lines["from scratch"]
        assert (
            "20k of 100k, sources 20k" in lines["# Comparison on gopher: 20k of 100k, sources 20k"]
        )
        assert pages.NO_NUMBERS in text
        assert "Partial" not in text
        # Three methods against scratch, three against the best fine-tuned source.
        assert "about 0.3 of the 6 intervals" in text
        assert "At K = 2 the hub asks all of its policies" in text

    def test_sources_are_listed_with_their_scores(self, folder):
        [seaquest, riverraid] = read_json(folder / "report/table.json")["sources"]
        assert seaquest["steps"] == 20_000
        human, random = SCORES["seaquest"]
        share = 100 * (100 - random) / (human - random)
        assert seaquest["human-normalised, %"] == pytest.approx(share)
        assert riverraid["score on its game"] == 100

    def test_figures_over_games(self, folder):
        table = read_json(folder / "report/table.json")["over_games"]
        assert table["games"] == ["gopher"]
        rows = {row["method"]: row for row in table["rows"]}
        human, random = SCORES["gopher"]
        assert rows["hub"]["interquartile mean"] == pytest.approx((320 - random) / (human - random))
        assert rows["hub"]["values"] == 3
        name = "probability of improvement over scratch"
        assert rows["hub"][name] == 1
        # 60, 80 and 101 against 100, 120 and 140: one pair of nine.
        assert rows["finetune-seaquest"][name] == pytest.approx(1 / 9)
        assert rows["scratch"][name] is None


class TestPictures:
    def test_every_picture_has_its_numbers(self, folder):
        figures = folder / "report/figures"
        pictures = sorted(path.stem for path in figures.glob("*.png"))
        assert pictures == [
            "interquartile-mean", "learning-gopher", "probability-of-improvement", "scores-gopher",
        ]  # fmt: skip
        assert {path.stem for path in figures.glob("*.csv")} == {*pictures, "scores"}

    def test_curves_are_those_of_the_seeds(self, folder):
        rows = rows_of(folder / "report/figures/learning-gopher.csv")
        last = [row for row in rows if row["method"] == "Hub-Pathway"][-1]
        assert last["step"] == "20000"
        assert [float(last[f"seed {i}"]) for i in range(3)] == list(HUB.values())
        assert float(last["mean"]) == 320
        assert (float(last["low"]), float(last["high"])) == (300, 345)

    def test_the_page_says_of_how_many_values(self, folder):
        page = (folder / "report/report.html").read_text(encoding="utf-8")
        assert "(3 values: gopher; 20k of 100k, sources 20k)" in page
        assert "Of fewer than four values it is the plain mean." in page
        assert page.count("<figure>") == 4


class TestPartly:
    def test_what_is_missing_is_said_with_its_reason(self, tmp_path):
        of = asked(("gopher", "alien"), ("scratch", "hub"), (0, 1))
        done = {("gopher", "scratch", 0): 1.0, ("gopher", "scratch", 1): 2.0}
        done |= {("alien", "scratch", 0): 3.0, ("gopher", "hub", 1): 4.0}
        write_comparison(tmp_path, of, done)
        failed = tmp_path / f"{run_place('alien', 'hub', 1)}.failed.json"
        failed.parent.mkdir(parents=True)
        failed.write_text(json.dumps({"error": "its process died of SIGKILL"}))
        page = report_atari(tmp_path)
        text = (tmp_path / "report/table.md").read_text(encoding="utf-8")
        assert text.startswith("# Comparison on gopher, alien: 20k of 100k, sources 20k, partial")
        assert "Partial: 4 of 8 runs are finished. Missing: gopher: Hub-Pathway (seed 0); " in text
        assert "alien: Hub-Pathway (seeds 0, 1)" in text
        assert "Failed: runs/alien/hub/seed-1: its process died of SIGKILL" in text
        assert "Without alien, where a method has no finished run." in page.read_text("utf-8")
        table = read_json(tmp_path / "report/table.json")
        assert table["missing"] == [
            ["gopher", "hub", 0], ["alien", "hub", 0], ["alien", "scratch", 1], ["alien", "hub", 1],
        ]  # fmt: skip
        assert table["over_games"]["games"] == ["gopher"]
        [hub] = [r for r in table["rows"] if (r["game"], r["method"]) == ("gopher", "hub")]
        assert hub["over scratch"] == 2.0  # of the one seed that both have
        assert hub["over scratch low"] is None
        assert "better" not in text.split("gopher, 20k", 1)[1]

    def test_nothing_finished_is_refused(self, tmp_path):
        write_comparison(tmp_path, asked(), {})
        with pytest.raises(ValueError, match="no run of the comparison is finished yet; 21 are"):
            report_atari(tmp_path)

    def test_the_best_source_is_one_with_all_finished_seeds(self, tmp_path):
        of = asked(methods=METHODS)
        scores = {key: value for key, value in GOPHER.items() if key[1:] != ("hub", 2)}
        del scores["gopher", "finetune-riverraid", 0]
        results = read_results(write_comparison(tmp_path, of, scores), of)
        assert results.best_source("gopher").name == "finetune-seaquest"


class TestSmallGames:
    def test_bars_are_raw_and_nothing_is_normalised(self, tmp_path):
        of = asked(
            ("medley",), ("scratch", "finetune-cross", "hub"), sources=("catch", "cross", "keep"),
            steps=8000, source_steps=2500,
        )  # fmt: skip
        scores = {(g, m.name, s): 1.0 + i for i, (g, m, s) in enumerate(of.places())}
        page = report_atari(write_comparison(tmp_path, of, scores)).read_text("utf-8")
        assert "8k steps, sources 2.5k" in page
        for word in ("human", "of 100k", "Atari", "Figure 2"):
            assert word not in page
        figures = {path.stem for path in tmp_path.glob("report/figures/*.png")}
        assert figures == {"learning-medley", "scores-medley", "probability-of-improvement"}
        table = read_json(tmp_path / "report/table.json")
        assert table["over_games"]["rows"][0]["interquartile mean"] is None


class TestRefusals:
    @pytest.mark.parametrize(
        ("make", "said"),
        [
            (lambda path: path / "none", "there is no such folder"),
            (lambda path: path, "it has no compare.json and no last"),
        ],
    )
    def test_other_folders(self, tmp_path, make, said):
        with pytest.raises(
            ValueError, match=f"is no folder of `hubpath atari compare` or `fit`: {said}"
        ):
            report_atari(make(tmp_path))

    @pytest.mark.parametrize("text", ["{", "[]", '{"scores": []}'])
    def test_a_damaged_result_is_named(self, tmp_path, text):
        write_comparison(tmp_path, asked(), {("gopher", "hub", 0): 1.0})
        path = tmp_path / run_place("gopher", "hub", 0) / "result.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=f"{path} is damaged.*delete it"):
            report_atari(tmp_path)

    def test_scores_that_are_no_numbers_are_damage(self, tmp_path):
        with pytest.raises(ValueError, match="is damaged"):
            read_outcome(write_run(tmp_path, math.nan))

    def test_a_damaged_comparison(self, tmp_path):
        lists = '"targets": [], "methods": [], "seeds": []'
        (tmp_path / "compare.json").write_text(f'{{"settings": {{"steps": 3}}, {lists}}}')
        with pytest.raises(ValueError, match=r"compare\.json is damaged"):
            report_atari(tmp_path)

    def test_a_comparison_of_another_kind(self, tmp_path):
        (tmp_path / "compare.json").write_text('{"settings": {"fit": {}}}')
        with pytest.raises(ValueError, match=r"is a comparison, .*; use `hubpath report "):
            report_atari(tmp_path)


def test_steps_are_said_shortly():
    assert [short_steps(n) for n in (300, 2500, 20_000, 100_000)] == ["300", "2.5k", "20k", "100k"]


class TestRun:
    """The report of one run."""

    LOG = (
        {"step": 100, "evaluation": [1.0, 3.0]},
        {
            "step": 200, "loss": 3.0, "task": 2.0, "explore": -0.5, "share": [1.0, 0.5],
            "weights": [0.75, 0.25], "grad_norm": 9.0, "clipped": 0.0, "score": 4.0,
            "episodes": [{"step": 150, "score": 5.0, "steps": 80}, {"score": 9.0}],
        },
    )  # fmt: skip

    def folder(self, path, **settings):
        """A run as a checkpoint and a log say that it is."""
        made = AtariSettings(
            **{"game": "gopher", "hub": ("src/seaquest", "src/riverraid"), **settings}
        )
        write_json(path / "last/config.json", {"atari": made.to_dict()})
        for name in ("model.safetensors", "state.pt"):
            (path / "last" / name).touch()
        (path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.LOG))
        return path

    def test_its_scores_and_its_log(self, tmp_path):
        write_run(self.folder(tmp_path), 400.0)
        page = report_atari(tmp_path).read_text("utf-8")
        assert "<title>gopher: hub, 100k steps</title>" in page
        assert "400.0" in page
        human, random = SCORES["gopher"]
        assert f"{100 * (400 - random) / (human - random):.1f}" in page
        [first, second] = rows_of(tmp_path / "report/figures/training.csv")
        assert (first["step"], first["evaluation/score"], first["loss"]) == ("100", "2.0", "")
        assert [float(second[name]) for name in ("loss", "task", "explore")] == [3, 2, -0.5]
        assert float(second["in training/score"]) == 7
        loads = [float(second[f"load/{i}"]) for i in range(2)]
        assert loads == pytest.approx([2 / 3, 1 / 3])  # of the rows, not of the states
        assert [float(second[f"mean_weight/{i}"]) for i in range(2)] == [0.75, 0.25]
        assert "grad_norm" not in second
        assert "score" not in second

    def test_one_that_is_not_finished_is_called_so(self, tmp_path):
        page = report_atari(self.folder(tmp_path)).read_text("utf-8")
        assert "gopher: hub, 100k steps, unfinished" in page
        assert "the last line of its log is of step 200" in page

    def test_only_a_hub_has_routing(self):
        [_, line] = as_history(self.LOG, routed=False)
        assert "load" not in line
        assert line["loss"] == 3

    def test_a_run_without_a_log_is_refused(self, tmp_path):
        (self.folder(tmp_path) / "log.jsonl").write_text("")
        with pytest.raises(ValueError, match="has logged nothing yet"):
            report_atari(tmp_path)
