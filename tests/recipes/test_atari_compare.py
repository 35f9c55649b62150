"""Comparisons of games: what is asked for, what runs, and what a folder remembers."""

from __future__ import annotations

import io
import os
import signal
import threading
from pathlib import Path

import pytest
from rich.console import Console
from support.atari_folders import DIES, FAILS, LAST, WAITS, asked, quick_fit, read_json
from support.command import refused
from support.waiting import wait_until

from hubpath_fast.recipes.atari_compare import compare_atari, make_asked, plan_jobs
from hubpath_fast.tasks.atari.comparison import choose_methods, methods_of, open_comparison

SMALL = ("catch", "keep")


def small(**more):
    given = {"sources": ",".join(SMALL), "targets": "medley", "steps": 3000, "seeds": (0, 1)}
    return make_asked(**given | more)


def names(methods) -> list[str]:
    return [method.name for method in methods]


class TestMethods:
    def test_all_methods_and_their_settings(self):
        found = {m.name: (m.title, m.method, m.sources, m.k) for m in methods_of(("a", "b"))}
        assert found == {
            "scratch": ("from scratch", "scratch", (), None),
            "finetune-a": ("fine-tuned from a", "finetune", ("a",), None),
            "finetune-b": ("fine-tuned from b", "finetune", ("b",), None),
            "knowledge-flow": ("Knowledge Flow", "knowledge-flow", ("a", "b"), None),
            "zoo-tuning": ("Zoo-Tuning", "zoo-tuning", ("a", "b"), None),
            "hub-k1": ("Hub-Pathway, K = 1", "hub", ("a", "b"), 1),
            "hub": ("Hub-Pathway", "hub", ("a", "b"), 2),
        }
        assert methods_of("abc", 3)[-1].title == "Hub-Pathway, K = 3"
        assert names(methods_of("abc", 1))[-2:] == ["zoo-tuning", "hub"]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("hub,scratch", ["scratch", "hub"]),
            ("finetune, HUB_K1", ["finetune-a", "finetune-b", "hub-k1"]),
            ("finetune-b", ["finetune-b"]),
            ("all", names(methods_of("ab"))),
        ],
    )
    def test_methods_by_their_names(self, text, expected):
        assert names(choose_methods(text, methods_of("ab"))) == expected


class TestPlan:
    def test_jobs_are_sources_then_all_methods_of_a_seed(self, tmp_path):
        jobs = plan_jobs(small(methods="scratch,finetune-keep,hub-k1,hub"), tmp_path)
        assert [job.place for job in jobs[:7]] == [
            "sources/catch", "sources/keep", "runs/medley/scratch/seed-0",
            "runs/medley/finetune-keep/seed-0", "runs/medley/hub-k1/seed-0",
            "runs/medley/hub/seed-0", "runs/medley/scratch/seed-1",
        ]  # fmt: skip
        assert [job.needs for job in jobs[2:6]] == [
            (), ("sources/keep",), ("sources/catch", "sources/keep"),
            ("sources/catch", "sources/keep"),
        ]  # fmt: skip
        source, tuned, k1, hub = (jobs[i].settings for i in (1, 3, 4, 5))
        assert (source.game, source.method, source.seed) == ("keep", "scratch", 0)
        assert (tuned.method, tuned.hub) == ("finetune", (str(tmp_path / "sources/keep"),))
        assert (k1.method, k1.k, hub.method, hub.k) == ("hub", 1, "hub", 2)
        assert [Path(folder).name for folder in hub.hub] == list(SMALL)
        assert jobs[6].settings.seed == 1

    def test_no_source_is_trained_for_nothing(self, tmp_path):
        places = [job.place for job in plan_jobs(small(methods="scratch,finetune-keep"), tmp_path)]
        assert "sources/keep" in places
        assert "sources/catch" not in places

    def test_steps_episodes_and_other_settings_reach_the_runs(self, tmp_path):
        of = small(source_steps=5000, episodes=7, set_=["lr=0.01", "explore=2"], methods="hub")
        source, _, hub = (job.settings for job in plan_jobs(of, tmp_path, "cpu")[:3])
        assert (source.steps, hub.steps) == (5000, 3000)
        assert (source.eval_every, hub.eval_every) == (1000, 600)
        assert (source.final_episodes, hub.final_episodes) == (7, 7)
        assert (source.lr, hub.lr, hub.explore) == (0.01, 0.01, 2.0)
        assert small().settings.source_steps == 3000
        given = plan_jobs(small(set_=["eval_every=123"], methods="scratch"), tmp_path)
        assert given[0].settings.eval_every == 123

    def test_k_of_a_larger_hub(self, tmp_path):
        of = small(sources="catch,cross,keep", set_=["k=3"], methods="hub,hub-k1")
        assert [job.settings.k for job in plan_jobs(of, tmp_path)[3:5]] == [1, 3]


