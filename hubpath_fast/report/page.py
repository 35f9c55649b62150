"""One self-contained HTML page: text, tables and figures, with nothing loaded from outside."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from ..files import write_bytes
from .png import png
from .style import DPI
from .tables import Table

CONTENTS_FROM = 4  # sections that a page needs to get a list of contents


@dataclass
class Picture:
    """A figure with its caption below. alt: what it shows, for those who cannot see it."""

    figure: Figure
    caption: str
    alt: str

    def __post_init__(self) -> None:
        if not self.alt.strip():
            raise ValueError("alt is empty; say in a sentence what the figure shows")


@dataclass
class Section:
    """A heading, text (an empty line parts paragraphs) and then tables, pictures, paragraphs."""

    title: str
    text: str = ""
    items: Sequence[Table | Picture | str] = ()


def write_page(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    subtitle: str = "",
    footer: str = "",
) -> Path:
    """Writes the page, whole or not at all; the folder is made. Returns its path."""
    return write_bytes(path, render_page(title, sections, subtitle, footer).encode())


def render_page(
    title: str, sections: Sequence[Section], subtitle: str = "", footer: str = ""
) -> str:
    """The page as HTML. Every text given is escaped."""
    anchors = _anchors([section.title for section in sections])
    contents = ""
    if len(sections) >= CONTENTS_FROM:
        links = (
            f'<li><a href="#{anchor}">{escape(section.title)}</a></li>'
            for anchor, section in zip(anchors, sections, strict=True)
        )
        contents = f'<nav aria-label="Contents"><ol>{"".join(links)}</ol></nav>\n'
    body = "\n".join(_section(s, a) for s, a in zip(sections, anchors, strict=True))
    return PAGE.format(
        title=escape(title),
        subtitle=f'<p class="subtitle">{escape(subtitle)}</p>\n' if subtitle else "",
        contents=contents,
        body=body,
        footer=f"<footer>{_paragraphs(footer)}</footer>\n" if footer else "",
        style=STYLE,
    )


def _anchors(titles: Sequence[str]) -> list[str]:
    found: list[str] = []
    for i, title in enumerate(titles):
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or f"section-{i}"
        found.append(f"{anchor}-{i}" if anchor in found else anchor)
    return found


def _section(section: Section, anchor: str) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", _paragraphs(section.text)]
    for item in section.items:
        if isinstance(item, Picture):
            parts.append(_picture(item))
        elif isinstance(item, Table):
            parts.append(_table(item))
        elif isinstance(item, str):
            parts.append(_paragraphs(item))
        else:
            raise ValueError(
                f"section {section.title!r} holds a {type(item).__name__}; give Table, Picture "
                "or str"
            )
    return f'<section id="{anchor}">\n' + "\n".join(filter(None, parts)) + "\n</section>"


def _paragraphs(text: str) -> str:
    paragraphs = (escape(part.strip()) for part in re.split(r"\n\s*\n", text) if part.strip())
    return "\n".join(f"<p>{part}</p>" for part in paragraphs)


def _picture(picture: Picture) -> str:
    width, height = (round(DPI * inches) for inches in picture.figure.get_size_inches())
    data = base64.b64encode(png(picture.figure)).decode()
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>" if picture.caption else ""
    return (
        '<figure><div class="card" tabindex="0">'
        f'<img src="data:image/png;base64,{data}" width="{width}" height="{height}" '
        f'style="min-width:min({width}px,600px)" alt="{escape(picture.alt)}"></div>'
        f"{caption}</figure>"
    )


def _table(table: Table) -> str:
    numeric = [table.is_numeric(j) for j in range(len(table.columns))]
    classes = [' class="number"' if n else "" for n in numeric]
    head = "".join(
        f'<th scope="col"{c}>{escape(str(name))}</th>'
        for name, c in zip(table.columns, classes, strict=True)
    )
    rows = []
    for i in range(len(table.rows)):
        cells = []
        for j, c in enumerate(classes):
            text = escape(table.text(i, j))
            if i in table.highlight or (i, j) in table.highlight:
                text = f"<strong>{text}</strong>"
            cells.append(f"<td{c}>{text}</td>" if j else f'<th scope="row"{c}>{text}</th>')
        rows.append(f"<tr>{''.join(cells)}</tr>")
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = "\n".join(rows)
    return (
        f'<div class="table" tabindex="0"><table>{caption}<thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{subtitle}</header>
{contents}<main>
{body}
</main>
{footer}</body>
</html>
"""

STYLE = """:root {
  color-scheme: light dark;
  --paper: #ffffff; --ink: #1f2328; --faint: #59636e; --rule: #d1d9e0; --stripe: #f6f8fa;
  --link: #0a58a8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14181d; --ink: #e6e9ed; --faint: #a3adb8; --rule: #3a434d; --stripe: #1c2229;
    --link: #7db7f2;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; max-width: 948px; padding: 40px 24px 64px;
  background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
h1 { margin: 0; font-size: 32px; line-height: 1.2; letter-spacing: -0.015em; }
h2 { margin: 0 0 12px; font-size: 21px; line-height: 1.3; }
p { margin: 0 0 14px; max-width: 70ch; overflow-wrap: break-word; }
.subtitle { margin: 8px 0 0; color: var(--faint); font-size: 18px; line-height: 1.45; }
a { color: var(--link); }
nav ol { margin: 24px 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 4px 20px; }
nav li { list-style: none; }
section { margin-top: 44px; }
figure { margin: 18px 0 26px; }
.card {
  overflow-x: auto; padding: 12px; background: #ffffff;
  border: 1px solid var(--rule); border-radius: 8px;
}
.card img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
figcaption { margin-top: 8px; max-width: 80ch; color: var(--faint); font-size: 14px; }
.table { overflow-x: auto; margin: 18px 0 26px; }
table { border-collapse: collapse; font-size: 15px; line-height: 1.4; }
caption { padding: 0 0 8px; color: var(--faint); font-size: 14px; text-align: left; }
th, td { padding: 7px 14px; text-align: left; vertical-align: baseline; }
th[scope="row"] { font-weight: 400; }
thead th {
  border-bottom: 2px solid var(--rule); color: var(--faint);
  font-weight: 600; font-size: 14px; vertical-align: bottom; max-width: 11em;
}
tbody tr { border-bottom: 1px solid var(--rule); }
tbody tr:hover { background: var(--stripe); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
thead .number { white-space: normal; }
footer {
  margin-top: 56px; padding-top: 14px; border-top: 1px solid var(--rule);
  color: var(--faint); font-size: 14px;
}
@media (max-width: 600px) {
  body { padding: 24px 16px 40px; }
  h1 { font-size: 26px; }
  .card { padding: 8px; }
  th, td { padding: 7px 10px; }
}
@media print {
  :root { --paper: #ffffff; --ink: #000000; --faint: #444444; --rule: #bbbbbb; --stripe: #ffffff; }
  body { max-width: none; padding: 0; font-size: 10.5pt; }
  section { margin-top: 24px; }
  th, td { padding: 4px 10px; }
  footer { margin-top: 24px; }
  nav { display: none; }
  .card { border: 0; padding: 0; overflow: visible; }
  .card img { min-width: 0 !important; }
  .table { overflow: visible; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
}
"""
