"""The network of Data-Efficient Rainbow: two convolutions, then two noisy streams.

    conv 5x5 stride 5, ReLU, conv 5x5 stride 5, ReLU, flatten
    value:      noisy -> hidden, ReLU, noisy -> Z
    advantage:  noisy -> hidden, ReLU, noisy -> A * Z
    logits = value + advantage - mean over actions of advantage         for each atom

This is the network of Kaixhin's code and of the paper ("2 convolutions, 2 noisy linear layers").
Windows of the convolutions do not overlap, so on packed frames (patches.py) both are plain matrix
products, without a permutation of anything large.

Letters: n states, H frames of a state (its history), A actions, Z atoms of a return's distribution;
p, q sides of the windows as in patches.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...model.heads import mark_head
from .noisy import NoisyLinear
from .patches import FramePatches, check_sizes

HEAD = ("value_out", "advantage_out")  # what a new task replaces
# The body, in the order of its depths.
BODY = ("trunk.first", "trunk.second", "value_hidden", "advantage_hidden")

Mix = Callable[[int, Tensor], Tensor]  # a depth and the output there -> what goes on instead


class PatchLinear(nn.Linear):
    """A convolution on cells that are laid out already: [n, cells, in] -> [n, cells, out].

    ``scale`` multiplies the input, by way of the weight, which is far smaller: 1/255 for pixels.
    They also stay integers below 256 so, which bfloat16 holds exactly.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(self, in_features: int, out_features: int, scale: float = 1.0) -> None:
        super().__init__(in_features, out_features)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight if self.scale == 1 else self.weight * self.scale
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"


class PatchTrunk(nn.Module):
    """The two convolutions: ``cells`` of packed states [n, H, cells, p*p] of uint8, then
    ``features`` [n, D].

    D = blocks * widths[1], block by block. Layers: ``first`` on cells, its inputs by frame, then
    pixel; ``second`` on blocks, its inputs by cell, then channel. ``kernels`` gives them as
    weights of ``F.conv2d``.
    """

    row_wise = True  # see ``executors.graphs``

    def __init__(self, history: int, patches: FramePatches, widths: Sequence[int]) -> None:
        super().__init__()
        (p, q), (w1, w2) = patches.patches, widths
        self.patches, self.history, self.widths = patches, history, (w1, w2)
        self.blocks = math.prod(patches.blocks)
        self.num_features = self.blocks * w2
        self.first = PatchLinear(history * p * p, w1, scale=1 / 255)
        self.second = PatchLinear(q * q * w1, w2)

    def features(self, cells: Tensor, mix: Mix | None = None) -> Tensor:
        """Of what ``cells`` gives. mix: see ``RainbowNetwork.body``."""
        x = torch.relu_(self.first(cells))
        x = x if mix is None else mix(0, x)
        x = torch.relu_(self.second(self.by_block(x)))
        x = x if mix is None else mix(1, x)
        return x.flatten(1)

    def cells(self, states: Tensor) -> Tensor:
        """Packed states [n, H, cells, p*p] as inputs of ``first``, [n, cells, H*p*p].

        Bytes become numbers and change places in one copy.
        """
        n, history, cells, pixels = states.shape
        dtype = next(self.parameters()).dtype
        x = torch.empty(n, cells, history, pixels, dtype=dtype, device=states.device)
        return x.copy_(states.transpose(1, 2)).flatten(2)

    def by_block(self, cells: Tensor) -> Tensor:
        """Outputs of ``first`` [n, cells, w1] as inputs of ``second``, [n, blocks, q*q*w1]."""
        return cells.view(len(cells), self.blocks, -1)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """The weights as of two convolutions, [w1, H, p, p] for pixels in [0, 1] and
        [w2, w1, q, q]; the biases are those of the layers."""
        (p, q), (w1, w2) = self.patches.patches, self.widths
        return (
            self.first.weight.view(w1, self.history, p, p),
            self.second.weight.view(w2, q, q, w1).permute(0, 3, 1, 2),
        )


