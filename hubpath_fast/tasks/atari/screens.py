"""From two screens of the emulator to the small frame that policies see.

The frame is the maximum of the two (sprites that flicker are drawn in every other screen), made
smaller by averaging areas. It equals OpenCV's ``INTER_AREA`` to the bit, without that dependency.
Of frames of the paper's games one pixel in a hundred is within 1e-4 of a half, and exact averages
round one in three hundred otherwise. So the sums are made as OpenCV makes them: in float32, along a
row from left to right, then down the rows, each product rounded before it is added, and halves
rounded to even.
"""

from __future__ import annotations

import functools
import math

import numpy as np

LEAST_SHARE = 1e-3  # OpenCV leaves out the part of a pixel below this


def preprocess_frames(first: np.ndarray, second: np.ndarray, size: int = 84) -> np.ndarray:
    """The frame of two consecutive grey screens.

    Args:
        first, second: uint8 [h, w], both at least ``size``, such as 210 x 160.

    Returns:
        uint8 [size, size].
    """
    for name, screen in (("first", first), ("second", second)):
        if not isinstance(screen, np.ndarray) or screen.dtype != np.uint8 or screen.ndim != 2:
            raise ValueError(
                f"{name}: expected a grey screen, a numpy array uint8 [h, w], got {_kind(screen)}"
            )
    if first.shape != second.shape:
        raise ValueError(
            f"second: expected the shape of first, {first.shape}, got {second.shape}; the two are "
            "consecutive screens of one game"
        )
    return shrink(np.maximum(first, second), size)


def shrink(screen: np.ndarray, size: int = 84) -> np.ndarray:
    """A grey screen, uint8 [h, w], averaged over areas: uint8 [size, size]."""
    height, width = screen.shape
    if isinstance(size, bool) or not isinstance(size, int) or not 1 <= size <= min(screen.shape):
        raise ValueError(
            f"size: expected an integer in 1..{min(screen.shape)}, the screen's shorter side, "
            f"got {size!r}"
        )
    # Columns of the screen as rows: a share then multiplies a row of its own, and to take
    # some of them copies whole rows.
    columns = screen.T.astype(np.float32)
    rows = _weighted(columns, *_taps(width, size))
    return np.rint(_weighted(rows.T, *_taps(height, size))).astype(np.uint8)


def _weighted(lines: np.ndarray, taken: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[size, n]: of lines [m, n] the sum over t of ``lines[taken[t]] * shares[t]``, in order."""
    total = lines[taken[0]] * shares[0]
    for line, share in zip(taken[1:], shares[1:], strict=True):
        part = lines[line]
        part *= share
        total += part
    return total


@functools.lru_cache(maxsize=8)
def _taps(length: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of ``length`` lines make each of ``size``, and their shares.

    Returns:
        (taken int64 [taps, size], shares float32 [taps, size, 1]); unused taps have the share 0.
    """
    scale = 1 / (size / length)  # this quotient of a quotient is OpenCV's, in float64
    made = []
    for line in range(size):
        start = line * scale
        end = start + scale
        whole = min(scale, length - start)
        last = min(math.floor(end), length - 1)
        inner = min(math.ceil(start), last)
        taps = [(inner - 1, (inner - start) / whole)] if inner - start > LEAST_SHARE else []
        taps += [(place, 1 / whole) for place in range(inner, last)]
        if end - last > LEAST_SHARE:
            taps.append((last, min(end - last, 1.0, whole) / whole))
        made.append(taps)
    most = max(len(taps) for taps in made)
    padded = np.array([taps + [(0, 0.0)] * (most - len(taps)) for taps in made]).transpose(2, 1, 0)
    return padded[0].astype(np.int64), padded[1].astype(np.float32)[:, :, None]


def _kind(screen: object) -> str:
    if isinstance(screen, np.ndarray):
        return f"{screen.dtype} {list(screen.shape)}"
    return type(screen).__name__
