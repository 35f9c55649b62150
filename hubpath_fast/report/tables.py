"""Tables: what a page shows and what stands as CSV beside a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from ..files import write_bytes
from .arrays import to_matrix, to_names
from .curves import curves_table
from .png import png


@dataclass
class Table:
    """Named columns and rows of text, numbers or None (an empty cell, shown as a dash).

    highlight: what is bold on a page: a row's number, or (row, column) for one cell; see
    ``best_cells``. formats: for a column, how its floats are shown, as in ``format(x, ".3f")``;
    ``.3f`` where not given. A CSV always has all digits. caption: a line above the table.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    highlight: Collection[int | tuple[int, int]] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
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
        return format(cell, form) if isinstance(cell, float) else str(cell)

    def is_numeric(self, column: int) -> bool:
        """Whether a column has numbers only (and at least one)."""
        cells = [_plain(row[column]) for row in self.rows]
        known = [cell for cell in cells if cell != ""]
        return bool(known) and all(isinstance(cell, (int, float)) for cell in known)


def _plain(cell: Any) -> Any:
    """A Python number or text; "" for None and NaN."""
    cell = cell.item() if hasattr(cell, "item") else cell
    return "" if cell is None or cell != cell else cell


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


def history_table(history: Iterable[Mapping[str, Any]]) -> Table:
    """All numbers of a training's log, for the CSV of its curves."""
    columns, rows = curves_table(history)
    return Table(columns, rows)


def accuracy_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The rows of ``accuracy_bars`` as a table, the best accuracy (bounds aside) in bold."""
    optional = {"std": "spread (std)", "cost": "expert forwards per sample", "note": "note"}
    keys = [key for key in optional if any(row.get(key) is not None for row in rows)]
    table = Table(
        ["method", "accuracy", *(optional[key] for key in keys)],
        [[row["name"], row["accuracy"], *(row.get(key) for key in keys)] for row in rows],
    )
    if "cost" in keys:
        table.formats = {optional["cost"]: "g"}
    bounds = [i for i, row in enumerate(rows) if row.get("bound")]
    best = [i for i, _ in best_cells(table, "accuracy", skip=bounds)]
    table.highlight = [(i, j) for i in best for j in (0, 1)]
    return table


def samples_table(
    weights: Any,
    expert_names: Sequence[str],
    labels: Sequence[Any],
    predictions: Sequence[Any],
    notes: Sequence[str] | None = None,
) -> Table:
    """What ``samples_with_weights`` shows, a sample a line, for its CSV."""
    values = to_matrix("weights", weights)
    experts = to_names("expert_names", expert_names, values.shape[1], "columns of weights")
    notes = [None] * len(values) if notes is None else notes
    for argument, given in (("labels", labels), ("predictions", predictions), ("notes", notes)):
        if len(given) != len(values):
            raise ValueError(
                f"{argument} has {len(given)} entries, but weights has {len(values)} rows; give "
                "one for each"
            )
    pairs = zip(labels, predictions, notes, values.tolist(), strict=True)
    return Table(
        ["sample", "label", "prediction", "note", *experts],
        [[i, label, guess, note, *row] for i, (label, guess, note, row) in enumerate(pairs)],
    )


def write_figure(
    figure: Figure, out_dir: str | Path, name: str, table: Table | None = None
) -> list[Path]:
    """Writes ``out_dir/name.png`` (twice the page's resolution) and, given a table of its numbers,
    ``name.csv``. Returns the paths."""
    if not name or Path(name).name != name:
        raise ValueError(f"name is {name!r}; give a file name without folder and ending")
    out_dir = Path(out_dir)
    paths = [write_bytes(out_dir / f"{name}.png", png(figure))]
    if table is not None:
        paths.append(write_bytes(out_dir / f"{name}.csv", table.csv().encode()))
    return paths
