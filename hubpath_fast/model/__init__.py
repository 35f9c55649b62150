"""The Hub-Pathway model: generator, aggregators, executors, losses."""

from .aggregator import LinearAggregator, MLPAggregator
from .generator import PathwayGenerator
from .losses import HubPathwayLoss, PathwayLosses
from .pathway import HubPathway, PathwayConfig, PathwayOutput

__all__ = [
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "PathwayConfig",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
]