class TestWrongInput:
    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"methods": "zoo-tunig"}, "methods: 'zoo-tunig' is unknown; did you mean zoo-tuning"),
            ({"methods": " ,"}, "methods: expected names"),
            ({"targets": "medly"}, "targets: .*; or is the small game medley meant"),
            ({"targets": "medley,medley"}, "targets: expected different games"),
            ({"targets": ""}, "targets: expected games, apart by commas, got none"),
            ({"sources": "catch"}, "sources: expected at least 2 different games, got catch"),
            ({"sources": "catch,catch"}, "sources: expected different games"),
            ({"seeds": ()}, "seeds: expected different integers"),
            ({"set_": ["k=3"]}, "k: expected at most the 2 sources, got 3"),
            ({"set_": ["k=two"]}, "k: expected an integer of at least 1, got 'two'"),
            ({"set_": ["seed=3"]}, "--set seed: a comparison decides it"),
            ({"set_": ["hidde=3"]}, "unknown setting 'hidde'; closest: hidden"),
            ({"steps": 0}, "steps: expected an integer of at least 1"),
            ({"episodes": 0}, "episodes: expected an integer of at least 1"),
        ],
    )
    def test_it_is_named(self, given, said):
        with pytest.raises(ValueError, match=said):
            small(**given)

    def test_a_game_that_is_unknown_is_named_with_the_closest(self):
        pytest.importorskip("ale_py", reason="needs the extra [atari]")
        with pytest.raises(ValueError, match=r"sources: game 'seaqest' .* did you mean seaquest"):
            small(sources="seaqest,riverraid")
        of = small(sources="ALE/Seaquest-v5,River Raid", targets="JamesBond")
        assert of.settings.sources == ("seaquest", "riverraid")
        assert of.targets == ("jamesbond",)

    def test_too_few_steps_are_refused_before_anything_runs(self, tmp_path):
        with pytest.raises(ValueError, match="steps: expected more than"):
            compare_atari(small(steps=10), tmp_path / "cmp")
        assert not (tmp_path / "cmp").exists()

    def test_jobs(self, tmp_path):
        with pytest.raises(ValueError, match="jobs: expected an integer of at least 1, got 0"):
            compare_atari(small(), tmp_path, jobs=0)

    def test_networks_that_do_not_fit_each_other(self, tmp_path, monkeypatch):
        from hubpath_fast.recipes import atari_settings

        real = atari_settings.known_game
        other = {"keep": {"hidden": 8}}
        monkeypatch.setattr(
            atari_settings, "known_game", lambda n: (n, dict(real(n)[1]) | other.get(n, {}))
        )
        with pytest.raises(ValueError, match="source catch and source keep have networks that do"):
            plan_jobs(small(), tmp_path)

    def test_the_command_says_it_in_a_line(self, tmp_path):
        out = tmp_path / "cmp"
        given = ("atari", "compare", "--sources", "catch,keep", "--targets", "medley")
        said = refused(*given, "--out", out, "--methods", "hubb")
        assert "methods: 'hubb' is unknown; did you mean hub" in said
        assert not out.exists()
        assert "it has no compare.json" in refused("atari", "report", tmp_path)


