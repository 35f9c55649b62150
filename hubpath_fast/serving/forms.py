"""A hub as a program that torch.export can keep whole: three forms around the model's own parts.

``HubPathway`` cannot be exported: how many rows an expert gets is read on the host, and an exported
program would keep the numbers of its example. Each form here says in plain tensor operations, with
no custom ones, which expert sees which image, and takes the parts of the model as they are:

    sparse  an expert runs on its own images and one or two spare ones, so that no group is ever
            empty: an empty one is what torch.export cannot exclude by itself, and refuses. Some
            networks ask whether they have one image alone (ConvNeXt does): those need two
    cond    ``torch.cond``: an expert runs on the whole batch if any of its images wants it, and not
            at all else; a batch of 1 costs exactly K forwards
    dense   every expert runs on the whole batch, and what nobody asked for is masked

A model with ``FixedRoutes`` has one form only, dense: its K experts run on every image, and the
others are no part of the program.

Shapes: N images, M experts, K active ones, C outputs, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._torch_rows import accumulator
from ..model import FixedRoutes, HubPathway
from ..model.description import describe

TAKEN = -1.0  # below every probability
# Throughout: images.shape[0], since len() would make the size of the example fixed.


@dataclass
class Progress:
    """Which expert a form is at: what an exporter raises says nothing of that. index: None outside
    of the experts."""

    index: int | None = None


class Form(nn.Module):
    """uint8 images [N, 3, S, S] -> the answer, or (the answer, experts [N, K], weights [N, K]).

    The answer is probabilities [N, C], or what the model itself predicts [N, C, ...].

    ``score_shift``, zeros float32 [1, M], is added to the router's scores. It changes nothing, and
    lets a finished package be asked for an expert that no image reaches: see ``proof``.

    Args:
        model: a ``HubPathway`` with a normalisation, in evaluation mode.
        size: S.
        probabilities: whether the answer is the softmax of the prediction.
        routing: whether experts and weights are returned.
    """

    name: str

    def __init__(self, model: HubPathway, size: int, probabilities: bool, routing: bool):
        super().__init__()
        self.experts, self.generator = model.experts, model.generator
        self.aggregator = model.aggregator
        policy = model.policy
        self.k = model.k if policy is None or policy.k is None else policy.k
        self.top_mass = None if policy is None else policy.top_mass
        self.renormalize = model.renormalize
        self.size, self.probabilities, self.routing = size, probabilities, routing
        self.channels_last = describe(model)["channels_last"]
        self.dtype = model.input_mean.dtype
        self.rows_dtype = model.experts_dtype or self.dtype
        compute = accumulator(self.dtype)  # the arithmetic of ``functional.gather``
        mean, std = model.input_mean, model.input_std
        self.register_buffer("scale", (1 / (std * 255)).to(compute)[:, :, None, None])
        self.register_buffer("shift", (-mean / std).to(compute)[:, :, None, None])
        penalty = None if policy is None else policy.penalty
        if penalty is not None:
            self.register_buffer("penalty", mean.new_tensor(penalty, dtype=compute))
        self.penalized = penalty is not None
        # Not [M]: AOTInductor writes vectors of up to 8 numbers into its code, where nothing sets
        # them. Of one type in every hub: a compiled package takes bytes for what they should be.
        shape = 1, len(model.experts)
        self.register_buffer("score_shift", mean.new_zeros(shape, dtype=torch.float32))
        self.progress = Progress()

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        weights, experts = self.route(images)
        # Added up: a slot that is not needed names the first one's expert, with a weight of 0.
        by_expert = weights.new_zeros(images.shape[0], len(self.experts))
        by_expert = by_expert.scatter_add(1, experts, weights)
        asked = torch.zeros_like(by_expert, dtype=torch.bool).scatter(1, experts, True)
        parts: list[Tensor | None] = []
        for index in range(len(self.experts)):
            self.progress.index = index
            parts.append(self.ask(index, images, asked[:, index], by_expert[:, index]))
        self.progress.index = None
        known = next(part for part in parts if part is not None)
        parts = [torch.zeros_like(known) if part is None else part for part in parts]
        answer = self.aggregator(torch.cat(parts, dim=1))
        answer = torch.softmax(answer, dim=1) if self.probabilities else answer
        return (answer, experts, weights) if self.routing else answer

    def route(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(weights [N, K], experts [N, K] int64), as ``HubPathway.route`` without noise."""
        clean, _ = self.generator(images.to(self.dtype) / 255)
        clean = clean.to(accumulator(clean.dtype)) + self.score_shift
        clean = clean - self.penalty if self.penalized else clean
        p = torch.softmax(clean, dim=1)
        left, taken = p, []
        for _ in range(self.k):  # the lowest index first among equals, as topk does not promise
            taken.append(left.argmax(dim=1, keepdim=True))
            left = left.scatter(1, taken[-1], TAKEN)
        experts = torch.cat(taken, dim=1)
        weights = p.gather(1, experts)
        if self.top_mass is not None:
            before = F.pad(weights.cumsum(dim=1)[:, :-1], (1, 0))
            needed = before < self.top_mass
            weights = torch.where(needed, weights, 0)
            experts = torch.where(needed, experts, experts[:, :1])
        if self.renormalize:
            weights = weights / weights.sum(dim=1, keepdim=True)
        return weights, experts

    def ask(self, index: int, images: Tensor, asked: Tensor, weight: Tensor) -> Tensor | None:
        """An expert's weighted outputs [N, C, ...], zeros for images that do not ask it; None: of
        zeros alone. asked: [N] bool. weight: [N]."""
        raise NotImplementedError

    def outputs(self, index: int, images: Tensor) -> Tensor:
        """[n, C, ...] of an expert for images as they come, uint8."""
        x = images.to(self.scale.dtype) * self.scale[index] + self.shift[index]
        x = x.to(self.rows_dtype)
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.experts[index](x).to(self.dtype)


