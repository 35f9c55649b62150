"""Atari: Hub-Pathway over policies, with Data-Efficient Rainbow agents (section 4.3)."""

from .distribution import categorical_loss, categorical_projection, double_q_target
from .environments import make_env
from .games import find_game, games, human_normalized, reference_scores
from .hub import HubPolicy
from .network import RainbowNetwork, dueling_logits
from .noisy import NoisyLinear, draw_noise
from .patches import FramePatches
from .replay import PrioritizedReplay, ReplayBatch
from .returns import n_step_return
from .screens import preprocess_frames

__all__ = [
    "FramePatches",
    "HubPolicy",
    "NoisyLinear",
    "PrioritizedReplay",
    "RainbowNetwork",
    "ReplayBatch",
    "categorical_loss",
    "categorical_projection",
    "double_q_target",
    "draw_noise",
    "dueling_logits",
    "find_game",
    "games",
    "human_normalized",
    "make_env",
    "n_step_return",
    "preprocess_frames",
    "reference_scores",
]
