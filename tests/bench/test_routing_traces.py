"""Traces of routings: what is drawn, and that recorded ones come back as they were."""

import json

import numpy as np
import pytest

from bench.routing_traces import KINDS, Trace, draw


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_asks_k_distinct_experts(kind):
    trace = draw(kind, steps=30, n=20, k=3, m=5)
    counts = np.array(trace.counts)
    assert counts.shape == (30, 5)
    assert (counts.sum(1) == 60).all()
    assert counts.max() <= 20
    assert trace.samples == [20] * 30
    assert draw(kind, steps=30, n=20, k=3, m=5) == trace
    assert draw(kind, seed=1, steps=30, n=20, k=3, m=5) != trace


def test_balanced_counts_are_binomial():
    counts = np.array(draw("balanced", steps=2000).counts)
    # Of 10,000 counts the mean is within 5 standard errors of 3.39 / 100, the variance within 5 %.
    assert abs(counts.mean(0) - 19.2).max() < 5 * 3.39 / 2000**0.5
    assert abs(counts.var() / (19.2 * 0.6) - 1) < 0.05


def test_skewed_experts_stay_and_drifting_ones_move():
    def halves(kind):
        """The largest change of an expert's mean from the first half to the second, and the range
        of the means."""
        found = []
        for seed in range(20):
            counts = np.array(draw(kind, seed).counts)
            first, second = counts[:250].mean(0), counts[250:].mean(0)
            found.append((abs(first - second).max(), np.ptp(counts.mean(0))))
        return np.median(found, 0)

    moved, ranged = {}, {}
    for kind in KINDS:
        moved[kind], ranged[kind] = halves(kind)
    assert max(moved["balanced"], moved["skewed"]) < 1 < 3 < moved["drifting"]
    assert moved["skewed and drifting"] > 3
    assert ranged["balanced"] < 1 < 10 < ranged["skewed"]


def test_the_first_expert_of_a_sample_is_drawn_by_softmax():
    counts = np.array(draw("skewed", steps=3000, n=10, k=1).counts)
    popularity = np.random.default_rng(0).normal(0, 1, 5)
    expected = np.exp(popularity) / np.exp(popularity).sum()
    assert abs(counts.mean(0) / 10 - expected).max() < 5 * 0.5 / 30_000**0.5


def test_more_experts_than_there_are_cannot_be_asked():
    with pytest.raises(ValueError, match=r"k: expected an integer in 1\.\.5, got 6"):
        draw("balanced", k=6)


def test_a_trace_comes_back_from_its_file(tmp_path):
    trace = draw("skewed and drifting", steps=7)
    trace.save(tmp_path / "trace.json")
    assert Trace.load(tmp_path / "trace.json") == trace


@pytest.mark.parametrize(
    "content",
    [
        "no json",
        "[]",
        json.dumps({"name": "x", "samples": [2], "counts": [[1, 3]]}),
        json.dumps({"name": "x", "samples": [2, 2], "counts": [[1, 1]]}),
        json.dumps({"name": "x", "samples": [2, 2], "counts": [[1, 1], [2]]}),
        json.dumps({"name": "x", "samples": [], "counts": []}),
    ],
)
def test_what_is_no_trace_is_refused_by_name(tmp_path, content):
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"trace\.json: "):
        Trace.load(path)
