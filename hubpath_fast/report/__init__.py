"""Reports: figures of a run's numbers, and the page that shows them.

It takes plain arrays and dictionaries and a ``Measure``, and knows neither of training nor of what
is learned. Figures are matplotlib Figure objects, made without pyplot and drawn by Agg, so no
window and no global figure is ever opened.
"""

from .analysis import Analysis, write_analysis
from .figures.ced import cumulative_errors, cumulative_table
from .figures.cost import cost_table, measure_against_cost, pareto_front
from .figures.counts import count_matrix
from .figures.curves import history_table, training_curves
from .figures.heat import heat_map, mean_weights, measure_by_group
from .figures.interval_bars import IntervalBar, interval_bars
from .figures.learning import LearningCurve, learning_curves, learning_table
from .figures.maps import Maps, maps_of_experts
from .figures.measure_bars import measure_bars
from .figures.over_k import k_table, measure_over_k
from .figures.points import samples_with_points, values_on_shape
from .figures.quality import quality_bars
from .figures.samples import samples_with_weights
from .figures.weights import weight_bars
from .folder import FigureFolder
from .page import Picture, Section, render_page, write_page
from .quality import Quality, quality_table, weight_quality
from .tables import Table, best_cells, matrix_table, short_count

__all__ = [
    "Analysis",
    "FigureFolder",
    "IntervalBar",
    "LearningCurve",
    "Maps",
    "Picture",
    "Quality",
    "Section",
    "Table",
    "best_cells",
    "cost_table",
    "count_matrix",
    "cumulative_errors",
    "cumulative_table",
    "heat_map",
    "history_table",
    "interval_bars",
    "k_table",
    "learning_curves",
    "learning_table",
    "maps_of_experts",
    "matrix_table",
    "mean_weights",
    "measure_against_cost",
    "measure_bars",
    "measure_by_group",
    "measure_over_k",
    "pareto_front",
    "quality_bars",
    "quality_table",
    "render_page",
    "samples_with_points",
    "samples_with_weights",
    "short_count",
    "training_curves",
    "values_on_shape",
    "weight_bars",
    "weight_quality",
    "write_analysis",
    "write_page",
]
