"""The digits: pixel facts of the renderings, disjoint splits, the folder that is written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from hubpath_fast.data import RENDERINGS, DigitsTask, write_image_folder


@pytest.fixture(scope="module")
def task():
    return DigitsTask(seed=0)


@pytest.fixture(scope="module")
def drawn(task):
    """The 797 test digits in each rendering: int64 [797, 32, 32]."""
    return {name: task.rendered("test", name).images[:, 0].long() for name in RENDERINGS}


def test_shapes_and_sizes(task):
    assert [len(task.target), len(task.test), len(task.validation)] == [300, 797, 0]
    for data in (task.target, task.test, task.pretrain("edges")):
        assert data.images.shape == (len(data), 3, 32, 32)
        assert (data.images == data.images[:, :1]).all()  # three equal channels
        assert data.num_classes == 10
    assert len(task.pretrain("edges")) == 700


def test_upright_is_the_scan_enlarged_inside_a_margin(drawn):
    image = drawn["upright"]
    border = torch.ones(32, 32, dtype=torch.bool)
    border[2:-2, 2:-2] = False
    assert (image[:, border] == 0).all()
    assert (image.amax((1, 2)) > 200).all()


def test_renderings_follow_from_upright(drawn):
    upright = drawn["upright"]
    assert torch.equal(drawn["inverted"], 255 - upright)
    assert torch.equal(drawn["turned"], upright.rot90(1, (1, 2)))
    assert torch.equal(drawn["turned"].rot90(-1, (1, 2)), upright)


def test_edges_are_dark_where_upright_is_flat(drawn):
    upright, edges = drawn["upright"], drawn["edges"]
    inner = upright[:, 1:-1, 1:-1]
    flat = torch.ones_like(inner, dtype=torch.bool)
    for move in ((0, 1), (2, 1), (1, 0), (1, 2)):
        flat &= upright[:, move[0] : move[0] + 30, move[1] : move[1] + 30] == inner
    assert flat.any()
    assert (edges[:, 1:-1, 1:-1][flat] == 0).all()
    assert (edges.amax((1, 2)) == 255).all()
    # One pixel by hand: 4 * hypot(half the difference across rows, half across columns).
    r, c = 9, 14
    down = (upright[0, r + 1, c] - upright[0, r - 1, c]) / 2
    right = (upright[0, r, c + 1] - upright[0, r, c - 1]) / 2
    assert edges[0, r, c] == min(255, round(4 * np.hypot(float(down), float(right))))


def test_checkerboard_shows_through_by_the_strokes_opacity(drawn):
    upright, board = drawn["upright"], drawn["checkerboard"]
    cell = torch.arange(32) // 4
    bright = (cell[:, None] + cell) % 2 == 1
    assert (board[:, bright][upright[:, bright] == 0] == 160).all()
    assert torch.equal(board[:, ~bright], upright[:, ~bright])
    assert (board[upright == 255] == 255).all()
    assert (board >= upright).all()


def test_no_digit_is_in_two_parts(task):
    held = DigitsTask(seed=0, num_validation=100)
    upright = [
        held.rendered(part, "upright") for part in ("pretrain", "target", "validation", "test")
    ]
    assert [len(data) for data in upright] == [700, 200, 100, 797]
    # scikit-learn's own set holds no two equal scans, so equal pixels would be the same digit.
    pixels = torch.cat([data.images[:, 0].flatten(1) for data in upright])
    assert len(pixels.unique(dim=0)) == 1797


def test_holding_out_moves_nothing_else(task):
    held = DigitsTask(seed=0, num_validation=100)
    assert torch.equal(held.test.images, task.test.images)
    both = torch.cat([held.validation.images, held.target.images])
    assert torch.equal(both, task.target.images)


def test_renderings_are_mixed_evenly(task):
    assert task.target.renderings.bincount().tolist() == [60] * 5
    assert sorted(task.test.renderings.bincount().tolist()) == [159, 159, 159, 160, 160]
    for i, name in enumerate(task.test.rendering_names):
        chosen = task.test.renderings == i
        assert torch.equal(
            task.test.images[chosen], task.rendered("test", name).subset(chosen).images
        )


def test_seeds_draw_other_tasks_and_the_same_one_again(task):
    assert torch.equal(DigitsTask(seed=0).target.images, task.target.images)
    assert not torch.equal(DigitsTask(seed=1).target.images, task.target.images)


def test_the_folder_holds_the_tasks_pixels(tmp_path):
    task = DigitsTask(seed=3, num_validation=60)
    root = write_image_folder(task, tmp_path / "digits", limit=30)
    for split, data in (("train", task.target), ("val", task.validation), ("test", task.test)):
        files = sorted((root / split).glob("*/*.png"), key=lambda path: path.name)
        assert len(files) == 30
        for i, path in enumerate(files):
            assert path.parent.name == data.classes[data.targets[i]]
            assert path.stem == f"{i:04d}_{data.rendering_names[data.renderings[i]]}"
            assert np.array_equal(np.asarray(Image.open(path)), data.images[i, 0].numpy())
    whole = write_image_folder(DigitsTask(), tmp_path / "whole", limit=3)
    assert sorted(path.name for path in whole.iterdir()) == ["test", "train"]  # nothing held out


def test_bad_arguments(task):
    with pytest.raises(
        ValueError, match=r"num_validation: expected an integer in 0\.\.299, got 300"
    ):
        DigitsTask(num_validation=300)
    with pytest.raises(ValueError, match=r"rendering: expected one of upright, .* got 'sideways'"):
        task.pretrain("sideways")
    with pytest.raises(ValueError, match=r"part: expected one of .* got 'dev'"):
        task.rendered("dev", "upright")


def test_a_further_rendering_is_inverted_in_every_other_stripe(task, drawn):
    data = task.rendered("test", "striped")
    upright, striped = drawn["upright"], data.images[:, 0].long()
    for column in range(32):  # stripes of 2 of 32 pixels
        expected = upright[..., column] if column // 2 % 2 == 0 else 255 - upright[..., column]
        assert torch.equal(striped[..., column], expected)
    assert data.rendering_names[data.renderings[0]] == "striped"
    assert "striped" not in task.test.rendering_names
