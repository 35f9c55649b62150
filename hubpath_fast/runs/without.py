"""What a hub scores without each one of its experts, from what it said once.

An expert that is taken away changes an image in one of two ways. Where it is active, another takes
its place: the image is routed again, among the experts that stay; there are K such pairs of an
image and an expert, however many experts there are. Elsewhere the same K stay active, and the
softmax over one expert less multiplies their weights by 1 / (1 - p) of the expert taken away. With
renormalised weights that changes nothing; else the prediction is

    y = b + s v,    s = 1 / (1 - p),    v = sum over the active of w_i A_i o_i

of an aggregator that adds up what it makes of each expert (``answers.terms``), and neither the
router nor a product over experts is needed for it. Any other aggregator is called for each such
pair.

Letters: n images, M experts, m of them kept, K active, C outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import functional as HF
from ..routing import Routing
from ..training import Task
from .answers import CHUNK, HubAnswers, terms

AT_ONCE = 2**21  # outputs that are looked at at a time


class WithoutOne:
    """Scores of hubs that lack one more expert, by the metric of the task.

    answers: of a hub with a router.
    """

    def __init__(self, answers: HubAnswers, task: Task):
        self.answers, self.task = answers, task
        self.additive = terms(answers.aggregator, answers.outputs)

    @torch.no_grad()
    def scores(self, kept: Sequence[int]) -> Tensor:
        """[m, n] float64: the metric of each image with the experts ``kept`` but one, each in turn.

        As the hub of these m - 1 experts alone would have it, up to roundings. kept: ascending,
        more than K of them.
        """
        chosen = torch.as_tensor(kept)
        rows = max(1, AT_ONCE // (len(chosen) * self.answers.outputs[0, 0].numel()))
        every = torch.arange(len(self.answers.clean))
        return torch.cat([self._scores(chosen, part) for part in every.split(rows)], dim=1)

    def _scores(self, chosen: Tensor, images: Tensor) -> Tensor:
        clean = self.answers.clean[images][:, chosen]
        routing = self._route(clean)
        active = routing.experts  # [n, K], positions in ``chosen``
        scores = self._unmoved(clean, chosen, active, routing.weights, images)
        # A line for each image and each of its active experts, which is out of the question there.
        rest = clean.repeat_interleave(active.shape[1], dim=0)
        rest.scatter_(1, active.flatten()[:, None], -torch.inf)
        routing, whose = self._route(rest), images.repeat_interleave(active.shape[1])
        outputs = self._outputs(whose, chosen[routing.experts], routing.weights)
        moved = self._metric(outputs, whose).view_as(active)
        return scores.scatter_(1, active, moved).t()

    def _unmoved(
        self, clean: Tensor, chosen: Tensor, active: Tensor, weights: Tensor, images: Tensor
    ) -> Tensor:
        """[n, m]: scores where the active experts stay; of no meaning for the active ones."""
        shape = clean.shape
        if self.answers.renormalize:
            scores = self._metric(self._outputs(images, chosen[active], weights), images)
            return scores[:, None].expand(shape).contiguous()
        rest = 1 - clean.double().softmax(dim=1)
        growth = 1 / rest.scatter(1, active, 1.0)
        whose = images.repeat_interleave(shape[1])
        if self.additive is None:
            grown = (growth[:, :, None] * weights[:, None]).to(weights.dtype).flatten(0, 1)
            experts = chosen[active].repeat_interleave(shape[1], dim=0)
            return self._metric(self._outputs(whose, experts, grown), whose).view(shape)
        bias = self.additive[1]
        v = self._outputs(images, chosen[active], weights) - bias
        outputs = growth.view(*shape, *[1] * (v.dim() - 1)).to(v.dtype) * v[:, None] + bias
        return self._metric(outputs.flatten(0, 1), whose).view(shape)

    def _route(self, clean: Tensor) -> Routing:
        zeros = torch.zeros_like(clean)
        return HF.noisy_topk(clean, zeros, self.answers.k, None, self.answers.renormalize)

    def _outputs(self, images: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
        """[r, C, ...] of r images, asked K experts each: experts, weights [r, K]."""
        if self.additive is None:
            dense = weights.new_zeros(len(images), self.answers.num_experts)
            dense.scatter_(1, experts, weights)
            parts = zip(images.split(CHUNK), dense.split(CHUNK), strict=True)
            return torch.cat([self.answers.subset(i).combine(w) for i, w in parts])
        added, bias = self.additive
        asked = added[images[:, None], experts]
        w = weights.to(asked.dtype).view(*weights.shape, *[1] * (asked.dim() - 2))
        return torch.where(w == 0, 0, w * asked).sum(dim=1) + bias

    def _metric(self, outputs: Tensor, images: Tensor) -> Tensor:
        return self.task.scores(self.task.predict(outputs), self.answers.targets[images])
