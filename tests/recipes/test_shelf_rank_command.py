"""``hubpath shelf rank``: what it writes, prints and refuses."""

import json

import pytest
import torch
from support.shelves import make_shelf
from typer.testing import CliRunner

from hubpath_fast.cli import app
from hubpath_fast.cli.shelf.rank import chance_tau
from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.recipes.shelf_rank import rank
from hubpath_fast.shelf.heads import fit_heads, held_out
from hubpath_fast.shelf.ranking import kendall
from hubpath_fast.shelf.selection import Budget, greedy


def run(*arguments, columns=160):
    return CliRunner(env={"COLUMNS": str(columns)}).invoke(
        app, ["shelf", "rank", *map(str, arguments)]
    )


def test_everything_is_in_a_file_best_first(tmp_path):
    shelf = make_shelf(tmp_path / "s", num_models=20, sizes=(120, 60, 0), source_classes=4)
    result = rank(tmp_path / "s", budget=Budget(models=3, ms=9.0))
    assert json.loads((tmp_path / "s" / "rank.json").read_text()) == result
    accuracies = [row["scores"]["linear"] for row in result["models"]]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [row["rank"] for row in result["models"]] == list(range(1, 21))
    assert set(result["agreement"]) == {"h_score", "log_me", "leep", "nce", "knn"}
    assert all(0 <= found["recall"] <= 1 for found in result["agreement"].values())
    first = result["models"][0]
    model = shelf.models[shelf.find(first["label"])]
    told = (model.name, model.num_features, model.parameters, model.ms)
    assert (first["name"], first["features"], first["parameters"], first["ms"]) == told
    heads = fit_heads(shelf)
    logits, targets, _ = held_out(shelf, heads, range(20))
    for objective in ("ensemble", "routing"):
        chosen = greedy(logits, targets, Budget(models=3, ms=9.0), objective, shelf.models)
        assert [row["index"] for row in result["sets"][objective]] == [c.index for c in chosen]
        assert [row["loss"] for row in result["sets"][objective]] == [c.loss for c in chosen]
        assert all(row["ms"] <= 9.0 for row in result["sets"][objective])
        losses = [c.loss for c in chosen]
        assert losses[result["sets"]["best"][objective] - 1] == min(losses)
    assert (result["sets"]["split"], result["sets"]["images"]) == ("validation", 60)


def test_sorted_by_a_cheap_score_without_heads_no_set_is_chosen(tmp_path):
    make_shelf(tmp_path / "s")
    result = rank(tmp_path / "s", linear=False)
    assert (result["by"], result["sets"], result["agreement"]) == ("log_me", None, {})
    found = [row["scores"]["log_me"] for row in result["models"]]
    assert found == sorted(found, reverse=True)
    assert not (tmp_path / "s" / "heads").exists()
    result = rank(tmp_path / "s", by="knn")
    found = [row["scores"]["knn"] for row in result["models"]]
    assert found == sorted(found, reverse=True)


def test_the_command_prints_the_order_the_agreement_and_a_set(tmp_path):
    make_shelf(tmp_path / "s", num_models=35, sizes=(70, 35, 0))
    found = run(tmp_path / "s", "--models", 2, "--parameters", "1M", "--objective", "routing")
    assert found.exit_code == 0, found.output
    lines = found.output
    assert "and 3 more, see" in lines
    assert "Kendall's tau" in lines
    assert "varies from one data set to another" in lines
    assert "any right, %" in lines
    assert "on 35 validation images" in lines
    best = rank(tmp_path / "s")["models"][0]["label"]
    assert any(line.split()[:2] == ["1", best] for line in lines.splitlines())
    assert "accuracy in 5-fold cross-validation on 70 training images" in lines
    assert "few images: sets are chosen on 35 validation images, one of which is 2.9 po" in lines
    assert "tau says little" not in lines
    found = run(tmp_path / "s", "--no-linear")
    assert found.exit_code == 0, found.output
    assert "Kendall" not in found.output
    assert "it is not known how well the scores foretell them" in found.output


def test_of_few_models_and_images_it_says_how_much_is_luck(tmp_path):
    make_shelf(tmp_path / "s", num_models=7, sizes=(70, 1, 0))
    said = run(tmp_path / "s", columns=80).output
    assert "of only 7 models tau says little: by chance it is within ±0.62 in 19 of 20" in said
    assert "few images: sets are chosen on 1 validation image, one of which is 100.0 points" in said
    assert "its first 16" not in said  # of 7 models there is no such column
    make_shelf(tmp_path / "more", num_models=4, sizes=(70, 100, 0))
    assert "few images" not in run(tmp_path / "more").output


