"""The task object of landmarks: what is learned, and what becomes of maps."""

import math

import pytest
import torch

from hubpath_fast.model import HubPathwayLoss
from hubpath_fast.tasks.landmarks import LAYOUTS, LandmarkLayout, gaussian_targets
from hubpath_fast.tasks.landmarks.digits import DIGITS_LAYOUT
from hubpath_fast.tasks.landmarks.settings import LandmarkSettings, layout_for, read_pairs
from hubpath_fast.tasks.landmarks.task import Landmarks

LAYOUT = LandmarkLayout("five", 5)


def targets(count=3, side=16, unit=8.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    points = 2 + (side - 4) * torch.rand(count, 5, 2, generator=generator)
    rest = torch.tensor([1.0, unit]).expand(count, 5, 2)
    return torch.cat([points, rest], dim=2)


def perfect(truth, sigma=1.5, kind="subpixel"):
    return gaussian_targets(truth[..., :3].double(), 16, sigma, kind)


class TestLoss:
    @pytest.mark.parametrize("kind", ["subpixel", "published"])
    def test_is_one_for_empty_maps_and_zero_for_perfect_ones(self, kind):
        task, truth = Landmarks(LAYOUT, kind, sigma=1.0), targets()
        empty = torch.zeros(3, 5, 16, 16, dtype=torch.float64)
        assert task.loss(perfect(truth, 1.0, kind), truth).abs().max() < 1e-12
        # The sum over cells of a bump's square is pi sigma^2, but for what the window cuts off.
        assert task.loss(empty, truth).sub(1).abs().max() < 2e-3

    def test_is_the_published_mean_of_squares_in_another_unit(self):
        task, truth = Landmarks(LAYOUT), targets()
        maps = torch.rand(3, 5, 16, 16, dtype=torch.float64)
        published = (maps - perfect(truth)).square().mean(dim=(1, 2, 3))
        expected = published * 256 / (math.pi * 1.5**2)
        torch.testing.assert_close(task.loss(maps, truth), expected, rtol=1e-12, atol=0)

    def test_a_point_outside_the_map_is_taught_as_an_empty_map(self):
        task, truth = Landmarks(LAYOUT), targets(1)
        truth[0, 2, 2] = 0
        maps = perfect(truth)
        assert maps[0, 2].abs().max() == 0
        assert task.loss(maps, truth).item() < 1e-12

    def test_criterion_has_the_rows_of_the_experts(self):
        criterion = Landmarks(LAYOUT).criterion(0.5, router_supervision=0.1, router_temperature=2.0)
        assert isinstance(criterion, HubPathwayLoss)
        assert not criterion.can_fuse
        assert (criterion.explore, criterion.router_temperature) == (0.5, 2.0)

    def test_distance_is_in_the_units_of_the_loss(self):
        task, truth = Landmarks(LAYOUT), targets()
        student = torch.rand(3, 5, 16, 16, dtype=torch.float64)
        found = task.distance(student, perfect(truth))
        torch.testing.assert_close(found, task.loss(student, truth).float().double(), rtol=1e-6,
                                   atol=0, check_dtype=False)  # fmt: skip


class TestPredictions:
    def test_points_and_their_confidence(self):
        task, truth = Landmarks(LAYOUT), targets()
        found = task.predict(0.5 * perfect(truth))
        assert found.dtype == torch.float32
        assert found.shape == (3, 5, 3)
        assert (found[..., :2] - truth[..., :2]).abs().max() <= 0.25 + 1e-5
        assert found[..., 2].max() <= 0.5

    def test_scores_are_over_the_unit_of_each_face(self):
        task, truth = Landmarks(LAYOUT), targets(2)
        truth[1, :, 3] = 4.0
        moved = truth[..., :3].clone()
        moved[..., 0] += 1.0
        assert task.scores(moved, truth).tolist() == pytest.approx([1 / 8, 1 / 4])

    def test_results_of_stored_points(self):
        task, truth = Landmarks(LAYOUT), targets(2)
        truth[1, :, 3] = 4.0
        moved = truth[..., :3].clone()
        moved[0, :, 0] += 0.4
        moved[1, :, 0] += 1.0
        found = task.results(moved, truth)
        errors = 0.05, 0.25
        assert found["nme"] == pytest.approx(0.15)
        assert found["fr_10"] == 0.5
        assert found["auc_10"] == pytest.approx(0.25)
        assert found["loss"] == pytest.approx(sum(e * e for e in errors) / 2, rel=1e-5)

    def test_meter_adds_up_over_batches(self):
        task, truth = Landmarks(LAYOUT), targets(4)
        maps = perfect(truth)
        maps[3] = 0.01
        meter = task.meter(torch.device("cpu"))
        meter.add(maps[:3], truth[:3])
        meter.add(maps[3:], truth[3:])
        found = meter.result()
        errors = task.scores(task.predict(maps), truth)
        assert found["n"] == 4
        assert found["empty"] == 0.25
        assert found["nme"] == pytest.approx(errors.mean().item())
        assert found["loss"] == pytest.approx(task.loss(maps, truth).mean().item())

    def test_meter_without_a_face(self):
        with pytest.raises(ValueError, match="at least one face"):
            Landmarks(LAYOUT).meter(torch.device("cpu")).result()

    def test_networks_that_answer_with_zeros_are_remarked_on(self):
        task = Landmarks(LAYOUT)
        [remark] = task.remarks({"empty": 0.9})
        assert remark.startswith("90% of the maps have no value of 0.1")
        assert task.remarks({"empty": 0.2}) == []

    def test_models_say_together_the_mean_of_their_maps(self):
        maps = torch.rand(2, 3, 5, 16, 16)
        assert torch.equal(Landmarks(LAYOUT).ensemble(maps), maps.mean(0))


class TestSettings:
    def test_published_sets_keep_their_units(self):
        layout = layout_for("wflw", (), LandmarkSettings())
        assert layout is LAYOUTS["wflw"]
        assert layout.unit == "ocular"
        assert layout_for("wflw", (), LandmarkSettings(unit="pupil")).unit == "pupil"

    def test_own_landmarks(self):
        names = ("eye_l", "eye_r", "nose")
        layout = layout_for("folder", names, LandmarkSettings())
        assert (layout.names, layout.flip, layout.unit) == (names, None, "diagonal")
        layout = layout_for("folder", names, LandmarkSettings(flip_pairs="0-1", unit="0-1"))
        assert (layout.flip, layout.unit) == ((1, 0, 2), "0-1")

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"flip_pairs": "0-9"}, "pairs: expected landmarks 0..2, got 0-9"),
            ({"unit": "0-7"}, "unit: expected two of the landmarks 0..2"),
            ({"unit": "ocular"}, 'unit: folder has "diagonal" and "I-J"'),
        ],
    )
    def test_what_is_not_there_is_refused(self, values, message):
        with pytest.raises(ValueError, match=message):
            layout_for("folder", ("a", "b", "c"), LandmarkSettings(**values))

    def test_pairs_of_a_published_set_are_its_own(self):
        with pytest.raises(ValueError, match="flip_pairs: wflw has its own"):
            layout_for("wflw", (), LandmarkSettings(flip_pairs="0-1"))

    @pytest.mark.parametrize("text", ["0", "0-", "a-b", "0-1;2-3", ""])
    def test_pairs_that_are_none(self, text):
        with pytest.raises(ValueError, match="flip_pairs: expected pairs of landmarks such as"):
            read_pairs(text)

    @pytest.mark.parametrize("unit", ["eyes", "3", "1-2-3"])
    def test_units_that_are_none(self, unit):
        with pytest.raises(ValueError, match="unit: expected one of ocular, pupil, diagonal"):
            LandmarkSettings(unit=unit)


def test_what_errors_are_shares_of_in_words():
    assert Landmarks(LAYOUTS["wflw"]).measured == "of the inter-ocular distance"
    assert Landmarks(LAYOUTS["wflw"], unit="3-7").measured == "of the distance of landmarks 3-7"
    own = LandmarkLayout("own", 2, unit="diagonal")
    assert Landmarks(own).measured == "of the diagonal of the points' box"
    assert Landmarks(DIGITS_LAYOUT).measured == "of the diagonal of the ink's box"
