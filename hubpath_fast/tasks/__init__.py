"""What is learned: one object a kind of task, which trainer, compare and report speak to."""

from .classification import Classification

__all__ = ["Classification"]
