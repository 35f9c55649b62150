"""The Hub-Pathway model: generator, aggregators, executors, losses."""

from .aggregator import (
    AGGREGATORS,
    LARGEST_DEFAULT,
    LinearAggregator,
    MLPAggregator,
    SumAggregator,
    make_aggregator,
)
from .generator import PathwayGenerator
from .losses import HubPathwayLoss, PathwayLosses
from .output import PathwayOutput
from .pathway import HubPathway

__all__ = [
    "AGGREGATORS",
    "LARGEST_DEFAULT",
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
    "SumAggregator",
    "make_aggregator",
]
