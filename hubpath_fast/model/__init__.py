"""The Hub-Pathway model: generator, aggregators, executors, losses."""

from .aggregator import (
    AGGREGATORS,
    LARGEST_DEFAULT,
    LinearAggregator,
    MLPAggregator,
    SumAggregator,
    make_aggregator,
)
from .description import describe
from .expert_major import answers
from .feature_generator import FeatureGenerator, FeatureScores, always_on
from .fixed_routes import FixedRoutes
from .generator import PathwayGenerator
from .losses import HubPathwayLoss, PathwayLosses
from .newcomers import NewcomerAggregator, NewcomerGenerator, add_newcomer
from .origin import ExpertOrigin, Origin
from .output import PathwayOutput
from .pathway import HubPathway
from .policy import RoutingPolicy, dense_weights

__all__ = [
    "AGGREGATORS",
    "LARGEST_DEFAULT",
    "ExpertOrigin",
    "FeatureGenerator",
    "FeatureScores",
    "FixedRoutes",
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "NewcomerAggregator",
    "NewcomerGenerator",
    "Origin",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
    "RoutingPolicy",
    "SumAggregator",
    "add_newcomer",
    "always_on",
    "answers",
    "dense_weights",
    "describe",
    "make_aggregator",
]
