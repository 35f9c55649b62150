"""The Hub-Pathway model: generator, aggregators, executors, losses."""

from .aggregator import (
    AGGREGATORS,
    LARGEST_DEFAULT,
    LinearAggregator,
    MLPAggregator,
    SumAggregator,
    make_aggregator,
)
from .feature_generator import FeatureGenerator, always_on
from .fixed_routes import FixedRoutes
from .generator import PathwayGenerator
from .losses import HubPathwayLoss, PathwayLosses
from .output import PathwayOutput
from .pathway import HubPathway

__all__ = [
    "AGGREGATORS",
    "LARGEST_DEFAULT",
    "FeatureGenerator",
    "FixedRoutes",
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
    "SumAggregator",
    "always_on",
    "make_aggregator",
]