def test_by_chance_tau_is_within_what_is_said():
    draw = torch.Generator().manual_seed(0)
    orders = [torch.randperm(7, generator=draw).tolist() for _ in range(4000)]
    inside = [abs(kendall(a, range(7))) <= chance_tau(7) for a in orders]
    assert 0.93 < sum(inside) / len(inside) < 0.98  # 0.95; tau of 7 has steps of 0.1
    assert chance_tau(2) == 1.0


def test_the_best_row_of_a_set_is_marked(tmp_path):
    make_shelf(tmp_path / "s", num_models=7, sizes=(70, 24, 0))
    said = run(tmp_path / "s", columns=80).output
    sets = json.loads((tmp_path / "s" / "rank.json").read_text())["sets"]
    losses = [row["loss"] for row in sets["ensemble"]]
    best = losses.index(min(losses)) + 1
    assert 1 < best < 7
    assert f"Greedy forward selection by validation loss; best: {best} models" in said
    [marked] = [line for line in said.splitlines() if line.rstrip().endswith(" best")]
    assert marked.split()[:2] == [str(best), sets["ensemble"][best - 1]["label"]]


def test_no_name_is_cut_and_no_line_longer_than_a_terminal(tmp_path):
    names = [f"vit_small_patch16_224.of_a_long_common_prefix_{i}" for i in range(6)]
    draw = torch.Generator().manual_seed(0)
    features = {name: torch.randn(90, 5, generator=draw) for name in names}
    heads = {name: (torch.randn(4, 5), torch.zeros(4)) for name in names}
    sizes = {"train": 60, "validation": 30}
    about = {name: {"parameters": 85_800_000, "ms": 123.4} for name in names}
    targets = torch.arange(90) % 3
    write_shelf(
        tmp_path / "s", features, targets, "abc", sizes, source_heads=heads, about=about
    )  # fmt: skip
    said = run(tmp_path / "s", columns=80).output.split("written: ")[0]
    assert "…" not in said
    assert max(map(len, said.splitlines()[:-1])) <= 80
    rows = said.split("Agreement")[0].splitlines()
    first = "".join(line[6:].split()[0] for line in rows if line[6:].strip())
    for name in names:
        assert name in first


def test_a_ranking_with_heads_is_not_replaced_without_a_word(tmp_path):
    make_shelf(tmp_path / "s")
    assert "replaces" not in run(tmp_path / "s", "--no-linear").output
    assert "replaces" not in run(tmp_path / "s").output
    assert "a ranking with linear heads, which this" in run(tmp_path / "s", "--no-linear").output


def test_stopped_it_says_what_is_kept(tmp_path, monkeypatch):
    make_shelf(tmp_path / "s")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hubpath_fast.recipes.shelf_rank.rank_models", stop)
    found = run(tmp_path / "s")
    assert found.exit_code == 130
    assert "stopped; heads that are fitted are kept, so the same command goes on" in found.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--by", "leep"],
            "by: expected one of linear, h_score, log_me, knn, since no model on the shelf has the "
            "head that it was pre-trained with, got 'leep'",
        ),
        (["--by", "linear", "--no-linear"], "knn with --no-linear, got 'linear'; leave out one"),
        (
            ["--by", "best"],
            "by: expected one of linear, h_score, log_me, leep, nce, knn, got 'best'",
        ),
        (["--objective", "best"], "objective: expected ensemble or routing, got 'best'"),
        (["--parameters", "many"], "parameters: expected a count such as 50000 or '50M'"),
        (["--ms", "-1"], "ms: expected a number above 0, got -1.0"),
        (["--ms", "0.001"], "no model fits ms 0.001; the least costs 0.5 ms"),
        (["--models", "3", "--no-linear"], "leave out --models, or --no-linear"),
        (["--ms", "3", "--parameters", "1M", "--no-linear"], "leave out --parameters and --ms, or"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path, arguments, message):
    make_shelf(tmp_path / "s")
    found = run(tmp_path / "s", *arguments)
    assert found.exit_code == 2
    assert message in " ".join(found.output.split())


def test_what_is_no_shelf_or_has_too_few_images_is_said(tmp_path):
    found = run(tmp_path)
    assert found.exit_code == 2
    assert "is no shelf" in found.output
    make_shelf(tmp_path / "s", classes=9, sizes=(8, 5, 0))
    found = run(tmp_path / "s")
    assert found.exit_code == 2
    assert "got 8 images of 9 classes" in found.output


def test_without_validation_images_sets_are_chosen_out_of_fold(tmp_path):
    make_shelf(tmp_path / "s", sizes=(60, 0, 30))
    found = run(tmp_path / "s")
    assert found.exit_code == 0, found.output
    assert "on 60 training images, each by heads that did not see it" in " ".join(
        found.output.split()
    )
    assert Shelf.open(tmp_path / "s").labels == tuple(f"model{i}" for i in range(4))
