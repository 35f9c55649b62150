"""Comparisons of landmarks: what stands in a row when what models say together is a mean of maps,
and stored are points."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support.command import hubpath
from support.compare import QUIET, row_of

from hubpath_fast.baselines import Ensemble, SingleModel
from hubpath_fast.compare import compare
from hubpath_fast.compare.methods import choose_methods, methods_of
from hubpath_fast.compare.paper import notes_on_figures, numbers_beside
from hubpath_fast.compare.problems import open_problem
from hubpath_fast.compare.settings import make_settings
from hubpath_fast.runs.build import saved_task
from hubpath_fast.tasks.landmarks import (
    LAYOUTS,
    LandmarkDigits,
    auc,
    decode,
    failure_rate,
    nme,
)
from hubpath_fast.training import load_weights

HUB = "test_efficientnet,test_efficientnet"
METHODS = (
    "mean-shape,from-scratch,single,ensemble-top-k,ensemble,ensemble-soft,distill,hub-pathway,"
    "oracle"
)


def settings_of(hub: str = HUB, **more):
    top = {"pretrained": False, "k": 1} | more
    trainer = {"steps": 2, "batch_size": 8, "lr_head": 0.05}  # maps that say something at all
    return make_settings("digits", hub, rates=(0.02,), top=top, trainer=trainer, task="landmarks")


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    out = tmp_path_factory.mktemp("landmarks") / "out"
    settings = settings_of()
    return out, settings, compare(settings, METHODS, (0,), out, workers=1, console=QUIET)


@pytest.fixture(scope="module")
def digits():
    return LandmarkDigits(0, 100).test


@pytest.fixture(scope="module")
def maps(done, digits):
    """[2, 797, 5, 16, 16]: of the fine-tuned experts, from their checkpoints."""
    out, settings, _ = done
    problem, found = open_problem(settings, 0), []
    for i in range(2):
        model = SingleModel(problem.expert(i)).eval()
        load_weights(model, out / f"runs/seed-0/single-{i}/last")
        with torch.no_grad():
            parts = [model(images) for images in digits.images.split(256)]
        found.append(torch.cat(parts))
    return torch.stack(found)


def errors_of(points, digits):
    targets = digits.targets
    return nme(points, targets[..., :2], targets[:, 0, 3])


def stored(done, run):
    return load_file(done[0] / "runs/seed-0" / run / "outputs.safetensors")


class TestRows:
    def test_every_method_has_a_finished_row(self, done):
        assert [row["method"] for row in done[2]] == [
            "mean-shape", "from-scratch", "single:test_efficientnet #1",
            "single:test_efficientnet #2", "ensemble-top-k", "ensemble", "ensemble-soft", "distill",
            "hub-pathway", "oracle",
        ]  # fmt: skip
        assert {row["status"] for row in done[2]} == {"done"}, [row["reason"] for row in done[2]]
        titles = {row["method"]: row["title"] for row in done[2]}
        assert titles["ensemble"] == "ensemble, mean of maps"
        assert titles["ensemble-soft"] == "ensemble, mean of points"

    def test_points_and_errors_are_stored_and_no_maps(self, done, digits):
        for run in ("from-scratch", "single-0", "ensemble", "pathway", "mean-shape"):
            outputs = stored(done, run)
            assert outputs["test"].shape == (797, 5, 3)
            assert outputs["validation"].shape == (100, 5, 3)
            errors = errors_of(outputs["test"][..., :2], digits)
            torch.testing.assert_close(outputs["errors"], errors, rtol=0, atol=0)
            weights = {"weights"} if run == "pathway" else set()
            assert set(outputs) == {"test", "validation", "errors"} | weights

    def test_an_ensemble_is_the_mean_of_maps(self, done, maps, digits):
        points, confidence = decode(maps.mean(dim=0))
        outputs = stored(done, "ensemble")["test"]
        # Sums of two maps in another batch's order: a tie of cells may go the other way.
        same = (outputs[..., :2] - points).abs().amax(dim=(1, 2)) < 1e-4
        assert same.double().mean() > 0.99
        torch.testing.assert_close(outputs[..., 2], confidence, rtol=1e-3, atol=1e-4)
        row = row_of(done[2], "ensemble")
        assert row["mean"] == pytest.approx(errors_of(points, digits).mean().item(), rel=1e-2)

    def test_the_mean_of_points_is_another_row(self, done, maps, digits):
        points = torch.stack([decode(one)[0] for one in maps]).mean(dim=0)
        expected = errors_of(points, digits).mean().item()
        assert row_of(done[2], "ensemble-soft")["mean"] == pytest.approx(expected, rel=1e-2)
        assert row_of(done[2], "ensemble")["mean"] != row_of(done[2], "ensemble-soft")["mean"]

    def test_the_best_k_are_chosen_on_validation_digits(self, done):
        results = [
            json.loads((done[0] / f"runs/seed-0/single-{i}/result.json").read_text())
            for i in range(2)
        ]
        best = min(results, key=lambda result: result["validation"]["nme"])
        row = row_of(done[2], "ensemble-top-k")  # K is 1 here
        assert row["mean"] == best["test"]["nme"]
        assert row["forwards_per_sample"] == 1

    def test_the_oracle_takes_the_best_expert_for_each_digit(self, done):
        errors = torch.stack([stored(done, f"single-{i}")["errors"] for i in range(2)])
        assert row_of(done[2], "oracle")["mean"] == errors.amin(dim=0).mean().item()

    def test_the_mean_shape_is_the_floor(self, done, digits):
        shape = LandmarkDigits(0, 100).mean_shape()
        errors = errors_of(shape.expand(797, 5, 2), digits)
        row = row_of(done[2], "mean-shape")
        assert row["mean"] == errors.mean().item()
        assert row["mean"] == pytest.approx(0.15, abs=0.01)
        costs = [row[name] for name in ("train_steps", "train_forwards", "forwards_per_sample")]
        assert costs == [0, 0, None]

    def test_failures_and_area_stand_beside(self, done):
        for name, run in (("single:test_efficientnet #1", "single-0"), ("ensemble", "ensemble")):
            errors = stored(done, run)["errors"]
            expected = {"fr_10": failure_rate(errors, 0.1), "auc_10": auc(errors, 0.1)}
            assert row_of(done[2], name)["also"] == expected
        errors = torch.stack([stored(done, f"single-{i}")["errors"] for i in range(2)]).amin(dim=0)
        assert row_of(done[2], "oracle")["also"]["auc_10"] == auc(errors, 0.1)

    def test_an_ensemble_costs_what_its_members_cost(self, done):
        rows = done[2]
        alone = [row_of(rows, f"single:test_efficientnet #{i}") for i in (1, 2)]
        both = row_of(rows, "ensemble")
        assert both["forwards_per_sample"] == 2
        assert both["gflops_per_sample"] == sum(row["gflops_per_sample"] for row in alone)
        assert both["train_seconds"] == sum(row["train_seconds"] for row in alone)
        assert (both["train_steps"], both["train_forwards"]) == (2, 2 * 2 * 8)
        assert both["peak_memory_mb"] == max(row["peak_memory_mb"] for row in alone)
        assert row_of(rows, "ensemble-soft")["forwards_per_sample"] == 2

    def test_from_scratch_is_a_network_of_its_own(self, done):
        row = row_of(done[2], "from-scratch")
        assert (row["forwards_per_sample"], row["train_forwards"]) == (1, 16)
        assert row["rates"] == [[0.02]]

    def test_tables_say_which_targets(self, done):
        out = done[0]
        table = json.loads((out / "table.json").read_text())
        assert (table["targets"], table["normalizer"]) == ("subpixel", "ink")
        text = (out / "table.md").read_text()
        head = next(line for line in text.splitlines() if line.startswith("| method"))
        assert head.startswith("| method | NME, % | spread | FR@10, % | AUC@10, % |")
        sentence = "NME is in percent of the diagonal of the ink"
        assert f"{sentence}'s box, of maps learned from subpixel targets" in text
        assert sentence in (out / "table.html").read_text()

    def test_it_has_a_report(self, done):
        out = done[0]
        said = hubpath("report", out, "--out", out.parent / "report").output
        assert "report.html" in said
        page = (out.parent / "report/report.html").read_text()
        assert "ensemble, mean of maps" in page

    def test_a_second_call_trains_nothing(self, done):
        out, settings, rows = done
        before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
        assert compare(settings, METHODS, (0,), out, console=QUIET) == rows
        assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before


class TestMethods:
    def test_those_of_the_papers_table_3_and_more(self):
        settings = settings_of("test_efficientnet,test_resnet,test_efficientnet", k=2)
        methods = {method.name: method for method in methods_of(settings)}
        assert list(methods)[:2] == ["mean-shape", "from-scratch"]
        for name in ("distill", "knowledge-flow", "zoo-tuning", "soup-greedy", "hub-pathway-k3"):
            assert name in methods
        assert methods["from-scratch"].paper == "FromScratch"
        for name in ("ensemble", "ensemble-top-k"):
            assert methods[name].run == name
            assert methods[name].needs == ("single-0", "single-1", "single-2")
        assert methods["ensemble-soft"].train is None
        assert "ensemble-hard" not in methods

    def test_classes_have_none_of_the_new_ones(self):
        names = [method.name for method in methods_of(make_settings("digits", HUB, top={"k": 1}))]
        assert not {"mean-shape", "from-scratch", "ensemble-soft"} & set(names)
        methods = methods_of(make_settings("digits", HUB, top={"k": 1}))
        [ensemble] = choose_methods("ensemble", methods)
        assert ensemble.train is None
        with pytest.raises(ValueError, match="'mean-shape' is unknown"):
            choose_methods("mean-shape", methods)

    def test_an_ensemble_needs_members(self):
        with pytest.raises(ValueError, match="members: expected at least one"):
            Ensemble([], None)


class TestSettings:
    def test_digits_begin_with_small_heads(self):
        fit = make_settings("digits", "tiny", task="landmarks").fit
        assert (fit.task, fit.image_size, fit.landmarks.head_width) == ("landmarks", 64, 32)
        other = make_settings(
            "digits", "tiny", task="landmarks", top={"landmarks": {"sigma": 0.7}}
        ).fit.landmarks
        assert (other.sigma, other.head_width) == (0.7, 32)

    def test_a_preset_brings_task_data_and_targets(self):
        settings = make_settings(None, None, data_root="x", preset="landmarks-wflw")
        fit = settings.fit
        assert (fit.task, fit.dataset, fit.data) == ("landmarks", "wflw", "x")
        assert (fit.landmarks.targets, fit.trainer.steps) == ("published", 28_140)

    def test_sets_of_faces_have_landmarks_and_nothing_else(self):
        assert make_settings("WFLW", "tiny", data_root="x").fit.task == "landmarks"
        refused = "task: the preset landmarks-wflw is of landmarks, got classification"
        with pytest.raises(ValueError, match=refused):
            make_settings(None, None, "x", preset="landmarks-wflw", task="classification")
        with pytest.raises(ValueError, match="cars has classes and no landmarks"):
            make_settings("cars", "tiny", data_root="x", task="landmarks")

    def test_experts_at_64_pixels_have_other_keys(self, tmp_path):
        plain = open_problem(make_settings("digits", "tiny"), 0, cache=tmp_path).hub
        large = open_problem(make_settings("digits", "tiny", task="landmarks"), 0, cache=tmp_path)
        keys = {member.key for member in (*plain.members, *large.hub.members)}
        assert len(keys) == 10

    def test_an_expert_keeps_its_body_and_gets_a_head_of_maps(self, tmp_path):
        settings = make_settings("digits", "test_efficientnet", top={"k": 1}, task="landmarks")
        problem = open_problem(settings.replace(digits_pretrain_epochs=1), 0, cache=tmp_path)
        state, _ = problem.hub.pretrain(0)
        expert = problem.expert(0)
        own = dict(expert.body.named_parameters())
        assert torch.equal(own["backbone.conv_stem.weight"], state["conv_stem.weight"])
        assert expert.module(torch.rand(2, 3, 64, 64)).shape == (2, 5, 16, 16)
        fresh = dict(problem.untrained().body.named_parameters())["backbone.conv_stem.weight"]
        assert not torch.equal(fresh, state["conv_stem.weight"])


def task_of(fit):
    return saved_task(fit, {"landmarks": LAYOUTS[fit.dataset].names})


class TestPaper:
    def published(self, dataset="wflw", **landmarks):
        return make_settings(
            None, None, data_root="x", preset=f"landmarks-{dataset}", top={"landmarks": landmarks}
        ).fit

    def test_its_numbers_of_table_3(self):
        numbers = numbers_beside(self.published())
        assert numbers["HubPathway"]["mean"] == pytest.approx(0.0454)
        assert numbers["FromScratch"]["mean"] == pytest.approx(0.0533)
        assert numbers["single-1"]["mean"] == pytest.approx(0.0475)  # MoCo
        cofw = numbers_beside(self.published("cofw"))
        assert cofw["Ensemble"]["mean"] == pytest.approx(0.0346)

    def test_other_targets_or_another_unit_never_stand_beside_them(self):
        for other in ({"targets": "subpixel"}, {"unit": "pupil"}):
            fit = self.published(**other)
            assert numbers_beside(fit) == {}
            said = " ".join(notes_on_figures(fit, task_of(fit), beside=False))
            assert "stand beside ours only for published targets" in said
            assert next(iter(other.values())) in said
        fit = self.published()
        beside = " ".join(notes_on_figures(fit, task_of(fit), beside=True))
        assert "of the inter-ocular distance, of maps learned from published targets" in beside
        assert "best on the test faces" in beside
        assert notes_on_figures(make_settings("digits", "tiny").fit, None, beside=False) == []

    def test_the_digits_have_a_unit_of_their_own(self):
        fit = make_settings("digits", "tiny", task="landmarks").fit
        task = saved_task(fit, {"landmarks": LandmarkDigits.layout.names})
        assert (task.bump, task.unit_name) == (1.0, "ink")
        other = fit.replace(landmarks=fit.landmarks.replace(unit="0-1"))
        with pytest.raises(ValueError, match="unit: digits have their own, got '0-1'"):
            saved_task(other, {"landmarks": LandmarkDigits.layout.names})
