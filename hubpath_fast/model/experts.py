"""Experts that are added to a model, or taken away: the calls; see ``surgery`` for what changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .batch_norm import check_batch_norm
from .feature_generator import always_on
from .normalization import normalization_rows
from .surgery import check_not_frozen, check_resizable, resize_aggregator, resize_generator

if TYPE_CHECKING:
    from .pathway import HubPathway


class ChangingExperts:
    """The calls of a ``HubPathway`` that change its number of experts."""

    def add_expert(
        self: HubPathway,
        module: nn.Module,
        mean: Sequence[float] | Tensor | None = None,
        std: Sequence[float] | Tensor | None = None,
        score: float = 0.0,
    ) -> None:
        """Appends ``module`` to the experts, in place, with all that was learned kept.

        The aggregator adds the new expert's weighted output to the prediction, as a fresh one does.
        Its scores are the mean of the other experts' plus ``score``: at 0 it is chosen as often as
        an average expert, at -30 never before it has learned (the prediction then stays as it was).
        Its noise scale is the mean of the others'. Parameters that grow are new objects: an
        optimizer must be made again.

        Args:
            module: x [n, ...] -> [n, C, ...], C as of the other experts; moved to their device.
            mean, std: [channels] of its images, in units of images in [0, 1]; needed where the
                model has a normalisation, and only there.
            score: added to the new expert's clean score.

        Raises:
            ValueError: a wrong argument, a frozen model, a BatchNorm without running statistics, a
                generator other than a ``PathwayGenerator`` or a ``FeatureGenerator``, an aggregator
                of another kind than this package's; a hub that ``add_newcomer`` was used on.
                Nothing is changed then.
        """
        if not isinstance(module, nn.Module):
            raise ValueError(f"module: expected an nn.Module, got {type(module).__name__}")
        check_not_frozen(self)
        check_batch_norm([("module", module)])
        rows = normalization_rows(self.input_mean, mean, std)
        check_resizable(self.generator, self.aggregator)
        kept = range(len(self.experts))
        resize_generator(self.generator, kept, score)
        resize_aggregator(self.aggregator, kept, one_more=True)
        if rows is not None:
            self.input_mean = torch.cat([self.input_mean, rows[0]])
            self.input_std = torch.cat([self.input_std, rows[1]])
        device = self.generator.clean.weight.device
        self.origin = self.origin.with_module(module)
        self.experts.append(module.to(device).train(self.training))
        self._restart_executor()

    def remove_expert(self: HubPathway, index: int) -> nn.Module:
        """Takes expert ``index`` (0..M-1, or negative from the end) away, in place, and returns it.

        Predictions stay as they were for every input that gave this expert no weight; where it had
        some, the others' weights grow, since they are a softmax over the experts that remain.

        Raises:
            ValueError: no such expert; a frozen model; fewer experts than K would remain (lower
                ``model.k`` first); a generator or an aggregator that ``add_expert`` does not take;
                the expert whose features the generator looks at.
        """
        check_not_frozen(self)
        count = len(self.experts)
        if not isinstance(index, int) or not -count <= index < count:
            raise ValueError(f"index: expected an expert, 0..{count - 1}, got {index!r}")
        if count == 1:
            raise ValueError("index: the only expert cannot be removed")
        if count - 1 < self.k:
            raise ValueError(
                f"index: without expert {index} there are {count - 1} experts for k={self.k} "
                "active ones; lower model.k first"
            )
        kept = [i for i in range(count) if i != index % count]
        check_resizable(self.generator, self.aggregator, kept)
        watched = always_on(self.generator)
        if watched is not None and watched.source.module is self.experts[index]:
            raise ValueError(
                f"index: the router looks at the features of expert {index} ({watched.source.name})"
                " for every sample; remove another, or build a new HubPathway"
            )
        resize_generator(self.generator, kept)
        resize_aggregator(self.aggregator, kept, one_more=False)
        if self.input_mean is not None:
            self.input_mean, self.input_std = self.input_mean[kept], self.input_std[kept]
        module = self.experts[index]
        self.origin = self.origin.without(index % count)
        del self.experts[index]
        self._restart_executor()
        return module
