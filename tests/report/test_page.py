"""The page is whole, well-formed and escaped; tables and CSV hold the numbers."""

from __future__ import annotations

import base64
import functools
import io
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from support.pages import Page, read_csv

from hubpath_fast import report
from hubpath_fast.files import write_bytes
from hubpath_fast.report import Picture, Section, Table
from hubpath_fast.report.page import TEMPLATE

NASTY = "<script>alert('&')</script> \"R&D\" {0}"


def figure() -> Figure:
    return report.mean_weights([[0.25, 0.75]], [NASTY], ["a", "b"])


@functools.cache
def whole_page() -> str:
    return page()


def page(**changes) -> str:
    table = Table(["method", "accuracy"], [[NASTY, 0.5], ["ours", 0.75]], highlight=[(1, 1)])
    sections = [
        Section(NASTY, f"One.\n\nTwo {NASTY}", [table, Picture(figure(), NASTY, f"Map {NASTY}")]),
        Section("Second", items=["A plain paragraph."]),
    ]
    return report.render_page(NASTY, **{"sections": sections, "subtitle": NASTY} | changes)


def test_page_is_well_formed_and_escaped():
    read = Page(whole_page())
    assert read.all("script") == []
    assert read.texts["title"] == [NASTY]
    assert read.texts["h1"] == [NASTY]
    assert read.texts["h2"] == [NASTY, "Second"]
    assert read.texts["p"] == [NASTY, "One.", f"Two {NASTY}", "A plain paragraph."]
    assert read.texts["figcaption"] == [NASTY]
    assert read.texts["th"] == ["method", "accuracy", NASTY, "ours"]
    assert read.all("html") == [{"lang": "en"}]
    assert "prefers-color-scheme: dark" in whole_page()


def test_pictures_are_inside_with_alt_and_twice_the_size():
    read = Page(whole_page())
    (image,) = read.all("img")
    assert image["alt"] == f"Map {NASTY}"
    head, data = image["src"].split(",", 1)
    assert head == "data:image/png;base64"
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert picture.format == "PNG"
    shown = (int(image["width"]), int(image["height"]))
    assert abs(picture.width - 2 * shown[0]) <= 1
    assert abs(picture.height - 2 * shown[1]) <= 1


def test_an_installed_package_has_the_template():
    setup = Path(__file__).parents[2] / "setup.py"
    assert f'"hubpath_fast.report": ["{TEMPLATE}"]' in setup.read_text()


def test_nothing_is_loaded_from_outside():
    for _, attrs in Page(whole_page()).tags:
        for key in ("src", "href"):
            assert attrs.get(key, "#").startswith(("#", "data:"))
    assert "url(" not in whole_page()
    assert "@import" not in whole_page()


def test_contents_link_to_every_section():
    sections = [Section(title) for title in ("Same", "Same", "Other one", "…")]
    read = Page(page(sections=sections))
    ids = [attrs["id"] for attrs in read.all("section")]
    assert ids == ["same", "same-1", "other-one", "section-3"]
    assert [attrs["href"] for attrs in read.all("a")] == [f"#{i}" for i in ids]
    assert Page(whole_page()).all("nav") == []


def test_table_aligns_numbers_and_marks_the_best():
    table = Table(
        ["method", "accuracy", "cost", "note"],
        [["a", 0.12345, 2, None], ["b", np.float32(0.5), np.int64(5), "x"], ["c", None, 1, ""]],
        highlight=[1, (0, 2)],
    )
    read = Page(page(sections=[Section("s", items=[table])]))
    heads = [attrs for attrs in read.all("th") if attrs["scope"] == "col"]
    assert [attrs.get("class") for attrs in heads] == [None, "number", "number", None]
    assert read.texts["td"] == ["0.123", "–", "–", "1", "–"]
    assert read.texts["strong"] == ["2", "b", "0.500", "5", "x"]


def test_best_cells_are_ties_as_shown_and_skip_bounds():
    table = Table(["m", "acc"], [["a", 0.9001], ["b", 0.9], ["oracle", 0.99], ["c", None]])
    assert report.best_cells(table, "acc") == [(2, 1)]
    assert report.best_cells(table, "acc", skip=[2]) == [(0, 1), (1, 1)]
    assert report.best_cells(table, "acc", largest=False) == [(0, 1), (1, 1)]
    assert report.best_cells(table, "m") == []
    with pytest.raises(ValueError, match="column is 'cost'"):
        report.best_cells(table, "cost")


def test_a_folder_has_every_figure_with_its_numbers(tmp_path):
    table = report.matrix_table([[0.1, 1 / 3], [np.nan, 1.0]], ["r,1", NASTY], ["a", "b"], "light")
    folder = report.FigureFolder(tmp_path / "new" / "folder", scale=1.0)
    first, second = (folder.picture(name, figure(), table, "", "map") for name in ("heat", "again"))
    out = tmp_path / "new" / "folder"
    assert folder.written[:2] == [out / "heat.png", out / "heat.csv"]
    assert sorted(p.name for p in out.iterdir()) == sorted(p.name for p in folder.written)
    image = Image.open(io.BytesIO((out / "heat.png").read_bytes()))
    assert image.width == pytest.approx(figure().get_figwidth() * 100, abs=1)
    assert first.png == second.png  # equal figures are equal files
    assert read_csv(out / "heat.csv") == [
        ["light", "a", "b"],
        ["r,1", "0.1", repr(1 / 3)],
        [NASTY, "", "1.0"],
    ]


def test_history_table_flattens_records():
    history = [
        {"step": 1, "loss": 2.0, "load": [0.5, 0.5]},
        {"step": 2, "loss": None, "validation": {"accuracy": 0.9}},
    ]
    table = report.history_table(history)
    assert table.columns == ["step", "loss", "load/0", "load/1", "validation/accuracy"]
    assert table.rows == [[1, 2.0, 0.5, 0.5, None], [2, None, None, None, 0.9]]


def test_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write_page(tmp_path / "run" / "report.html", "Title", [Section("One")])
    before = path.read_text(encoding="utf-8")
    Page(before)
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_bytes(path, b"half")
    assert path.read_text(encoding="utf-8") == before
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells, but there are 2 columns"):
        Table(["a", "b"], [[1, 2], [3]])
    with pytest.raises(ValueError, match="formats names the column 'c'"):
        Table(["a"], [], formats={"c": "g"})
    with pytest.raises(ValueError, match="alt is empty"):
        Picture(Figure(), "caption", " ")
    with pytest.raises(ValueError, match="section 'One' holds a dict"):
        Section("One", items=[{}])
