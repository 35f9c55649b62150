"""Experts as captured CUDA graphs: the executor, and what it is made of."""

from .executor import GraphsExecutor

__all__ = ["GraphsExecutor"]
