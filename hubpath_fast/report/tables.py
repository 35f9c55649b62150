"""Tables: what a page shows and what stands as CSV beside a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .arrays import to_matrix, to_names


@dataclass
class Table:
    """Named columns and rows of text, numbers or None (an empty cell, shown as a dash).

    highlight: what is bold on a page: a row's number, or (row, column) for one cell; see
    ``best_cells``. formats: for a column, how its floats are shown: a function, or as in
    ``format(x, ".3f")``, which holds where none is given. A CSV always has all digits. caption: a
    line above the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    highlight: Collection[int | tuple[int, int]] = ()
    formats: Mapping[str, str | Callable[[float], str]] = field(default_factory=dict)
    caption: str = ""

    def __post_init__(self) -> None:
        for i, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows[{i}] has {len(row)} cells, but there are {len(self.columns)} columns "
                    f"({', '.join(map(str, self.columns))}); give one cell for each"
                )
        unknown = [name for name in self.formats if name not in self.columns]
        if unknown:
            raise ValueError(f"formats names the column {unknown[0]!r}, which is not in columns")

    def csv(self) -> str:
        """The table as CSV with a head line; None and NaN are empty."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows([_plain(cell) for cell in row] for row in self.rows)
        return out.getvalue()

    def text(self, row: int, column: int) -> str:
        """A cell as a reader sees it."""
        cell = _plain(self.rows[row][column])
        if cell == "":
            return "–"
        form = self.formats.get(self.columns[column], ".3f")
        if not isinstance(cell, float):
            return str(cell)
        return form(cell) if callable(form) else format(cell, form)

    def is_highlighted(self, row: int, column: int) -> bool:
        return row in self.highlight or (row, column) in self.highlight

    def is_numeric(self, column: int) -> bool:
        """Whether a column has numbers only (and at least one)."""
        cells = [_plain(row[column]) for row in self.rows]
        known = [cell for cell in cells if cell != ""]
        return bool(known) and all(isinstance(cell, (int, float)) for cell in known)


def _plain(cell: Any) -> Any:
    """A Python number or text; "" for None and NaN."""
    cell = cell.item() if hasattr(cell, "item") else cell
    return "" if cell is None or cell != cell else cell


def short_count(count: float) -> str:
    """12000 -> "12 k", 3.61e6 -> "3.61 M": a count in three digits."""
    number, unit = float(f"{count:.3g}"), ""
    for larger in ("k", "M", "G"):
        if number < 1000:
            break
        number, unit = number / 1000, f" {larger}"
    return f"{number:.4g}{unit}"


def best_cells(
    table: Table, column: str, largest: bool = True, skip: Iterable[int] = ()
) -> list[tuple[int, int]]:
    """The cells of a column with its best number, ties as shown included, for ``highlight``.

    skip: rows that do not compete, such as an upper bound.
    """
    if column not in table.columns:
        raise ValueError(f"column is {column!r}, but there are {', '.join(table.columns)}")
    j, skip = list(table.columns).index(column), set(skip)
    cells = {i: _plain(row[j]) for i, row in enumerate(table.rows) if i not in skip}
    cells = {i: cell for i, cell in cells.items() if isinstance(cell, (int, float))}
    if not cells:
        return []
    best = (max if largest else min)(cells, key=cells.get)
    return [(i, j) for i in cells if table.text(i, j) == table.text(best, j)]


def matrix_table(
    matrix: Any, row_names: Sequence[str], column_names: Sequence[str], corner: str = ""
) -> Table:
    """A matrix with its names as a table, for a heat map's CSV; ``corner`` heads the names."""
    values = to_matrix("matrix", matrix)
    rows = to_names("row_names", row_names, values.shape[0], "rows of matrix")
    columns = to_names("column_names", column_names, values.shape[1], "columns of matrix")
    pairs = zip(rows, values.tolist(), strict=True)
    return Table([corner, *columns], [[name, *row] for name, row in pairs])