class Sparse(Form):
    """spares: [M], the spare images of each expert."""

    name = "sparse"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.spares = [1] * len(self.experts)

    def ask(self, index: int, images: Tensor, asked: Tensor, weight: Tensor) -> Tensor:
        own, spare = asked.nonzero().squeeze(1), self.spares[index]
        with_spare = torch.cat([own, own.new_zeros(spare)])
        outputs = self.outputs(index, images.index_select(0, with_spare))[:-spare]
        outputs = weighted(outputs, weight.index_select(0, own))
        return outputs.new_zeros(images.shape[0], *outputs.shape[1:]).index_copy(0, own, outputs)


class Cond(Form):
    name = "cond"

    @torch.no_grad()
    def __init__(self, model: HubPathway, *args: Any):
        super().__init__(model, *args)
        # As an expert's that is skipped, whose are zeros.
        [self.row] = self.outputs(0, blank(model, 1, self.size))

    def ask(self, index: int, images: Tensor, asked: Tensor, weight: Tensor) -> Tensor:
        shape, dtype = self.row.shape, self.row.dtype

        def run(images: Tensor) -> Tensor:
            return self.outputs(index, images).contiguous()

        def skip(images: Tensor) -> Tensor:
            return torch.zeros(images.shape[0], *shape, dtype=dtype, device=images.device)

        outputs = torch.cond(asked.any(), run, skip, (images,))
        return masked(weighted(outputs, weight), asked)


class Dense(Form):
    name = "dense"

    def ask(self, index: int, images: Tensor, asked: Tensor, weight: Tensor) -> Tensor:
        return masked(weighted(self.outputs(index, images), weight), asked)


class Fixed(Form):
    """Of a model with ``FixedRoutes``: nothing is looked at to choose."""

    name = "dense"

    def __init__(self, model: HubPathway, *args: Any):
        super().__init__(model, *args)
        routing = model.route(blank(model, 1, self.size))
        self.asked = frozenset(routing.experts[0].tolist())
        self.register_buffer("fixed_experts", routing.experts[0])
        self.register_buffer("fixed_weights", routing.weights[0])

    def route(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shape = images.shape[0], len(self.fixed_experts)
        return self.fixed_weights.expand(shape), self.fixed_experts.expand(shape)

    def ask(self, index: int, images: Tensor, asked: Tensor, weight: Tensor) -> Tensor | None:
        if index not in self.asked:
            return None
        return weighted(self.outputs(index, images), weight)


def blank(model: HubPathway, count: int, size: int) -> Tensor:
    """uint8 images [count, channels, S, S] of zeros."""
    mean = model.input_mean
    shape = count, mean.shape[1], size, size
    return torch.zeros(shape, dtype=torch.uint8, device=mean.device)


FORMS: dict[str, type[Form]] = {form.name: form for form in (Sparse, Cond, Dense)}


def make_form(model: HubPathway, name: str, size: int, probabilities: bool, routing: bool) -> Form:
    """The form of that name; of a model with ``FixedRoutes`` the one that it has."""
    kind = Fixed if isinstance(model.generator, FixedRoutes) else FORMS[name]
    return kind(model, size, probabilities, routing).eval()


def ladder(model: HubPathway, batch: int | None, compiled: bool = False) -> tuple[str, ...]:
    """The forms to try, the cheapest first. batch: the only batch size; None: any. compiled:
    whether AOTInductor is to compile them: what that of torch 2.14 makes of the sparse form of a
    small convolutional hub is wrong on every image, of the others right."""
    if isinstance(model.generator, FixedRoutes):
        return ("dense",)
    if compiled:
        return ("cond", "dense")
    return ("cond", "sparse", "dense") if batch == 1 else ("sparse", "cond", "dense")


def forwards(form: Form, n: int) -> int:
    """How many images go through the experts for a batch of n, at most; what a router that looks at
    an expert's features has it do is not counted."""
    m = len(form.experts)
    if isinstance(form, Fixed):
        return n * len(form.asked)
    if isinstance(form, Sparse):
        return n * form.k + sum(form.spares)
    return n * (min(m, n * form.k) if isinstance(form, Cond) else m)


def weighted(outputs: Tensor, weight: Tensor) -> Tensor:
    """[n, C, ...] times [n], in the weights' precision and rounded once, as ``combine`` does."""
    weight = weight.view(-1, *[1] * (outputs.dim() - 1))
    return (outputs * weight).to(outputs.dtype)


def masked(outputs: Tensor, asked: Tensor) -> Tensor:
    """Zeros where nobody asked: a weight of 0 would keep what is not finite."""
    return torch.where(asked.view(-1, *[1] * (outputs.dim() - 1)), outputs, 0)
