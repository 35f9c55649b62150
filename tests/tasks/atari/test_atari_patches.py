"""Frames as patches: each pixel has its place, in torch and numpy alike."""

import numpy as np
import pytest
import torch

from hubpath_fast.tasks.atari import FramePatches

FRAMES = [
    ((84, 84), (5, 5), (225, 25)),  # Atari's: 3 x 3 blocks, nine rows and columns unseen
    ((10, 10), (2, 5), (25, 4)),  # one block, nothing left over
    ((13, 20), (3, 2), (24, 9)),  # not square, 2 x 3 blocks
    ((6, 4), (1, 2), (24, 1)),  # cells of a single pixel
]


@pytest.mark.parametrize(("frame_shape", "patches", "shape"), FRAMES)
def test_a_pixel_is_at_block_cell_and_place(frame_shape, patches, shape):
    layout, (p, q) = FramePatches(frame_shape, patches), patches
    assert layout.shape == shape
    frame = torch.randint(0, 256, frame_shape, dtype=torch.uint8)
    packed = layout.pack(frame)
    blocks = [side // (p * q) for side in frame_shape]
    expected = torch.zeros(shape, dtype=torch.uint8)
    for y in range(blocks[0] * p * q):
        for x in range(blocks[1] * p * q):
            block = (y // (p * q)) * blocks[1] + x // (p * q)
            cell = (y // p % q) * q + x // p % q
            expected[block * q * q + cell, (y % p) * p + x % p] = frame[y, x]
    assert torch.equal(packed, expected)


@pytest.mark.parametrize(("frame_shape", "patches", "shape"), FRAMES)
def test_unpacking_gives_what_was_seen_and_zeros(frame_shape, patches, shape):
    layout = FramePatches(frame_shape, patches)
    frames = torch.randint(1, 256, (2, 3, *frame_shape), dtype=torch.uint8)
    back = layout.unpack(layout.pack(frames))
    height, width = layout.kept
    expected = torch.zeros_like(frames)
    expected[..., :height, :width] = frames[..., :height, :width]
    assert torch.equal(back, expected)
    assert frame_shape != (84, 84) or layout.kept == (75, 75)


def test_numpy_and_torch_agree_and_the_result_is_a_copy():
    layout = FramePatches()
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 84, 84), dtype=np.uint8)
    packed = layout.pack(frames)
    assert isinstance(packed, np.ndarray)
    assert packed.dtype == np.uint8
    assert packed.flags["C_CONTIGUOUS"]
    assert not np.shares_memory(packed, frames)
    assert torch.equal(layout.pack(torch.from_numpy(frames)), torch.from_numpy(packed))
    unpacked = layout.unpack(packed)
    assert isinstance(unpacked, np.ndarray)
    assert unpacked.dtype == np.uint8
    assert torch.equal(layout.unpack(torch.from_numpy(packed)), torch.from_numpy(unpacked))


def test_one_cell_a_frame_is_still_a_copy():
    """Where nothing changes places, a view of the frame would change with the emulator's screen."""
    layout, frame = FramePatches((1, 3), (1, 1)), np.ones((1, 3), np.uint8)
    packed = layout.pack(frame)
    frame[:] = 0
    assert packed.tolist() == [[1], [1], [1]]
    tensor = torch.ones(1, 3)
    packed = layout.pack(tensor)
    tensor.zero_()
    assert packed.tolist() == [[1], [1], [1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((84, 84, 1), (5, 5)), "frame_shape: expected 2 integers of at least 1"),
        (((84, 84), (5, 0)), "patches: expected 2 integers of at least 1"),
        (((84, 84), "55"), "patches: expected 2 integers"),
        (((84, 84), (5.0, 5)), "patches: expected 2 integers"),
        (((84, 24), (5, 5)), "expected at least 25 x 25 pixels.*got 84 x 24"),
        (((25, 25), (5, 5)), "could not be told apart"),
    ],
)
def test_impossible_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        FramePatches(*arguments)


@pytest.mark.parametrize("frames", [torch.zeros(84, 83), np.zeros(84), [[0]], None])
def test_frames_of_another_shape_are_refused(frames):
    with pytest.raises(ValueError, match=r"frames: expected \[\.\.\., 84, 84\]"):
        FramePatches().pack(frames)
    with pytest.raises(ValueError, match=r"packed: expected \[\.\.\., 225, 25\]"):
        FramePatches().unpack(frames)
