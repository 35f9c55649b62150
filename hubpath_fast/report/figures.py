"""The figures of a report; each takes plain arrays and returns a matplotlib Figure."""

from .bars import accuracy_bars
from .curves import training_curves
from .heat import accuracy_by_group, heat_map, mean_weights
from .samples import samples_with_weights

__all__ = [
    "accuracy_bars",
    "accuracy_by_group",
    "heat_map",
    "mean_weights",
    "samples_with_weights",
    "training_curves",
]
