"""Experts on a CPU's threads: the executor, and what it is made of."""

from .executor import ThreadsExecutor

__all__ = ["ThreadsExecutor"]
