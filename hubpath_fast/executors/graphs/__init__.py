"""Experts as captured CUDA graphs: the executor, and what it is made of."""

from .executor import GraphsExecutor
from .records import GENERATOR, MIN_SEEN

__all__ = ["GENERATOR", "MIN_SEEN", "GraphsExecutor"]
