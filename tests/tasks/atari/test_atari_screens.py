"""The small frame of two screens: OpenCV's, to the bit."""

import re
import zlib

import numpy as np
import pytest

from hubpath_fast.tasks.atari import preprocess_frames


def screens(height: int, width: int, levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Two screens of so many shades of grey: few make many exact halves."""
    random = np.random.default_rng(seed)
    shades = np.linspace(0, 255, levels).astype(np.uint8)
    first, second = shades[random.integers(0, levels, (2, height, width))]
    return first, second


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [
        (210, 160, 84),  # the emulator's, at 60 Hz
        (250, 160, 84),  # and of games for 50 Hz
        (210, 160, 50),  # whole shares down, 3.2 pixels across
        (97, 131, 60),  # no common divisors
    ],
)
def test_equals_opencv(height, width, size):
    cv2 = pytest.importorskip("cv2", reason="OpenCV is what it must equal")
    for seed in range(60):
        first, second = screens(height, width, (2, 3, 7, 256)[seed % 4], seed)
        both, to = np.maximum(first, second), (size, size)
        truth = cv2.resize(both, to, interpolation=cv2.INTER_AREA)
        assert np.array_equal(preprocess_frames(first, second, size), truth), seed


def test_values():
    """Without OpenCV: areas by hand, and a frame that OpenCV was seen to make."""
    first = np.zeros((210, 160), np.uint8)
    first[:5, :40] = 200  # 2 rows of frames by 21 columns
    second = np.zeros_like(first)
    second[2, 0] = 255  # half of it above the border between the first two rows
    frame = preprocess_frames(first, second)
    assert frame.dtype == np.uint8
    assert frame.shape == (84, 84)
    share = 55 * 0.5 / (2.5 * 160 / 84)  # of the brighter pixel in each of two areas
    expected = np.zeros((84, 84), np.uint8)
    expected[:2, :21] = 200
    expected[:2, 0] = round(200 + share)
    assert np.array_equal(frame, expected)
    assert zlib.crc32(preprocess_frames(*screens(210, 160, 3, 0)).tobytes()) == 1704960302


def test_inputs_stay_as_they_are():
    first, second = screens(210, 160, 256, 1)
    before = first.copy(), second.copy()
    preprocess_frames(first, second)
    assert np.array_equal(first, before[0])
    assert np.array_equal(second, before[1])


@pytest.mark.parametrize(
    ("first", "second", "size", "message"),
    [
        (
            np.zeros((210, 160, 3), np.uint8),
            None,
            84,
            "first: expected a grey screen, .* got uint8",
        ),
        (
            np.zeros((210, 160)),
            None,
            84,
            "first: expected a grey screen, .* got float64 [210, 160]",
        ),
        ([[0]], None, 84, "first: expected a grey screen, .* got list"),
        (
            None,
            np.zeros((200, 160), np.uint8),
            84,
            "second: expected the shape of first, (210, 160)",
        ),
        (None, None, 161, "size: expected an integer in 1..160"),
        (None, None, 0, "size: expected an integer in 1..160"),
        (None, None, 84.0, "size: expected an integer in 1..160"),
    ],
)
def test_wrong_screens(first, second, size, message):
    screen = np.zeros((210, 160), np.uint8)
    first, second = (screen if given is None else given for given in (first, second))
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        preprocess_frames(first, second, size)
