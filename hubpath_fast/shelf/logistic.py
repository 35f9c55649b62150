"""Linear heads by regularised multinomial logistic regression, cross-validated: in a second.

    minimise over W, b:  mean over images of -log softmax(W z + b)[y]  +  decay / 2 |W|^2

of features z that are standardised, each by itself. All folds are fitted at once: their heads stand
side by side in one product, in which the images that a fold leaves out count nothing; what its head
says of these comes with it. Decays fall by equal factors, and each starts where the last two point
to, until the loss on the images left out rises.

What makes it quick is the choice of coordinates: along the principal axes of the features the
curvature of the loss is near a known diagonal (s times the axis' variance, plus the decay; s the
mean curvature of the softmax), from which L-BFGS starts at every step. What it has learnt of the
curvature at one decay holds for the next, where the gradient has changed by the penalty's share.

Letters: n images, D features, r of their principal axes, C classes, B heads at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import ROWS, check_images, spanned

FOLDS = 5
DECAYS = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003, 0.0001)
HISTORY = 8
MAX_STEPS = 100
TOLERANCE = 1e-4  # of the loss that a step is expected to gain, relative to the loss
NO_LOSS = 1e-3  # nats: of images of one class alone the loss has no minimum above 0
BLOCK = 1 << 20  # logits at a time: 4 MiB stay in the cache
NO_AXIS = 1e-7  # of the variance along an axis to the largest: float32 knows no less
SUFFICIENT = 1e-4  # of the decrease that the slope promises, for a step to be taken
MAX_HALVINGS = 20

Pair = tuple[Tensor, Tensor, Tensor]  # a change of weights, the gradient's, and their product [B]


@dataclass(frozen=True)
class Fitted:
    """A head, and what cross-validation says of it.

    weight: float32 [C, D]. bias: [C]. decay: chosen. accuracy, loss: on images that were left out.
    out_of_fold: float32 [n, C], what the heads say that did not see an image. passes: over the
    data, that it took.
    """

    weight: Tensor
    bias: Tensor
    decay: float
    accuracy: float
    loss: float
    out_of_fold: Tensor
    passes: int


def folds_of(targets: Tensor, seed: int, folds: int = FOLDS) -> Tensor:
    """The fold of each image, int64 [n]: a class' images, shuffled, are dealt in turn, from where
    the class before has stopped."""
    draw = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(targets), generator=draw)
    order = shuffled[targets[shuffled].argsort(stable=True)]
    found = torch.empty(len(targets), dtype=torch.int64)
    found[order] = torch.arange(len(targets)) % folds
    return found


def fit_logistic(
    features: Tensor,
    targets: Tensor,
    num_classes: int,
    folds: Tensor,
    decays: tuple[float, ...] = DECAYS,
) -> Fitted:
    """features: [n, D]. targets, folds: int64 [n]. decays: falling.

    Raises ValueError for fewer images than classes, and for features that are not finite.
    """
    check_images(targets, num_classes)
    axes = Axes.of(features)
    count = int(folds.max()) + 1
    inside = folds[:, None] != torch.arange(count)
    problem = Problem(axes, targets, num_classes, inside)
    weights = torch.zeros(num_classes, count, axes.dimensions + 1)
    before: Tensor | None = None
    best: tuple[float, float, Tensor, Tensor] | None = None
    for decay in decays:
        start = weights if before is None else 2 * weights - before
        before, weights = weights, problem.minimise(start, decay)
        out = problem.logits.mT.contiguous()
        loss = float(torch.nn.functional.cross_entropy(out.double(), targets))
        if best is not None and loss >= best[0]:
            break
        best = loss, decay, out, weights
    loss, decay, out, weights = best
    whole = Problem(axes, targets, num_classes, torch.ones(len(targets), 1, dtype=torch.bool))
    whole.curvature = problem.curvature
    weight, bias = axes.unfolded(whole.minimise(weights.mean(1, keepdim=True), decay)[:, 0])
    accuracy = float((out.argmax(1) == targets).double().mean())
    return Fitted(weight, bias, decay, accuracy, loss, out, problem.passes)


@dataclass(frozen=True)
class Axes:
    """Features along their principal axes, once standardised.

    seen: float32 [n, r + 1], the last 1. variances: [r], along each axis. basis: [D, r], float64,
    of what is standardised. mean, scale: [D]; 0 of a feature that is the same of all images.
    """

    seen: Tensor
    variances: Tensor
    basis: Tensor
    mean: Tensor
    scale: Tensor

    @property
    def dimensions(self) -> int:
        return len(self.variances)

    @classmethod
    def of(cls, features: Tensor) -> Axes:
        n, width = features.shape
        blocks = features.split(ROWS)
        mean = sum(block.double().sum(0) for block in blocks) / n
        if not mean.isfinite().all():
            raise ValueError("features: expected finite numbers, got some that are not")
        deviation = (sum((b.double() - mean).square().sum(0) for b in blocks) / n).sqrt()
        alike = deviation <= 1e-6 * mean.abs()  # what float32 leaves of equal numbers
        scale = (1 / deviation).masked_fill(alike, 0)
        unit = (features.float() - mean.float()).mul_(scale.float())
        if width > n:
            seen, basis = spanned(unit)
            variances = seen.square().sum(0) / n
        else:
            variances, basis = torch.linalg.eigh((unit.mT @ unit).double() / n)
        kept = variances > NO_AXIS * variances.max().clamp_min(1e-30)
        basis, variances = basis[:, kept], variances[kept]
        seen = unit @ basis.float()
        ones = torch.ones(n, 1)
        return cls(torch.cat([seen, ones], 1), variances.float(), basis, mean, scale)

    def unfolded(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The head (weight [C, D], bias [C]) on features as they are, of weights [C, r + 1]."""
        weight = weights[:, :-1].double() @ self.basis.mT * self.scale
        bias = weights[:, -1].double() - weight @ self.mean
        return weight.float(), bias.float()


