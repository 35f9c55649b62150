"""Training: one thin loop, its settings, checkpoints that survive a crash, and its logs."""

from ..checkpoints import CheckpointError, find_checkpoint, load_config, load_weights
from .checkpoint import load_state
from .collapse import RoutingCollapseWarning
from .config import TrainerConfig
from .evaluation import evaluate
from .guard import NonFiniteLoss
from .interrupt import Interrupt
from .log import Reporting, read_log
from .objective import Losses, PathwayObjective, SingleObjective
from .optimizer import (
    ParameterGroup,
    build_optimizer,
    default_groups,
    head_parameters,
    pathway_groups,
    single_groups,
)
from .run_state import TrainResult
from .schedule import apply_schedule, schedule_factor
from .task import Meter, Task
from .trainer import Trainer

__all__ = [
    "CheckpointError",
    "Interrupt",
    "Losses",
    "Meter",
    "NonFiniteLoss",
    "ParameterGroup",
    "PathwayObjective",
    "Reporting",
    "RoutingCollapseWarning",
    "SingleObjective",
    "Task",
    "TrainResult",
    "Trainer",
    "TrainerConfig",
    "apply_schedule",
    "build_optimizer",
    "default_groups",
    "evaluate",
    "find_checkpoint",
    "head_parameters",
    "load_config",
    "load_state",
    "load_weights",
    "pathway_groups",
    "read_log",
    "schedule_factor",
    "single_groups",
]
