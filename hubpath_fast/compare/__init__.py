"""``hubpath compare``: every method on the same data and hub, under one budget.

settings; problems (data and hub of a seed); methods (a record for each) and runs (what each
trains); plan (which jobs, in which order); workers and work (concurrent runs, each in a process);
results; tables.
"""

from .command import compare
from .settings import CompareSettings

__all__ = ["CompareSettings", "compare"]
