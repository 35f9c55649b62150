"""The demo of small games: what it writes, the words that intervals allow, and how it fails."""

import io
import json
import math
import re
import shutil

import pytest
import torch
from rich.console import Console

from hubpath_fast.recipes.atari_demo import QUICK, atari_demo
from hubpath_fast.recipes.atari_demo_games import NAMES, SHOWN, Played, play_medley, read_moments
from hubpath_fast.recipes.atari_demo_report import Demo, said, verdicts
from hubpath_fast.recipes.atari_demo_runs import Plan, drop_damaged
from hubpath_fast.tasks.atari.statistics import Interval

TINY = {
    "steps": 60, "learn_start": 40, "batch_size": 4, "hidden": 8, "widths": (4, 8), "atoms": 11,
    "eval_every": 60, "eval_episodes": 1, "log_every": 20,
}  # fmt: skip
METHODS = ("scratch", "finetune-catch", "finetune-cross", "finetune-keep", "hub-k1", "hub")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(its folder, the cache, its summary, what it printed)."""
    out, cache = tmp_path_factory.mktemp("demo"), tmp_path_factory.mktemp("cache")
    console = Console(file=io.StringIO(), width=110)
    summary = atari_demo(out, 0, True, console=console, cache=cache, changes=TINY)
    return out, cache, summary, console.file.getvalue()


def test_the_summary_has_all_methods_and_is_on_disk(finished):
    out, _, summary, _ = finished
    assert json.loads((out / "summary.json").read_text()) == summary
    assert tuple(summary["methods"]) == METHODS
    assert (summary["seed"], summary["steps"], summary["episodes"]) == (0, 60, 10)
    assert set(summary["sources"]) == set(NAMES)
    for row in (summary["random"], *summary["methods"].values()):
        assert row["low"] <= row["score"] <= row["high"]
    assert {(d["method"], d["rival"]) for d in summary["differences"]} == {
        (hub, rival) for hub in ("hub-k1", "hub") for rival in (summary["best_source"], "scratch")
    }
    best = summary["methods"][summary["best_source"]]["score"]
    assert best == max(summary["methods"][f"finetune-{name}"]["score"] for name in NAMES)


def test_the_score_is_the_mean_over_all_episodes_of_the_same_games(finished):
    out, _, summary, _ = finished
    games = set()
    for method in METHODS:
        played = json.loads((out / "runs" / method / "played.json").read_text())
        games.add(tuple(played["games"]))
        mean = sum(played["scores"]) / 10
        assert summary["methods"][method]["score"] == pytest.approx(mean)
        for name, value in summary["methods"][method]["by_game"].items():
            own = [s for g, s in zip(played["games"], played["scores"], strict=True) if g == name]
            assert value == pytest.approx(sum(own) / len(own))
    assert len(games) == 1


def test_weights_of_a_game_are_those_of_the_k_experts_asked(finished):
    _, _, summary, _ = finished
    for hub, k in (("hub-k1", 1), ("hub", 2)):
        for weights in summary["weights"][hub].values():
            assert tuple(weights) == NAMES
            # Softmax over three experts, of which K are kept, hardly trained: about K / 3.
            assert k / 3 <= sum(weights.values()) < k / 3 + 0.15


def test_a_run_asked_again_plays_the_same_and_its_boards_are_of_its_games(finished):
    out, _, _, _ = finished
    folder = out / "runs" / "hub"
    kept = (folder / "played.json").read_text()
    play_medley(folder, 10, 0)
    assert (folder / "played.json").read_text() == kept
    moments = read_moments(folder)
    assert moments["boards"].dtype == torch.uint8
    assert moments["boards"].shape[1:] == (3, 160, 160)
    assert len(moments["boards"]) == len(moments["weights"]) == len(moments["games"])
    assert len(moments["games"]) % len(SHOWN) == 0
    assert ((moments["weights"] > 0).sum(dim=1) == 2).all()


def test_the_terminal_and_the_page_show_the_same_numbers(finished):
    out, _, summary, printed = finished
    page = (out / "report.html").read_text()
    assert "[9/9]" in printed
    for title, name in (("from scratch", "scratch"), ("Hub-Pathway, K = 1", "hub-k1")):
        assert re.search(rf"{title} +│ +{summary['methods'][name]['score']:.2f} ", printed)
    for text in verdicts(summary):
        assert text in printed
        assert text.replace("+", "&#43;") in page or text in page
    assert page.count("<img ") >= 7
    assert not re.search(r"\batari\b", re.sub(r"base64,[^\"]+", "", page), re.IGNORECASE)


def test_a_stopped_demo_goes_on_with_what_is_missing(finished, tmp_path):
    out, cache, summary, _ = finished
    stopped = shutil.copytree(out, tmp_path / "demo")
    (stopped / "summary.json").unlink()
    shutil.rmtree(stopped / "runs" / "scratch")
    console = Console(file=io.StringIO(), width=110)
    again = atari_demo(stopped, 0, True, console=console, cache=cache, changes=TINY)
    printed = console.file.getvalue()
    assert "sources from the cache: catch, cross, keep" in printed
    assert re.findall(r"\[\d/\d\] (\S+):", printed) == ["scratch"]
    # The same seed, the same to the bit.
    for name in ("score", "curve", "by_game"):
        assert again["methods"]["scratch"][name] == summary["methods"]["scratch"][name]
    assert again["methods"]["hub"] == summary["methods"]["hub"]


def plan(tmp_path, **changes):
    return Plan(0, "cpu", tmp_path, 10, {**TINY, **changes})


def test_a_source_is_kept_by_all_that_determines_it(tmp_path):
    folders = {
        plan(tmp_path).source("catch"), plan(tmp_path).source("keep"),
        plan(tmp_path, lr=1e-3).source("catch"),
        Plan(1, "cpu", tmp_path, 10, TINY).source("catch"),
    }  # fmt: skip
    assert len(folders) == 4
    assert plan(tmp_path).source("catch") in folders


def test_other_rules_make_another_source(tmp_path, monkeypatch):
    before = plan(tmp_path).source("keep")
    monkeypatch.setattr("inspect.getsource", lambda cls: f"other rules of {cls.__name__}")
    assert plan(tmp_path).source("keep") != before


def test_sources_and_target_have_steps_of_their_own(tmp_path):
    demo = Plan(0, "cpu", tmp_path, 100, {})
    assert demo.settings("keep").steps == 6_000
    assert {demo.settings("medley", m).steps for m in demo.methods} == {8_000}
    assert demo.settings("medley", demo.methods[-1]).hub == tuple(
        str(demo.source(name)) for name in NAMES
    )


def test_a_damaged_source_is_said_and_dropped(finished, tmp_path):
    _, cache, _, _ = finished
    source = Plan(0, "cpu", cache, 10, {**QUICK, **TINY}).source("catch")
    copy = shutil.copytree(source, tmp_path / "catch")
    console = Console(file=io.StringIO(), width=200)
    drop_damaged(copy, console)
    assert copy.is_dir()
    weights = next((copy / "last").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-100])
    drop_damaged(copy, console)
    assert not copy.exists()
    assert "is damaged; training it again" in console.file.getvalue()


def test_a_run_that_fails_is_named_with_its_reason(tmp_path):
    cache = tmp_path / "cache"
    for game in NAMES:
        folder = Plan(0, "cpu", cache, 10, {**QUICK, **TINY}).source(game)
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.write_text("no folder")
    with pytest.raises(OSError, match=r"source catch failed: out: .*catch-.* is a file"):
        atari_demo(
            tmp_path / "out", 0, True, console=Console(quiet=True), cache=cache, changes=TINY
        )
    assert not (tmp_path / "out" / "summary.json").exists()


def test_what_is_no_demo_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"out: .*no demo \(thesis\.tex\)"):
        atari_demo(tmp_path, console=Console(quiet=True), cache=tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"


class TestWords:
    @pytest.mark.parametrize(
        ("low", "high", "word"),
        [(0.1, 2.0, "ahead"), (-2.0, -0.1, "behind"), (-0.1, 2.0, "level"), (0.0, 0.0, "level")],
    )
    def test_the_word_follows_the_interval(self, low, high, word):
        assert said(Interval((low + high) / 2, low, high)) == word
        assert said(Interval(1.0, math.nan, math.nan)) == "level"

    def test_a_sentence_for_each_hub(self):
        rows = [
            ("hub", "finetune-keep", 2.0, 1.0, 3.0, "ahead"),
            ("hub", "scratch", -2.0, -3.0, -1.0, "behind"),
        ]
        keys = ("method", "rival", "value", "low", "high", "said")
        titles = {"hub": "Hub-Pathway", "finetune-keep": "fine-tuned from keep"}
        summary = {
            "methods": {k: {"title": t} for k, t in (titles | {"scratch": "from scratch"}).items()},
            "weights": {"hub": {}},
            "differences": [dict(zip(keys, row, strict=True)) for row in rows],
        }
        assert verdicts(summary) == [
            "Hub-Pathway is ahead of the policy fine-tuned from keep (+2.00 points, +1.00 to "
            "+3.00) and behind learning from scratch (-2.00 points, -3.00 to -1.00)."
        ]

    def test_a_lead_is_of_episodes_of_the_same_game(self, tmp_path):
        games = ["catch", "keep", "catch", "keep"] * 5
        base = [1.0, 20.0, 3.0, 40.0] * 5
        more = [
            score + (1.0 if game == "catch" else 3.0)
            for score, game in zip(base, games, strict=True)
        ]
        methods = tuple(m for m in plan(tmp_path).methods if m.name in ("scratch", "hub"))
        played = {"scratch": Played(games, base, None), "hub": Played(games, more, {})}
        demo = Demo(0, methods, {}, {}, played, played["scratch"])
        lead = demo.lead(methods[1], methods[0])
        # Differences are 1 and 3, however much the games differ.
        assert lead.value == 2.0
        assert 1.4 < lead.low < 2.0 < lead.high < 2.6
