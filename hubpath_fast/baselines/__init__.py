"""What Hub-Pathway is compared with: single experts, votes over them, the paper's rivals, and
Hub-Pathway with a part taken away."""

from .architectures import difference
from .distill import DistillObjective
from .knowledge_flow import KnowledgeFlow, KnowledgeFlowObjective, knowledge_flow_groups
from .single import SingleModel
from .soups import greedy_soup, reestimate_batchnorm, uniform_soup
from .variants import Noiseless, RandomGenerator, TaskGenerator
from .votes import Ensemble, oracle
from .zoo_tuning import ZooTuning, zoo_tuning_groups

__all__ = [
    "DistillObjective",
    "Ensemble",
    "KnowledgeFlow",
    "KnowledgeFlowObjective",
    "Noiseless",
    "RandomGenerator",
    "SingleModel",
    "TaskGenerator",
    "ZooTuning",
    "difference",
    "greedy_soup",
    "knowledge_flow_groups",
    "oracle",
    "reestimate_batchnorm",
    "uniform_soup",
    "zoo_tuning_groups",
]
