"""Facts of the published sets, and what a layout refuses."""

import dataclasses

import pytest

from hubpath_fast.tasks.landmarks import (
    FACES,
    LAYOUTS,
    LandmarkLayout,
    find_layout,
    flip_of_pairs,
)

SINGLES = {"300w": 10, "wflw": 10, "cofw": 7}  # landmarks on the middle line


@pytest.mark.parametrize(
    ("name", "points", "pairs", "origin", "sigma", "corners"),
    [
        ("300w", 68, 29, 1, 1.0, (36, 45)),
        ("wflw", 98, 44, 0, 1.5, (60, 72)),
        ("cofw", 29, 11, 1, 1.5, (8, 9)),
    ],
)
def test_a_published_set(name, points, pairs, origin, sigma, corners):
    layout = LAYOUTS[name]
    assert (layout.name, layout.num_points, layout.origin) == (name, points, origin)
    assert (layout.sigma, layout.outer_eye_corners, layout.unit) == (sigma, corners, "ocular")
    assert sum(i != other for i, other in enumerate(layout.flip)) == 2 * pairs
    assert sum(i == other for i, other in enumerate(layout.flip)) == SINGLES[name]
    assert [layout.flip[i] for i in layout.flip] == list(range(points))  # its own inverse
    assert layout.flip[corners[0]] == corners[1]
    assert layout.names == tuple(map(str, range(points)))
    left, right = layout.pupils
    assert sorted(layout.flip[i] for i in left) == sorted(right)  # a mirror swaps the pupils


def test_pairs_of_300w_by_what_the_points_are():
    flip = LAYOUTS["300w"].flip
    assert [flip[i] for i in (0, 7, 8, 16)] == [16, 9, 8, 0]  # the jaw, 8 the chin
    assert [flip[i] for i in (27, 28, 29, 30, 33)] == [27, 28, 29, 30, 33]  # the nose's ridge
    assert [flip[i] for i in (36, 37, 38, 39, 40, 41)] == [45, 44, 43, 42, 47, 46]  # an eye
    assert [flip[i] for i in (48, 51, 57, 60, 62, 66, 67)] == [54, 51, 57, 64, 62, 66, 65]


def test_pairs_of_wflw_and_cofw_by_what_the_points_are():
    flip = LAYOUTS["wflw"].flip
    assert [flip[i] for i in (0, 15, 16, 33, 37, 38, 41)] == [32, 17, 16, 46, 42, 50, 47]
    assert [flip[i] for i in (51, 57, 60, 64, 66, 96)] == [51, 57, 72, 68, 74, 97]
    assert [flip[i] for i in (76, 79, 85, 90, 93, 94)] == [82, 79, 85, 90, 95, 94]
    flip = LAYOUTS["cofw"].flip
    assert [flip[i] for i in (0, 4, 5, 8, 12, 16, 18, 22)] == [1, 6, 7, 9, 14, 17, 19, 23]
    assert [flip[i] for i in (20, 21, 24, 25, 26, 27, 28)] == [20, 21, 24, 25, 26, 27, 28]


def test_faces_of_the_lists():
    assert FACES["300w"]["full"] == FACES["300w"]["common"] + FACES["300w"]["challenge"] == 689
    assert (FACES["300w"]["train"], FACES["300w"]["test"]) == (3148, 600)
    assert dict(FACES["wflw"]) == {
        "train": 7500,
        "full": 2500,
        "largepose": 326,
        "expression": 314,
        "illumination": 698,
        "makeup": 206,
        "occlusion": 736,
        "blur": 773,
    }
    assert dict(FACES["cofw"]) == {"train": 1345, "full": 507}


def test_a_layout_of_ones_own():
    layout = LandmarkLayout("hand", 3, flip=[0, 2, 1], names=["wrist", "thumb", "little"])
    assert (layout.flip, layout.origin, layout.unit) == ((0, 2, 1), 0, "diagonal")
    assert hash(layout) == hash(dataclasses.replace(layout))
    assert flip_of_pairs([(1, 2)], 3) == (0, 2, 1)
    assert find_layout(layout) is layout
    assert find_layout("wflw") is LAYOUTS["wflw"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_points": 0}, "num_points: expected .* >= 1, got 0"),
        ({"flip": (0, 1)}, "flip: expected 3 numbers, one a landmark, got 2"),
        ({"flip": (0, 1, 1)}, "flip: expected a permutation of 0..2"),
        ({"flip": (1, 2, 0)}, "twice changes nothing, got 0 -> 1 -> 2"),
        ({"origin": 2}, "origin: expected 0 or 1"),
        ({"sigma": 0.0}, "sigma: expected cells of the map > 0, got 0.0"),
        ({"outer_eye_corners": (0, 3)}, "outer_eye_corners: expected landmarks 0..2, got 3"),
        ({"outer_eye_corners": (1, 1)}, "outer_eye_corners: expected two landmarks"),
        ({"pupils": ((0,), (-1,))}, "pupils: expected landmarks 0..2, got -1"),
        ({"names": ("a", "b", "a")}, "names: expected 3 different names, one a landmark, got 3, 2"),
    ],
)
def test_a_layout_that_cannot_be(change, words):
    with pytest.raises(ValueError, match=words):
        LandmarkLayout(**{"name": "own", "num_points": 3, **change})


@pytest.mark.parametrize(
    ("pairs", "words"),
    [
        ([(0, 3)], "expected landmarks 0..2, got 0-3"),
        ([(0, 1), (1, 2)], "got 1 again in 1-2"),
        ([(1, 1)], "got 1 again in 1-1"),
    ],
)
def test_pairs_that_cannot_be(pairs, words):
    with pytest.raises(ValueError, match=words):
        flip_of_pairs(pairs, 3)


def test_an_unknown_set_names_the_closest():
    with pytest.raises(ValueError, match="got '300VW'; did you mean 300w\\? There are 300w, wflw"):
        find_layout("300VW")
