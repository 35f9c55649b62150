"""``hubpath compare``: every method on the same data and hub, under one budget.

settings; problems (data and hub of a seed); plan (which runs, in which order); runs (what each
trains); work (runs side by side, a process each); results; methods (rows of a seed); tables.
"""

from .command import compare
from .settings import CompareSettings

__all__ = ["CompareSettings", "compare"]
