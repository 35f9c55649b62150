"""A GIF of a game: the screen, what the policy expects of its action, and whom a hub asked.

    screen (enlarged)        return of the chosen action: a bar an atom, a line at the mean
                             the experts' weights now
    the experts' weights, step by step, with a cursor
    ticks where there was a reward, and where a life was lost

Everything is drawn as indices of one palette for all frames: the emulator has at most 128 colours,
so the screen keeps its own, and no frame has to be searched for its colours. A step is shown for as
long as it takes at 60 frames a second.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...files import printable, replacing
from .play import Moment

VIDEO_ENDINGS = (".gif",)
MOST_FRAMES = 500
STEP_MS, END_MS = 70, 1500  # a GIF counts in hundredths of a second

WIDTH, EDGE, GAP = 720, 16, 14
SCREEN = (420, 320)  # the most that it is enlarged to, in whole numbers
GUTTER = 78  # for the words beside the timeline
AREA, STRIP = 84, 14  # heights of the weights and of a row of ticks
PANEL, ROW = 226, 20  # heights beside the screen: of the returns, and of an expert's weight now

SHADES = 16  # from the page to ink, for smooth letters
PAGE, INK, TRACK, RULE, BAR = "#ffffff", "#1f2328", "#eceff2", "#c9d1d9", "#0072B2"
GAIN, LOSS = "#009E73", "#D55E00"
EXPERTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#4d4d4d", "#F0E442")


@dataclass(frozen=True)
class Frame:
    """What is drawn of a step. returns: [Z] probabilities, or None; weights: [M], or None."""

    screen: np.ndarray
    action: int
    reward: float
    score: float
    life_lost: bool
    lives: int
    returns: np.ndarray | None
    weights: np.ndarray | None


class Video:
    """Looks on while a game is played (``on_step`` of ``play_episodes``), then draws it.

    Args:
        policy: that plays, or None for random play.
        title: of the picture.
        action_names: of the game's actions.
        experts: names of a hub's experts; numbers where there are none.
        most: steps that are kept; ``notes`` says so where a game has more.
    """

    def __init__(
        self,
        policy: Any,
        title: str,
        action_names: Sequence[str],
        experts: Sequence[str] = (),
        most: int = MOST_FRAMES,
    ):
        self.policy, self.title, self.most = policy, title, most
        self.action_names, self.experts = tuple(action_names), tuple(experts)
        self.frames: list[Frame] = []
        self._steps = self._lives = 0

    def __call__(self, moment: Moment) -> None:
        self._steps += 1
        lives = int(moment.info.get("lives", 0))
        lost = lives < self._lives
        self._lives = lives
        if len(self.frames) >= self.most:
            return
        returns = None
        if moment.logits is not None:
            returns = _numpy(moment.logits[moment.action].softmax(dim=-1))
        self.frames.append(
            Frame(
                np.array(moment.screen), moment.action, moment.reward, moment.score, lost, lives,
                returns, self._weights(moment.states),
            )
        )  # fmt: skip

    def _weights(self, states: Tensor | None) -> np.ndarray | None:
        if states is None or not hasattr(self.policy, "expert_weights"):
            return None
        with torch.no_grad():
            return _numpy(self.policy.expert_weights(states)[0])

    @property
    def notes(self) -> list[str]:
        """What the picture does not show."""
        if self._steps <= len(self.frames):
            return []
        return [f"the video shows the first {len(self.frames)} of the game's {self._steps} steps"]

    def save(self, path: str | Path) -> Path:
        """Writes the GIF, whole or not at all.

        Raises ValueError for another ending or where no step was seen; OSError.
        """
        from PIL import Image

        path = Path(path)
        if path.suffix.lower() not in VIDEO_ENDINGS:
            raise ValueError(f"video: expected a name that ends in .gif, got {path}")
        if not self.frames:
            raise ValueError("video: no step was played")
        drawing = Drawing(self)
        pictures = []
        for step in range(len(self.frames)):
            picture = Image.fromarray(drawing.draw(step))
            picture.putpalette(drawing.palette.colors.tobytes())
            pictures.append(picture)
        times = [STEP_MS] * (len(pictures) - 1) + [END_MS]
        with replacing(path) as file:
            pictures[0].save(
                file, format="GIF", save_all=True, append_images=pictures[1:], duration=times,
                loop=0, optimize=False,
            )  # fmt: skip
        return path


class Palette:
    """256 colours: those of the page, then those of the screens, the most frequent first.

    colors: uint8 [256, 3].
    """

    def __init__(self, screens: Sequence[np.ndarray]):
        shades = np.linspace(_rgb(PAGE), _rgb(INK), SHADES).round().astype(np.uint8)
        page = [TRACK, RULE, BAR, GAIN, LOSS, *EXPERTS]
        own = np.concatenate([shades, np.array([_rgb(color) for color in page])])
        self._places = {color: SHADES + i for i, color in enumerate(page)}
        every = max(1, len(screens) // 50)
        codes, counts = np.unique(
            np.concatenate([_codes(screen).ravel() for screen in screens[::every]]),
            return_counts=True,
        )
        codes = np.sort(codes[np.argsort(-counts, kind="stable")[: 256 - len(own)]])
        self._codes, self._first = codes, len(own)
        self.colors = np.zeros((256, 3), np.uint8)
        self.colors[: len(own)] = own
        self.colors[len(own) : len(own) + len(codes)] = _colors(codes)

    def __getitem__(self, color: str) -> int:
        """The index of one of the page's colours."""
        return self._places[color]

    def indices(self, screen: np.ndarray) -> np.ndarray:
        """uint8 [h, w] of a screen uint8 [h, w, 3]; a colour without a place gets the nearest."""
        wanted = _codes(screen)
        at = np.searchsorted(self._codes, wanted).clip(max=len(self._codes) - 1)
        missing = self._codes[at] != wanted
        if missing.any():
            others, back = np.unique(wanted[missing], return_inverse=True)
            apart = _colors(others).astype(int)[:, None] - _colors(self._codes).astype(int)
            at[missing] = (apart**2).sum(axis=2).argmin(axis=1)[back]
        return (self._first + at).astype(np.uint8)


