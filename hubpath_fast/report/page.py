"""One self-contained HTML page: text, tables and figures, with nothing loaded from outside."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from ..files import write_text
from .style import DPI, png
from .tables import Table

TEMPLATE = "page.html.jinja"
MIN_SECTIONS_FOR_CONTENTS = 4


@dataclass
class Picture:
    """A figure with its caption below. alt: what it shows, for those who cannot see it. scale:
    pixels of the image for one of the page."""

    figure: Figure
    caption: str
    alt: str
    scale: float = 2.0

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("alt is empty; say in a sentence what the figure shows")

    @cached_property
    def png(self) -> bytes:
        return png(self.figure, self.scale)

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in CSS pixels."""
        width, height = self.figure.get_size_inches()
        return round(DPI * width), round(DPI * height)


@dataclass
class Section:
    """A heading, text (an empty line parts paragraphs) and then tables, pictures, paragraphs."""

    title: str
    text: str = ""
    items: Sequence[Table | Picture | str] = ()

    def __post_init__(self) -> None:
        for item in self.items:
            if not isinstance(item, (Table, Picture, str)):
                raise ValueError(
                    f"section {self.title!r} holds a {type(item).__name__}; give Table, Picture "
                    "or str"
                )


def write_page(
    path: str | Path, title: str, sections: Sequence[Section], subtitle: str = "", footer: str = ""
) -> Path:
    """Writes the page, whole or not at all; the folder is made. Returns its path."""
    return write_text(path, render_page(title, sections, subtitle, footer))


def render_page(
    title: str, sections: Sequence[Section], subtitle: str = "", footer: str = ""
) -> str:
    """The page as HTML. Every text given is escaped."""
    environment = Environment(
        loader=PackageLoader("hubpath_fast.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["paragraphs"] = _paragraphs
    anchors = _anchors([section.title for section in sections])
    return environment.get_template(TEMPLATE).render(
        title=title,
        subtitle=subtitle,
        sections=list(zip(anchors, sections, strict=True)),
        footer=footer,
        contents_from=MIN_SECTIONS_FOR_CONTENTS,
    )


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def _anchors(titles: Sequence[str]) -> list[str]:
    found: list[str] = []
    for i, title in enumerate(titles):
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or f"section-{i}"
        found.append(f"{anchor}-{i}" if anchor in found else anchor)
    return found
