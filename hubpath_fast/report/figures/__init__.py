"""The figures of a report; each takes plain arrays and returns a matplotlib Figure."""

from .cost import measure_against_cost
from .counts import count_matrix
from .curves import training_curves
from .heat import heat_map, mean_weights, measure_by_group
from .measure_bars import measure_bars
from .over_k import measure_over_k
from .quality import quality_bars
from .samples import samples_with_weights
from .weights import weight_bars

__all__ = [
    "count_matrix",
    "heat_map",
    "mean_weights",
    "measure_against_cost",
    "measure_bars",
    "measure_by_group",
    "measure_over_k",
    "quality_bars",
    "samples_with_weights",
    "training_curves",
    "weight_bars",
]
