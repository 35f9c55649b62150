"""What all figures share: size, fonts, colours, and names that fit their place.

Colours are Okabe and Ito's, which the usual colour-blind readers tell apart; from the ninth expert
on, a hatch (bars, areas) or a dash (lines) comes in addition.
"""

from __future__ import annotations

import functools
import io
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextToPath

WIDTH = 9.0  # inches: 900 px at DPI, a page's width
DPI = 100
SMALL, NORMAL, LARGE = 9.5, 10.0, 11.5  # points; 9.5 pt are 13 px at DPI
INK, FAINT, RULE, TRACK = "#1f2328", "#59636e", "#c9d1d9", "#eceff2"
GOOD, PLAIN = "#0072B2", "#8c959f"

OKABE_ITO = (
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # green
    "#CC79A7",  # purple
    "#56B4E9",  # sky
    "#D55E00",  # vermilion
    "#4d4d4d",  # in place of black, which is the text's
    "#F0E442",  # yellow, the faintest on white
)
HATCHES = ("", "////", "....", "xxxx")
DASHES = ("-", "--", ":", "-.")

RC = {
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.labelsize": NORMAL,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": LARGE,
    "axes.titleweight": "bold",
    "figure.dpi": DPI,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib, so widths are the same everywhere
    "font.size": NORMAL,
    "grid.color": TRACK,
    "hatch.linewidth": 0.8,
    "legend.fontsize": SMALL,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold dollar signs
    "text.usetex": False,
    "xtick.color": RULE,
    "xtick.labelcolor": INK,
    "xtick.labelsize": SMALL,
    "ytick.color": RULE,
    "ytick.labelcolor": INK,
    "ytick.labelsize": SMALL,
}


def styled(function: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draws under the project's settings whatever the user's matplotlibrc says, then restores.

    The layout is run once inside, because matplotlib makes tick labels as late as that.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Figure:
        with matplotlib.style.context(["default", RC]):
            figure = function(*args, **kwargs)
            figure.draw_without_rendering()
            return figure

    return wrapper


def new_figure(width: float, height: float) -> Figure:
    """A white figure of width x height inches that lays itself out."""
    return Figure((width, height), dpi=DPI, layout="constrained", facecolor="white")


def png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as a PNG of ``scale`` times its size in CSS pixels (DPI an inch)."""
    out = io.BytesIO()
    # Without the version of the writer in it, equal figures give equal bytes.
    figure.savefig(out, format="png", dpi=DPI * scale, metadata={"Software": None})
    return out.getvalue()


def svg(figure: Figure) -> bytes:
    """The figure as an SVG, whose texts are texts."""
    out = io.StringIO()
    # Without a date and with names of its own parts that repeat, equal figures give equal bytes.
    with matplotlib.rc_context({"svg.hashsalt": "hubpath", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue().encode()


def ink_on(rgba: Sequence[float]) -> str:
    """White or dark text, whichever contrasts more with a colour of sRGB 0..1 (WCAG 2)."""
    channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), channels, strict=True))
    return INK if luminance > 0.215 else "white"  # there both have a contrast of 4


class Look(NamedTuple):
    """How one expert is drawn everywhere."""

    color: str
    hatch: str
    dash: str


def look(i: int) -> Look:
    """The fixed look of expert ``i``: 32 are distinct."""
    turn = i // len(OKABE_ITO) % len(HATCHES)
    return Look(OKABE_ITO[i % len(OKABE_ITO)], HATCHES[turn], DASHES[turn])


@functools.lru_cache(maxsize=4096)
def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Width of a line of text in inches."""
    font = FontProperties(family=["DejaVu Sans"], size=size, weight=weight)
    return TextToPath().get_text_width_height_descent(text, font, ismath=False)[0] / 72


def fit(text: str, width: float, size: float = SMALL, weight: str = "normal") -> str:
    """The text, its middle replaced by an ellipsis if it is wider than ``width`` inches."""
    text = " ".join(text.split()) or "–"
    keep = len(text)
    shown = text
    while text_width(shown, size, weight) > width and keep > 2:
        keep -= 1
        shown = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    return shown


def fit_all(names: Sequence[str], width: float, size: float = SMALL) -> list[str]:
    """Like ``fit``, and any two that come out equal get their position in front."""
    short = [fit(name, width, size) for name in names]
    return [
        fit(f"{i} {names[i]}", width, size) if short.count(name) > 1 else name
        for i, name in enumerate(short)
    ]


def fit_parts(
    parts: Sequence[str], width: float, size: float = SMALL, weight: str = "normal"
) -> str:
    """Parts joined by ", ", the longest ones shortened until all fit."""
    limit = width
    text = ", ".join(parts)
    while text_width(text, size, weight) > width and limit > 0.2:
        limit -= 0.1
        text = ", ".join(fit(part, limit, size, weight) for part in parts)
    return text


def wrap(name: str, width: float, size: float = SMALL) -> str:
    """Breaks a name after ``/ . _ -`` or a space into lines of at most ``width`` inches, where
    the pieces allow it."""
    lines = [""]
    for piece in re.findall(r"[^/._\-\s]*[/._\-\s]*", name):
        if lines[-1] and text_width((lines[-1] + piece).rstrip(), size) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.strip() for line in lines if line.strip())
