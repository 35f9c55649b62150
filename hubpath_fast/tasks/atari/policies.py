"""The policy of each method, made of the sources' networks."""

from __future__ import annotations

from collections.abc import Sequence

from .distribution import make_atoms
from .heads import with_head
from .hub import HubPolicy
from .network import RainbowNetwork
from .policy import Policy, SinglePolicy
from .rivals import KnowledgeFlowPolicy, ZooTuningPolicy
from .settings import FINETUNE, HUB, SCRATCH, ZOO_TUNING, AtariSettings


def make_policy(
    settings: AtariSettings, networks: Sequence[RainbowNetwork], num_actions: int
) -> Policy:
    """A policy for a game of ``num_actions``; its networks are its own.

    networks: of the sources, as their runs have them; from scratch one that says the sizes.
    """
    atoms = make_atoms(settings.atoms, settings.v_min, settings.v_max)
    keep = settings.heads == "keep"
    if settings.method == SCRATCH:
        return SinglePolicy(RainbowNetwork(**networks[0].config()), atoms)
    own = [with_head(network, num_actions, keep) for network in networks]
    if settings.method == FINETUNE:
        return SinglePolicy(own[0], atoms)
    if settings.method == HUB:
        return HubPolicy(
            own, atoms, settings.k, explore=settings.explore, renormalize=settings.renormalize,
            pathway_noise=settings.pathway_noise,
        )  # fmt: skip
    if settings.method == ZOO_TUNING:
        return ZooTuningPolicy(own, atoms)
    return KnowledgeFlowPolicy(own, atoms, lr=settings.lr)