class RainbowNetwork(nn.Module):
    """States [n, H, height, width], or packed [n, H, *packed shape], of uint8 -> logits [n, A, Z].

    Args:
        num_actions: A. num_atoms: Z. hidden: units of each stream. history: H.
        frame_shape: height and width. patches: sides of the convolutions' windows. widths: their
            channels. noise_std: of the noisy layers at the start.

    Modules: ``trunk``, ``value_hidden``, ``advantage_hidden``, ``value_out``, ``advantage_out``;
    the last two are the head, which a new task replaces.

    Raises:
        ValueError: arguments out of range; on a call, states of another shape or dtype.
    """

    row_wise = True  # see ``executors.graphs``
    keeps_input = True  # see ``HubPathway``

    def __init__(
        self,
        num_actions: int,
        num_atoms: int = 51,
        hidden: int = 256,
        history: int = 4,
        frame_shape: Sequence[int] = (84, 84),
        patches: Sequence[int] = (5, 5),
        widths: Sequence[int] = (32, 64),
        noise_std: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_actions", num_actions, 1),
            ("num_atoms", num_atoms, 2),
            ("hidden", hidden, 1),
            ("history", history, 1),
        ):
            if type(value) is not int or value < least:
                raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
        self.num_actions, self.num_atoms = num_actions, num_atoms
        self.hidden, self.history = hidden, history
        self.widths = check_sizes("widths", widths, 2)
        self.patches = FramePatches(frame_shape, patches)
        self.noise_std = noise_std
        self.trunk = PatchTrunk(history, self.patches, self.widths)
        features = self.trunk.num_features
        self.value_hidden = NoisyLinear(features, hidden, noise_std)
        self.advantage_hidden = NoisyLinear(features, hidden, noise_std)
        self.value_out = NoisyLinear(hidden, num_atoms, noise_std)
        self.advantage_out = NoisyLinear(hidden, num_actions * num_atoms, noise_std)
        mark_head(self, HEAD)

    def forward(self, states: Tensor) -> Tensor:
        return self.head(*self.body(self.cells(states)))

    def cells(self, states: Tensor) -> Tensor:
        """States in either form -> what ``body`` takes, in the parameters' dtype.

        What it gives, it also takes, and leaves as it is: several networks can share it.
        """
        count, pixels = self.patches.shape
        shape = (count, self.history * pixels)
        floats = isinstance(states, Tensor) and states.is_floating_point()
        if floats and tuple(states.shape[1:]) == shape:
            return states
        return self.trunk.cells(self.packed(states))

    def body(self, cells: Tensor, mix: Mix | None = None) -> tuple[Tensor, Tensor]:
        """-> the hidden units [n, hidden] of both streams.

        mix: gets the output after the ReLU at each depth of ``BODY``, in their order, and gives
        what the network goes on with.
        """
        features = self.trunk.features(cells, mix)
        value = torch.relu_(self.value_hidden(features))
        advantage = torch.relu_(self.advantage_hidden(features))
        return (value, advantage) if mix is None else (mix(2, value), mix(3, advantage))

    def head(self, value: Tensor, advantage: Tensor) -> Tensor:
        """Hidden units of both streams -> logits [n, A, Z]."""
        advantage = self.advantage_out(advantage).view(-1, self.num_actions, self.num_atoms)
        return dueling_logits(self.value_out(value)[:, None], advantage)

    def widths_of_body(self) -> tuple[int, ...]:
        """Channels, the last dimension, of the output at each depth of ``BODY``."""
        return (*self.widths, self.hidden, self.hidden)

    def packed(self, states: Tensor) -> Tensor:
        """States in either form -> packed, [n, H, *packed shape]; ValueError for others."""
        plain, packed = self.patches.frame_shape, self.patches.shape
        if isinstance(states, Tensor) and states.dtype == torch.uint8 and states.dim() == 4:
            if tuple(states.shape[1:]) == (self.history, *packed):
                return states
            if tuple(states.shape[1:]) == (self.history, *plain):
                return self.patches.pack(states)
        found = (
            f"{states.dtype} {list(states.shape)}"
            if isinstance(states, Tensor)
            else type(states).__name__
        )
        raise ValueError(
            f"states: expected uint8 [n, {self.history}, {plain[0]}, {plain[1]}], or packed "
            f"[n, {self.history}, {packed[0]}, {packed[1]}], got {found}"
        )

    def config(self) -> dict:
        """The constructor's arguments, as plain types."""
        return {
            "num_actions": self.num_actions,
            "num_atoms": self.num_atoms,
            "hidden": self.hidden,
            "history": self.history,
            "frame_shape": list(self.patches.frame_shape),
            "patches": list(self.patches.patches),
            "widths": list(self.widths),
            "noise_std": self.noise_std,
        }


def check_alike(
    networks: Sequence[RainbowNetwork], atoms: Tensor, method: str, least: int,
    names: Sequence[str] | None = None,
) -> None:  # fmt: skip
    """Raises ValueError unless networks are enough for a method, fit each other and the atoms.

    names: of ``config()`` that must be equal. None: all but the noise at the start, which says
    nothing of what is there now.
    """
    if len(networks) < least:
        raise ValueError(f"networks: {method} needs at least {least}, got {len(networks)}")
    configs = [network.config() for network in networks]
    first = configs[0]
    for name in names or [name for name in first if name != "noise_std"]:
        for number, config in enumerate(configs, 1):
            if config[name] != first[name]:
                raise ValueError(
                    f"networks: {method} needs the same {name} in all, but it is {first[name]} in "
                    f"the first and {config[name]} in number {number}; take sources that were "
                    "trained with the same settings, with heads for one game"
                )
    if list(atoms.shape) != [first["num_atoms"]]:
        raise ValueError(
            f"atoms: expected [{first['num_atoms']}] as the networks, got {list(atoms.shape)}"
        )


def dueling_logits(value: Tensor, advantage: Tensor) -> Tensor:
    """[N, 1, Z] and [N, A, Z] -> [N, A, Z]: value + advantage - its mean over actions.

    Raises:
        ValueError: other shapes.
    """
    fits = (
        advantage.dim() == 3
        and list(value.shape) == [advantage.shape[0], 1, advantage.shape[2]]
        and advantage.shape[1] > 0
    )
    if not fits:
        raise ValueError(
            "value, advantage: expected [N, 1, Z] and [N, A, Z], got "
            f"{list(value.shape)} and {list(advantage.shape)}"
        )
    return advantage + (value - advantage.mean(dim=1, keepdim=True))
