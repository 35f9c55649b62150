"""A model that is made ready: compiled, or frozen for predictions alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .inference import TRAINING, freeze

if TYPE_CHECKING:
    from .pathway import HubPathway


class GettingReady:
    """The calls of a ``HubPathway`` that compile or freeze it."""

    def compile_experts(self: HubPathway, **options) -> HubPathway:
        """Compiles each expert by ``torch.compile`` with dynamic shapes, in place; returns self.

        Group sizes differ at every step, and a compiled expert serves them all (but 1, which torch
        specialises). Parameters, state dict and executor stay as they are; a copied or unpickled
        model, and an expert added later, is not compiled.

        Args:
            options: of ``torch.compile``, such as ``mode`` and ``backend``.
        """
        for expert in self.experts:
            expert.compile(**{"dynamic": True} | options)
        self._compiled = True
        return self

    def freeze_for_inference(
        self: HubPathway,
        dtype: torch.dtype | None = None,
        memory_format: torch.memory_format | None = None,
        compile: bool = False,
        example: Tensor | None = None,
    ) -> HubPathway:
        """Makes the model ready for predictions alone, in place; returns self.

        Evaluation mode; BatchNorm folded into the convolutions before it, wherever one call shows
        that nothing else reads those (predictions stay the same to about 1e-6 of the largest); no
        gradients. With ``executor="graphs"`` the predictions of one image are captured. It cannot
        be trained, saved or copied into any more: its state dict has other names. ``frozen`` says
        what became of each part; it is None of a model that is not frozen.

        Args:
            dtype: of the experts: float32, bfloat16 or float16; router and aggregator stay as they
                are, so that images still go where they went. None: as they are.
            memory_format: of the weights; channels_last is faster where convolutions have many
                channels. None: as they are.
            compile: also compiles the experts: see ``compile_experts``.
            example: images [N, ...] as predictions get them, to watch the parts with. None: drawn,
                of the input size that ``create_model`` gave the model; without it BatchNorm stays.

        Raises:
            ValueError: a wrong argument; a model that is frozen or compiled already; an example
                that an expert fails on; in training mode afterwards.
        """
        freeze(self, dtype, memory_format, compile, example)
        return self

    def train(self: HubPathway, mode: bool = True) -> HubPathway:
        if mode and self.frozen is not None:
            raise ValueError(TRAINING)
        return super().train(mode)

    @property
    def experts_dtype(self: HubPathway) -> torch.dtype | None:
        """Of a model whose experts were given a dtype of their own; None: the images'."""
        return None if self.frozen is None else self.frozen.dtype