class Problem:
    """B heads on the same images, each on those that are ``inside``: bool [n, B].

    logits: [C, n], of the head at the last pass that an image was outside of. curvature: s of the
    softmax there, to begin with as it is where all logits are 0. Classes come first everywhere:
    torch's softmax over few of them is quick only where they do not lie side by side.
    """

    def __init__(self, axes: Axes, targets: Tensor, num_classes: int, inside: Tensor):
        self.axes, self.targets, self.classes = axes, targets, num_classes
        self.weight = (inside / inside.sum(0)).mT  # [B, n], of an image in a head's mean
        self.outside = (~inside).float().argmax(1)
        self.logits = torch.zeros(num_classes, len(targets))
        self.curvature, self.passes = 1 / num_classes, 0
        self._history: list[Pair] = []
        self._decay = 0.0  # of the history
        self._penalised = torch.ones(axes.dimensions + 1)
        self._penalised[-1] = 0  # the intercept
        self.rows = max(1, BLOCK // (self.heads * num_classes))

    @property
    def heads(self) -> int:
        return len(self.weight)

    def value_and_gradient(self, weights: Tensor, decay: float) -> tuple[Tensor, Tensor]:
        """weights: [C, B, r + 1] -> (float64 [B], as the weights)."""
        self.passes += 1
        value = 0.5 * decay * weights[..., :-1].double().square().sum((0, 2))
        gradient = decay * weights
        gradient[..., -1] = 0
        flat, out = weights.flatten(0, 1), gradient.flatten(0, 1)
        for start in range(0, len(self.targets), self.rows):
            part = slice(start, start + self.rows)
            seen, targets, share = self.axes.seen[part], self.targets[part], self.weight[:, part]
            row = torch.arange(len(targets))
            logits = (flat @ seen.mT).view(self.classes, self.heads, len(targets))
            self.logits[:, part] = logits[:, self.outside[part], row]
            logs = logits.log_softmax(0)
            value -= (logs[targets, :, row].mT * share).double().sum(1)
            slope = logs.exp_()
            slope[targets, :, row] -= 1
            slope *= share
            out.addmm_(slope.flatten(0, 1), seen)
        return value, gradient

    def minimise(self, weights: Tensor, decay: float) -> Tensor:
        """L-BFGS of all heads side by side, each with its own history and step."""
        variances = torch.cat([self.axes.variances, torch.ones(1)])
        start = 1 / (self.curvature * variances + decay * self._penalised)
        history = self._history_at(decay)
        value, gradient = self.value_and_gradient(weights, decay)
        for _ in range(MAX_STEPS):
            step = _direction(gradient, start, history)
            slope = _dot(gradient, step)
            if bool((-slope <= 2 * TOLERANCE * (value + NO_LOSS)).all()):
                break
            moved, new_value, new_gradient = self._search(weights, decay, step, value, slope)
            change, bend = moved - weights, new_gradient - gradient
            history = [*history, (change, bend, _dot(change, bend))][-HISTORY:]
            weights, value, gradient = moved, new_value, new_gradient
        self._history, self._decay = history, decay
        probabilities = self.logits.softmax(0)
        spread = (1 - probabilities.square().sum(0)).mean() / (self.classes - 1)
        self.curvature = max(float(spread), 1e-3 / self.classes)
        return weights

    def _history_at(self, decay: float) -> list[Pair]:
        """Of the decay before, as the gradient would have changed with this one."""
        moved = []
        for change, bend, _ in self._history:
            bend = bend + (decay - self._decay) * self._penalised * change
            moved.append((change, bend, _dot(change, bend)))
        return moved

    def _search(self, weights, decay, step, value, slope):
        """A point of sufficient decrease for each head, halving the steps of those that have none;
        the last pass is at the points that are returned."""
        length = torch.ones(self.heads)
        for _ in range(MAX_HALVINGS):
            moved = weights + length[:, None] * step
            new_value, gradient = self.value_and_gradient(moved, decay)
            # float32's rounding of a mean of losses is no increase.
            slack = 1e-6 * value
            worse = new_value > value + SUFFICIENT * length * slope + slack
            if not bool(worse.any()):
                return moved, new_value, gradient
            length = torch.where(worse, length / 2, length)
        return moved, new_value, gradient


def _direction(gradient: Tensor, start: Tensor, history: list[Pair]) -> Tensor:
    """L-BFGS's two loops, of each head by itself; a pair without curvature counts nothing."""
    direction, along = -gradient, []
    for change, bend, product in reversed(history):
        useful = product > 1e-12
        alpha = torch.where(useful, _dot(change, direction) / product, 0.0).float()
        direction = direction - alpha[:, None] * bend
        along.append(alpha)
    direction = start * direction
    if history:
        change, bend, product = history[-1]
        scaled = _dot(bend, start * bend)
        factor = torch.where(product > 1e-12, product / scaled, 1.0).float()
        direction = factor[:, None] * direction
    for (change, bend, product), alpha in zip(history, reversed(along), strict=True):
        useful = product > 1e-12
        beta = torch.where(useful, _dot(bend, direction) / product, 0.0).float()
        direction = direction + (alpha - beta)[:, None] * change
    return direction


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of [C, B, r + 1] each: float64 [B]."""
    return (a * b).sum((0, 2), dtype=torch.float64)
