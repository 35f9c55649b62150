"""Reports: figures of a run's numbers, and the page that shows them.

It takes plain arrays and dictionaries and knows nothing of training. Figures are matplotlib Figure
objects, made without pyplot and drawn by Agg, so no window and no global figure is ever opened.
"""

from .figures import (
    accuracy_bars,
    accuracy_by_group,
    heat_map,
    mean_weights,
    samples_with_weights,
    training_curves,
)
from .page import Picture, Section, render_page, write_page
from .tables import (
    Table,
    accuracy_table,
    best_cells,
    history_table,
    matrix_table,
    samples_table,
    write_figure,
)

__all__ = [
    "Picture",
    "Section",
    "Table",
    "accuracy_bars",
    "accuracy_by_group",
    "accuracy_table",
    "best_cells",
    "heat_map",
    "history_table",
    "matrix_table",
    "mean_weights",
    "render_page",
    "samples_table",
    "samples_with_weights",
    "training_curves",
    "write_figure",
    "write_page",
]
