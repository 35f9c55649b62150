"""What Hub-Pathway is compared with: single experts, and votes over them."""

from .single import SingleModel
from .votes import best_k, hard_vote, oracle, soft_vote

__all__ = ["SingleModel", "best_k", "hard_vote", "oracle", "soft_vote"]
