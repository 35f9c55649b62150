"""Routes of evaluations: against a plain computation, in log and TensorBoard, and their warning."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from support.host_reads import host_reads
from support.training import FEATURES, TASK, VALIDATION, Stream, make
from torch import nn

from hubpath_fast.model import HubPathway
from hubpath_fast.tasks import Classification
from hubpath_fast.training import PathwayObjective, Reporting, RoutingCollapseWarning, evaluate
from hubpath_fast.training.collapse import CollapseWatch
from hubpath_fast.training.routes import RouteMeter, entropy_fraction, route_statistics

M, C = 3, 3
NAMES = ["a", "b", "c"]


class ByFirst(nn.Module):
    """Scores by the sign of the first feature: (0, 2) where it is positive, else (0, 1). Noise that
    spreads what is trained over all experts."""

    def __init__(self, noise=5.0):
        super().__init__()
        self.noise = nn.Parameter(torch.tensor(noise))

    def forward(self, x):
        up = torch.tensor([3.0, 0.0, 2.0])
        down = torch.tensor([3.0, 2.0, 0.0])
        clean = torch.where(x[:, :1] > 0, up, down)
        return clean, self.noise.expand(len(x), M)


class Always(ByFirst):
    """The same with one route, but for a sample in ``rest``."""

    def __init__(self, rest=None):
        super().__init__()
        self.rest = rest

    def forward(self, x):
        clean = torch.tensor([3.0, 2.0, 0.0]).repeat(len(x), 1)
        if self.rest:
            clean[:: self.rest] = torch.tensor([3.0, 0.0, 2.0])
        return clean, self.noise.expand(len(x), M)


def model(generator, k=2):
    torch.manual_seed(0)
    experts = [nn.Linear(FEATURES, C) for _ in range(M)]
    return HubPathway(experts, generator, k=k, num_outputs=C)


def plain_information(a, b):
    """The definition, pair by pair."""
    total = 0.0
    for x in set(a):
        for y in set(b):
            both = sum(i == x and j == y for i, j in zip(a, b, strict=True)) / len(a)
            if both:
                total += both * math.log(both / (a.count(x) / len(a) * b.count(y) / len(b)))
    return total


def test_routes_of_a_hand_made_router():
    found = evaluate(model(ByFirst()), VALIDATION, TASK)["routes"]
    x, y = (torch.cat(parts) for parts in zip(*VALIDATION, strict=True))
    up = (x[:, 0] > 0).tolist()
    part = sum(up) / len(up)
    assert 0 < part < 1
    assert found["share"] == pytest.approx([1.0, 1 - part, part])
    assert found["sets"] == 2
    assert found["mutual_information"] == pytest.approx(plain_information(up, y.tolist()))
    assert found["mutual_information"] > 0.05  # the class is the largest of three features
    p = torch.softmax(torch.tensor([[3.0, 0, 2], [3, 2, 0]]).double(), 1)
    mean = part * p[0] + (1 - part) * p[1]
    entropy = -(mean * mean.log()).sum().item() / math.log(M)
    assert found["entropy_fraction"] == pytest.approx(entropy, rel=1e-6)  # p is float32
    assert found["weight"] == pytest.approx(mean.tolist(), rel=1e-6)
    own = {c: [u for u, label in zip(up, y.tolist(), strict=True) if label == c] for c in range(C)}
    parts = {str(c): sum(ups) / len(ups) for c, ups in own.items() if ups}
    assert set(found["class_share"]) == set(parts)
    for group, up_part in parts.items():
        assert found["class_share"][group] == pytest.approx([1.0, 1 - up_part, up_part])


def test_predictions_are_to_the_bit_what_the_model_says():
    routed = model(ByFirst()).train()
    seen = []

    class Watching(Classification):
        def meter(self, device):
            meter = super().meter(device)
            add = meter.add
            meter.add = lambda outputs, targets: (seen.append(outputs), add(outputs, targets))
            return meter

    evaluate(routed, VALIDATION, Watching(TASK.classes))
    assert routed.training
    routed.eval()
    with torch.no_grad():
        for (x, _), outputs in zip(VALIDATION, seen, strict=True):
            assert torch.equal(outputs, routed(x))


def test_one_tensor_is_read_an_evaluation():
    routed, meter = model(ByFirst()).eval(), RouteMeter()
    with host_reads() as reads:
        for x, y in VALIDATION:
            meter.add(routed.route(x), y)
    assert reads == []
    with host_reads() as reads:
        meter.result()
    assert reads == ["cpu", "numpy"]  # the second of what the first one read


def test_targets_that_are_no_classes_have_no_mutual_information():
    class Distance(Classification):
        def meter(self, device):
            class Meter:
                def add(self, outputs, targets): ...

                def result(self):
                    return {"accuracy": 0.0, "n": 8}

            return Meter()

    batches = [(x, torch.rand(len(x), 2)) for x, _ in VALIDATION]
    found = evaluate(model(ByFirst()), batches, Distance(TASK.classes))["routes"]
    assert set(found) == {"share", "sets", "weight", "entropy_fraction"}


def test_mutual_information_against_the_definition():
    generator = np.random.default_rng(0)
    asked = generator.random((200, 4)) < 0.5
    groups = generator.integers(3, size=200) * 7 - 7
    names = [str(row) for row in asked.tolist()]
    found = route_statistics(asked, groups)
    assert found["sets"] == len(set(names))
    expected = plain_information(names, groups.tolist())
    assert found["mutual_information"] == pytest.approx(expected, rel=1e-12)
    # A route that is the group says all of it; one route says nothing.
    same = np.eye(3, dtype=bool)[groups // 7 + 1]
    counts = np.unique(groups, return_counts=True)[1] / 200
    entropy = -(counts * np.log(counts)).sum()
    assert route_statistics(same, groups)["mutual_information"] == pytest.approx(entropy)
    one = route_statistics(np.ones((200, 2), bool), groups)
    assert (one["sets"], one["mutual_information"]) == (1, 0.0)
    assert "mutual_information" not in route_statistics(asked)


def test_entropy_of_weights_with_any_sum():
    assert entropy_fraction(np.array([0.3, 0.3, 0.0, 0.0])) == pytest.approx(0.5)
    assert entropy_fraction(np.array([0.2])) == 1.0


def routes(share, **others):
    return {"share": share, "sets": 2, "entropy_fraction": 0.9, **others}


def test_one_route_for_all_is_warned_about_in_the_second_evaluation_in_a_row_and_once():
    watch = CollapseWatch(0.1, NAMES)
    settled, spread = routes([1.0, 0.96, 0.04]), routes([1.0, 0.94, 0.06])
    assert watch.update_routes(settled, ends=False) == []
    assert watch.update_routes(spread, ends=False) == []  # it was no more than a beginning
    assert watch.update_routes(settled, ends=False) == []
    again = CollapseWatch(0.1, NAMES)
    again.load_state_dict(watch.state_dict())
    (text,) = again.update_routes(settled, ends=False)
    assert "expert 0 (a) and expert 1 (b) are asked about at least 96.0% of the samples" in text
    assert "load and entropy in the log do not show it" in text
    assert again.update_routes(settled, ends=True) == []
    (ended,) = CollapseWatch(0.1, NAMES).update_routes(settled, ends=True)
    assert ended == text
    older = {"intervals": [], "missed": [], "told": []}
    watch.load_state_dict(older)
    assert watch.settled == 0


def test_all_experts_for_all_is_no_collapse():
    assert CollapseWatch(0.1).update_routes(routes([1.0, 1.0]), ends=True) == []
    (text,) = CollapseWatch(0.1).update_routes(routes([0.01, 0.99]), ends=True)
    assert "expert 1 is asked about at least 99.0% of the samples, though any 1 of 2" in text


def train(generator, out_dir, **options):
    return make(
        model(generator), out_dir, Stream(), PathwayObjective(TASK.criterion(0.5)), steps=6,
        log_every=2, eval_every=2, lr_router=0.0, validation=VALIDATION, **options,
    )  # fmt: skip


def test_a_run_whose_noise_hides_one_route_warns_once_and_logs_it(tmp_path):
    with pytest.warns(RoutingCollapseWarning, match="are asked about all the samples") as caught:
        history = train(Always(), tmp_path).fit().history
    assert len(caught) == 1
    assert ["warnings" in record for record in history] == [False, True, False]
    for record in history:
        assert record["routes"]["share"] == [1.0, 1.0, 0.0]
        assert (record["routes"]["sets"], record["routes"]["mutual_information"]) == (1, 0.0)
        assert min(record["load"]) > 0.1  # what the log has shown so far
        assert "routes" not in record["validation"]


@pytest.mark.parametrize("generator", [ByFirst(), Always(rest=4)])
def test_a_run_with_two_routes_does_not_warn(tmp_path, generator):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RoutingCollapseWarning)
        history = train(generator, tmp_path).fit().history
    assert history[-1]["routes"]["sets"] == 2


def test_tensorboard_has_them_by_the_experts_names(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporting = Reporting(expert_names=NAMES, progress=False)
    history = train(ByFirst(), tmp_path, reporting=reporting).fit().history
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [e.value for e in events.Scalars("routes/share/c")]
    assert found == pytest.approx([r["routes"]["share"][2] for r in history])
    for tag in ("routes/sets", "routes/mutual_information", "routes/entropy_fraction"):
        assert [e.step for e in events.Scalars(tag)] == [2, 4, 6]