class Drawing:
    """The frames of a video as pictures uint8 [height, WIDTH] of the palette's indices."""

    def __init__(self, video: Video):
        self.frames, self.action_names = video.frames, video.action_names
        first = self.frames[0]
        height, width = first.screen.shape[:2]
        self.scale = max(1, min(SCREEN[0] // height, SCREEN[1] // width))
        self.palette = Palette([frame.screen for frame in self.frames])
        self.top, self.right = 46, EDGE + width * self.scale + 20
        self.likeliest = max((f.returns.max() for f in self.frames if f.returns is not None),
                             default=1.0)  # fmt: skip
        self.atoms = None if video.policy is None else _numpy(video.policy.atoms)
        weights = [frame.weights for frame in self.frames]
        self.weights = np.array(weights).T if first.weights is not None else None  # [M, T]
        self.names = _names(video.experts, 0 if self.weights is None else len(self.weights))
        self.below = self.top + max(height * self.scale, PANEL + ROW * len(self.names)) + GAP
        rows = self.below + (0 if self.weights is None else AREA + 6) + 2 * STRIP + 26
        self.page = np.zeros((rows, WIDTH), np.uint8)
        self._draw_page(video.title)

    def _draw_page(self, title: str) -> None:
        """What is the same in all frames."""
        page, palette, left = self.page, self.palette, EDGE + GUTTER
        self._write(page, title, EDGE, 14, 15, WIDTH - 2 * EDGE)
        y, span = self.below, slice(left, WIDTH - EDGE)
        if self.weights is not None:
            self._write(page, "weights", EDGE, y + AREA // 2 - 8, 12)
            page[y : y + AREA, span] = _stacked(
                self.weights, AREA, span.stop - left, palette[TRACK], self._expert_colors()
            )
            y += AREA + 6
        self.ticks = y
        for row, (word, color, steps) in enumerate(self._tick_rows()):
            top = y + row * STRIP
            self._write(page, word, EDGE, top - 1, 12)
            page[top + 2 : top + STRIP, span] = palette[TRACK]
            for step in steps:
                page[top + 2 : top + STRIP, _column(step, len(self.frames), left, span.stop)] = (
                    color
                )
        self._write(page, f"{len(self.frames)} steps", left, y + 2 * STRIP + 5, 11, shade=0.6)

    def _tick_rows(self) -> list[tuple[str, int, list[int]]]:
        gains = [step for step, frame in enumerate(self.frames) if frame.reward]
        lost = [step for step, frame in enumerate(self.frames) if frame.life_lost]
        return [("rewards", self.palette[GAIN], gains), ("lost lives", self.palette[LOSS], lost)]

    def _expert_colors(self) -> list[int]:
        return [self.palette[EXPERTS[i % len(EXPERTS)]] for i in range(len(self.names))]

    def draw(self, step: int) -> np.ndarray:
        """The picture of a step, uint8 [height, WIDTH]."""
        frame, picture = self.frames[step], self.page.copy()
        shown = self.palette.indices(frame.screen)
        shown = shown.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
        height, width = shown.shape
        picture[self.top : self.top + height, EDGE : EDGE + width] = shown
        lives = f"   lives {frame.lives}" if self._has_lives else ""
        self._write(picture, f"score {frame.score:g}{lives}   step {step + 1}", self.right,
                    self.top, 13)  # fmt: skip
        y = self._draw_returns(picture, frame, self.top + 32)
        if frame.weights is not None:
            self._draw_weights(picture, frame.weights, y + 18)
        cursor = _column(step, len(self.frames), EDGE + GUTTER, WIDTH - EDGE)
        picture[self.below - 3 : self.ticks + 2 * STRIP + 3, cursor] = SHADES - 1
        return picture

    @functools.cached_property
    def _has_lives(self) -> bool:
        return any(frame.lives for frame in self.frames)

    def _draw_returns(self, picture: np.ndarray, frame: Frame, y: int) -> int:
        """The chosen action's distribution of returns; where it ends."""
        left, right, high = self.right, WIDTH - EDGE, 130
        name = self.action_names[frame.action]
        if frame.returns is None or self.atoms is None:
            self._write(picture, f"{name}, drawn at random", left, y, 13)
            return y + 20
        mean = float(frame.returns @ self.atoms)
        self._write(picture, f"return of {name}: {mean:.2f} on average", left, y, 13, right - left)
        top, floor = y + 24, y + 24 + high
        picture[floor, left:right] = self.palette[RULE]
        edges = np.linspace(left, right, len(frame.returns) + 1).round().astype(int)
        tall = (frame.returns / self.likeliest * high).round().astype(int)
        for begin, end, height in zip(edges[:-1], edges[1:], tall, strict=True):
            picture[floor - height : floor, begin : max(begin + 1, end - 1)] = self.palette[BAR]
        low, most = self.atoms[0], self.atoms[-1]
        half = (edges[1] - edges[0]) / 2  # a bar is about its atom

        def place(value: float) -> int:
            share = (value - low) / (most - low)
            return round(left + half + share * (right - left - 2 * half))

        picture[top - 4 : floor, place(mean)] = SHADES - 1
        for value in dict.fromkeys((low, 0.0 if low < 0 < most else low, most)):
            picture[floor : floor + 4, place(value)] = SHADES // 2
            self._write(picture, f"{value:g}", place(value), floor + 5, 11, shade=0.6, middle=True)
        return floor + 20

    def _draw_weights(self, picture: np.ndarray, weights: np.ndarray, y: int) -> None:
        """The experts' weights of this step, a bar each."""
        left, right = self.right, WIDTH - EDGE
        bar = left + 130
        for name, weight, color in zip(self.names, weights, self._expert_colors(), strict=True):
            self._write(picture, name, left, y, 12, bar - left - 8)
            picture[y + 3 : y + 13, bar : right - 44] = self.palette[TRACK]
            picture[y + 3 : y + 13, bar : bar + round(float(weight) * (right - 44 - bar))] = color
            self._write(picture, f"{weight:.2f}" if weight else "-", right - 36, y, 12)
            y += ROW

    def _write(
        self,
        picture: np.ndarray,
        text: str,
        x: int,
        y: int,
        size: int,
        room: int | None = None,
        shade: float = 1.0,
        middle: bool = False,
    ) -> None:
        """Text with its top left at (x, y), or its middle at x. room: pixels, where it is cut."""
        letters = _letters(printable(text), size, room)
        ink = (letters.astype(np.float32) * (shade * (SHADES - 1) / 255)).round().astype(np.uint8)
        x -= letters.shape[1] // 2 if middle else 0
        x = max(0, min(x, WIDTH - letters.shape[1]))
        part = picture[y : y + len(ink), x : x + ink.shape[1]]
        np.copyto(part, ink[: len(part), : part.shape[1]], where=ink[: len(part)] > 0)


@functools.lru_cache(maxsize=4096)
def _letters(text: str, size: int, room: int | None) -> np.ndarray:
    """uint8 [h, w]: how much ink each pixel of a line has."""
    from PIL import Image, ImageDraw

    font = _font(size)
    cut = text
    while room is not None and len(text) > 1 and font.getlength(cut) > room:
        text = text[:-1]
        cut = f"{text.rstrip()}…"
    image = Image.new("L", (int(font.getlength(cut)) + 2, size + 5))
    ImageDraw.Draw(image).text((0, 0), cut, fill=255, font=font)
    return np.asarray(image)


@functools.lru_cache(maxsize=16)
def _font(size: int) -> Any:
    """Matplotlib's own sans serif, which is the same on every system."""
    import matplotlib
    from PIL import ImageFont

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), size)


def _stacked(
    weights: np.ndarray, height: int, width: int, empty: int, colors: Sequence[int]
) -> np.ndarray:
    """uint8 [height, width]: weights [M, T] over time, one on another, 1 at the top."""
    steps = (np.arange(width) * weights.shape[1]) // width
    tops = weights[:, steps].cumsum(axis=0)
    levels = 1 - (np.arange(height) + 0.5) / height
    area = np.full((height, width), empty, np.uint8)
    for top, color in reversed(list(zip(tops, colors, strict=True))):
        area[levels[:, None] < top] = color
    return area


def _column(step: int, steps: int, left: int, right: int) -> int:
    return left + int((step + 0.5) * (right - left) / steps)


def _names(given: Sequence[str], count: int) -> list[str]:
    return [given[i] if i < len(given) else f"expert {i}" for i in range(count)]


def _numpy(values: Tensor) -> np.ndarray:
    return values.detach().float().cpu().numpy()


def _rgb(color: str) -> tuple[int, int, int]:
    return tuple(bytes.fromhex(color[1:]))


def _codes(colors: np.ndarray) -> np.ndarray:
    """uint8 [..., 3] -> int64 [...], one number a colour."""
    red, green, blue = np.moveaxis(colors.astype(np.int64), -1, 0)
    return red << 16 | green << 8 | blue


def _colors(codes: np.ndarray) -> np.ndarray:
    return np.stack([codes >> 16, codes >> 8 & 255, codes & 255], axis=-1).astype(np.uint8)
