"""Networks of a game's own number of actions, with the bodies of other games'."""

from __future__ import annotations

import torch

from .network import HEAD, RainbowNetwork


@torch.no_grad()
def with_head(network: RainbowNetwork, num_actions: int, keep: bool = False) -> RainbowNetwork:
    """A network of its own with the body of another: both hidden layers are kept, the two last
    layers are new unless ``keep``."""
    if keep and num_actions != network.num_actions:
        raise ValueError(
            f"heads: a source of {network.num_actions} actions cannot keep its head in a game of "
            f"{num_actions}"
        )
    made = RainbowNetwork(**network.config() | {"num_actions": num_actions})
    state = network.state_dict()
    if not keep:
        state = {name: value for name, value in state.items() if name.split(".")[0] not in HEAD}
    made.load_state_dict(state, strict=False)
    return made