class TestFolder:
    def test_another_command_is_refused_by_name(self, tmp_path):
        open_comparison(tmp_path, asked())
        for change, said in (
            ({"steps": 9}, "steps: 20000 there, 9 now"),
            ({"source_steps": 9}, "source_steps: 20000 there, 9 now"),
            ({"sources": ("a", "b")}, r"sources: \['seaquest', 'riverraid'\] there"),
            ({"episodes": 9}, "episodes: 4 there, 9 now"),
            ({"set": ("lr=1.0",)}, r"set: 'absent' there, \['lr=1.0'\] now"),
        ):
            with pytest.raises(ValueError, match=f"another comparison.*{said}"):
                open_comparison(tmp_path, asked(**change))

    def test_more_of_the_same_is_added(self, tmp_path):
        open_comparison(tmp_path, asked(("gopher",), ("hub",), (1,)))
        found = open_comparison(tmp_path, asked(("alien",), ("scratch",), (0,)))
        assert (found.targets, found.methods, found.seeds) == (
            ("gopher", "alien"), ("hub", "scratch"), (0, 1),
        )  # fmt: skip
        assert names(found.chosen()) == ["scratch", "hub"]
        assert len(found.places()) == 8

    def test_what_is_no_comparison_is_left_alone(self, tmp_path):
        (tmp_path / "thesis.tex").touch()
        with pytest.raises(ValueError, match="holds something that is no comparison of games"):
            open_comparison(tmp_path, asked())
        with pytest.raises(ValueError, match="is a file"):
            open_comparison(tmp_path / "thesis.tex", asked())
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


class TestRuns:
    def test_one_that_is_killed_takes_no_other_along_and_is_tried_again(self, tmp_path):
        out, consoles = tmp_path / "cmp", []

        def compare():
            consoles.append(Console(file=io.StringIO(), width=300))
            of = small(methods="scratch", seeds=(0, DIES, FAILS))
            return compare_atari(of, out, 2, console=consoles[-1], fit=quick_fit)

        results = compare()
        assert results.failures == {
            f"runs/medley/scratch/seed-{DIES}": "its process died of SIGKILL; was there enough "
            "memory?",
            f"runs/medley/scratch/seed-{FAILS}": "lr: far too large",
        }
        assert results.scores("medley", "scratch") == {0: 20}
        said, log = consoles[-1].file.getvalue(), out / f"runs/medley/scratch/seed-{DIES}.log"
        assert f"medley, from scratch, seed {DIES}: failed: its process died of SIGKILL" in said
        assert f"its log is {log}" in said
        assert log.read_text() == "scratch on medley\n"
        assert "medley, from scratch, seed 0: 20.0 points" in said
        assert "partial" in (out / "report/table.md").read_text()

        results = compare()
        assert not results.failures
        assert not results.missing
        assert "3 runs, 1 of them finished; 2 to do, 2 at a time" in consoles[-1].file.getvalue()
        assert results.scores("medley", "scratch") == {0: 20, DIES: 20 + DIES, FAILS: 20 + FAILS}
        assert not list(out.rglob("*.failed.json"))
        assert read_json(out / "report/table.json")["missing"] == []

    def test_a_signal_reaches_the_runs_which_save(self, tmp_path):
        out = tmp_path / "cmp"
        run = out / f"runs/medley/scratch/seed-{WAITS}"

        def interrupt() -> None:
            wait_until((run / "waits").exists, "the run")
            os.kill(os.getpid(), signal.SIGINT)

        of = small(methods="scratch", seeds=(WAITS,))
        console = Console(file=io.StringIO())
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(InterruptedError, match="the same command goes on from here"):
            compare_atari(of, out, 1, console=console, fit=quick_fit)
        assert (run / "saved").exists()
        assert not (out / "report").exists()
        assert not compare_atari(of, out, 1, console=console, fit=quick_fit).missing

    def test_what_needs_a_source_that_failed_does_not_begin(self, tmp_path, monkeypatch):
        from hubpath_fast.recipes import atari_compare

        monkeypatch.setattr(atari_compare, "SOURCE_SEED", FAILS)
        of, out = small(methods="finetune", seeds=(0,)), tmp_path / "cmp"
        open_comparison(out, of)
        (out / "sources/keep").mkdir(parents=True)
        (out / "sources/keep/attempt").write_text(LAST)  # does not fail
        results = compare_atari(of, out, 3, console=Console(file=io.StringIO()), fit=quick_fit)
        assert results.failures == {
            "sources/catch": "lr: far too large",
            "runs/medley/finetune-catch/seed-0": "sources/catch, which it starts from, is not "
            "finished",
        }
        assert results.scores("medley", "finetune-keep") == {0: 21}
        assert list(results.sources) == ["keep"]
