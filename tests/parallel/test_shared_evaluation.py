"""Evaluations that ranks share: every rank finds what one process does on all samples."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.processes import connected, run_ranks
from support.records import assert_records_close
from torch import nn
from torch.utils.data import Dataset

from hubpath_fast.data import EvalBatches, SummedCrops, TensorBatches, TensorSet
from hubpath_fast.data.order import shared_batches
from hubpath_fast.model import HubPathway
from hubpath_fast.parallel import Ranks, Share
from hubpath_fast.parallel.samples import gather_batches
from hubpath_fast.runs.pays import Asked, does_routing_pay, random_weights
from hubpath_fast.tasks import Classification
from hubpath_fast.tasks.landmarks import LandmarkLayout, gaussian_targets
from hubpath_fast.tasks.landmarks.task import Landmarks
from hubpath_fast.training import evaluate
from hubpath_fast.training.routes import RouteMeter

M, C, SIZE = 4, 3, 8
TASK = Classification(("x", "y", "z"))
SPLITS = (26, 25, 1)  # of the last batch some ranks have nothing; of one sample, all but one
DROPS = 7 * M * C * 8  # bytes of a rank's answers: ranks 1 and 2 keep more, and rank 0 does not
NAMES = ["a", "b", "c", "d"]


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(48, 2 * M)

    def forward(self, x):
        return self.score(x.flatten(1)).chunk(2, dim=1)


def build():
    torch.manual_seed(3)
    experts = [
        nn.Sequential(nn.Flatten(), nn.Linear(48, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, C))
        for _ in range(M)
    ]
    mean = torch.rand(M, 3)
    model = HubPathway(experts, Router(), k=2, normalization=(mean, mean + 0.5)).double()
    nn.init.normal_(model.aggregator.weight, std=0.5)
    return model


def data(n):
    draw = torch.Generator().manual_seed(n)
    images = torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=draw)
    return TensorSet(images, torch.randint(0, C, (n,), generator=draw), TASK.classes)


class TwoCrops(Dataset):
    """Items (uint8 [2, 3, 4, 4], class)."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        image = self.split.images[index]
        return torch.stack([image, image.flip(2)]), int(self.split.targets[index])


def findings(model, ranks):
    def batches(n):
        return TensorBatches(data(n), SIZE, share=ranks.share())

    crops = EvalBatches(TwoCrops(data(26)), SIZE, share=ranks.share())
    asked = Asked(model, TASK, batches(26), "cpu", "none", DROPS, ranks)
    return {
        "evaluations": [evaluate(model, batches(n), TASK, ranks=ranks) for n in SPLITS],
        "crops": evaluate(SummedCrops(model), crops, TASK, ranks=ranks),
        "pays": does_routing_pay(model, TASK, batches(26), NAMES, seed=3, ranks=ranks),
        "asked again": (asked.parts is None, asked.scores(random_weights(26, M, 2, 1.0, 5))),
        "order": gather_batches([t.tolist() for _, t in batches(26)], ranks),
    }


def rank_main(rank, layouts):
    found = {}
    for layout in layouts:
        ranks = connected(layout)
        found[layout] = findings(build().distribute(ranks), ranks)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return run_ranks(rank_main, 3, tmp_path_factory.mktemp("ranks"), ["ep", "dp"])


@pytest.fixture(scope="module")
def expected():
    return findings(build(), Ranks())


# Equal but for the order of sums: float64 of at most 26 samples, and values of about 1.
@pytest.mark.parametrize("layout", ["ep", "dp"])
@pytest.mark.parametrize("what", ["evaluations", "crops", "pays"])
def test_every_rank_finds_what_one_process_does(found, expected, what, layout):
    for each in found:
        assert_records_close(each[layout][what], expected[what], 1e-12)
        assert each[layout][what] == found[0][layout][what]
    assert [each["n"] for each in expected["evaluations"]] == list(SPLITS)


def test_experts_are_asked_again_by_all_where_one_rank_cannot_keep_answers(found, expected):
    dropped, scores = expected["asked again"]
    assert dropped
    for each in found:
        assert each["ep"]["asked again"][0]
        np.testing.assert_array_equal(each["ep"]["asked again"][1], scores)


def test_what_ranks_know_of_samples_is_brought_into_their_order(found):
    for each in found:
        in_order = [target for part in each["ep"]["order"] for target in part]
        assert in_order == data(26).targets.tolist()
        assert [len(part) for part in each["ep"]["order"]][:3] == [2, 3, 3]


def merged(make, outputs, targets, ranks):
    """A meter of all samples, from those of so many ranks. make: -> (meter, its add)."""
    meters = []
    for rank in range(ranks):
        meter, add = make()
        for loaded, counted in shared_batches(len(targets), SIZE, Share(rank, ranks)):
            own = list(loaded)[:counted]
            if own:
                add(outputs[own], targets[own])
        meters.append(meter.cpu())
    for other in meters[1:]:
        meters[0].merge(other)
    return meters[0].result()


def of_classes():
    meter = TASK.meter(torch.device("cpu"))
    return meter, meter.add


LANDMARKS = Landmarks(LandmarkLayout("five", 5))


def of_landmarks():
    meter = LANDMARKS.meter(torch.device("cpu"))
    return meter, meter.add


def of_routes():
    meter, model = RouteMeter(), build().eval()
    return meter, lambda images, targets: meter.add(model.route(images), targets)


@pytest.mark.parametrize("n", [1, 19, 26])
@pytest.mark.parametrize("ranks", [2, 3, 4])
class TestMergedMeters:
    def test_of_classes(self, n, ranks):
        draw = torch.Generator().manual_seed(1)
        logits = torch.randn(n, C, generator=draw, dtype=torch.float64)
        # Skewed, so that the balanced accuracy is there too, and some not to be counted.
        targets = torch.where(torch.arange(n) % 7 > 0, 0, torch.arange(n) % 3)
        found, expected = (merged(of_classes, logits, targets, r) for r in (ranks, 1))
        assert ("balanced_accuracy" in expected) == (n > 1)
        assert_records_close(found, expected, 1e-12)

    def test_of_landmarks(self, n, ranks):
        draw = torch.Generator().manual_seed(1)
        points = 2 + 12 * torch.rand(n, 5, 2, generator=draw)
        targets = torch.cat([points, torch.tensor([1.0, 8.0]).expand(n, 5, 2)], dim=2)
        maps = gaussian_targets(targets[..., :3].double(), 16, 1.5, "subpixel")
        maps = maps + 0.3 * torch.randn(maps.shape, generator=draw)
        found, expected = (merged(of_landmarks, maps, targets, r) for r in (ranks, 1))
        assert_records_close(found, expected, 1e-12)

    @pytest.mark.parametrize("classes", [True, False])
    def test_of_routes(self, n, ranks, classes):
        split = data(n)
        targets = split.targets if classes else torch.rand(n, 2)
        found, expected = (merged(of_routes, split.images, targets, r) for r in (ranks, 1))
        assert ("class_share" in expected) == classes
        assert_records_close(found, expected, 1e-12)


@pytest.mark.parametrize("make", [of_classes, of_landmarks, of_routes])
def test_meters_of_no_sample_stay_empty(make):
    (first, _), (second, _) = make(), make()
    first.merge(second.cpu())
    with pytest.raises(ValueError, match="at least one"):
        first.cpu().result()
