"""The Hub-Pathway model: generator, aggregators, executors, losses."""

from .aggregator import LinearAggregator, MLPAggregator
from .generator import PathwayGenerator
from .losses import HubPathwayLoss, PathwayLosses
from .output import PathwayOutput
from .pathway import HubPathway

__all__ = [
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
]
