"""Experts as captured CUDA graphs: the executor, and what it is made of.

A module of your own says that its forward treats each row alone by the class attribute ``row_wise =
True``: what it gives for a row, and the gradient, depend on no other row, and are finite for a row
of zeros. Then groups are padded to few sizes; else a graph is captured for each.
"""

from .capacities import MIN_SEEN
from .executor import GraphsExecutor
from .records import GENERATOR

__all__ = ["GENERATOR", "MIN_SEEN", "GraphsExecutor"]
