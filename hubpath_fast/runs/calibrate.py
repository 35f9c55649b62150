"""A newcomer's score and head, fitted on some images; nothing else of the hub changes.

Of each image is kept once what the hub says of it, the generator's features f and what the head
gets, h. With z = w f + b, and tau the K-th largest score of the others,

    loss = mean of s l(with) + (1 - s) l(without) + l(head(h)),    s = sigmoid(z - tau)

where l is the task's loss, "without" the prediction as it was and "with" the one in which the
newcomer takes the place of the K-th. Groups of images, such as the run's own and further ones,
count alike, however many images they have. The sigmoid stands for the step that the hub takes; what
is kept, of all steps and of several shifts of b, is what does best on other images by that step.
No group may lose by it, and of what is almost as good the one that sends the fewest images to the
newcomer is kept: an image that needs none should get none.
Letters: n images, M experts, K active, F features, C outputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..devices import autocast, eval_mode, to_device
from ..model import HubPathway, NewcomerGenerator
from ..model.features import KeptHead
from ..model.newcomers import MARGIN, kth_largest
from ..training import Task
from .answers import HubAnswers, ask, terms

REPORTED = 1 / 4  # of images that have no test split
CHOSEN = 1 / 3  # of the others: to choose on; the rest is fitted on
BATCH = 1024  # images of a step, at most
LR_SCORE, LR_HEAD, DECAY = 0.03, 0.01, 0.01  # of AdamW, on features of mean 0 and deviation 1
LOOKS = 20  # at the images to choose on
SHIFTS = (-12.0, -8.0, -6.0, -4.0, -3.0, -2.0, -1.0, -0.5, 0.0, 0.5, 1.0)  # of b, tried at each
ALMOST = 0.02  # of what is gained at most may be given up for sending fewer images


@dataclass(frozen=True, eq=False)
class Rest:
    """What stays of predictions when the newcomer takes the place of the K-th expert.

    experts: int64 [n, K - 1]. added: [n, K - 1, C, ...], what the aggregator makes of them if their
    weight is 1. bias: [C, 1, ...], what it adds to that."""

    experts: Tensor
    added: Tensor
    bias: Tensor

    @classmethod
    def of(cls, answers: HubAnswers) -> Rest | None:
        """None for an aggregator that does not add up."""
        found = terms(answers.aggregator, answers.outputs)
        if found is None:
            return None
        experts = answers.clean.topk(answers.k - 1, dim=1).indices
        added, bias = found
        return cls(experts, added[torch.arange(len(added))[:, None], experts], bias)

    def subset(self, images: Tensor) -> Rest:
        return Rest(self.experts[images], self.added[images], self.bias)


@dataclass(frozen=True, eq=False)
class Seen:
    """Of n images, on the host. answers: the hub's, without the newcomer. features: [n, F].
    inputs: [n, ...], of the newcomer's head. before: [n, C, ...], the hub's outputs. group: [n]
    int64, from 0 on. rest: see ``Rest``."""

    answers: HubAnswers
    features: Tensor
    inputs: Tensor
    before: Tensor
    group: Tensor
    rest: Rest | None = None

    def subset(self, images: Tensor) -> Seen:
        kept = self.features, self.inputs, self.before, self.group
        rest = None if self.rest is None else self.rest.subset(images)
        return Seen(self.answers.subset(images), *(part[images] for part in kept), rest)

    def condensed(self) -> Seen:
        """The same, of an aggregator that adds up without the outputs of experts that are of no
        matter: of a large hub most of them."""
        rest = Rest.of(self.answers)
        if rest is None:
            return self
        answers = replace(self.answers, outputs=self.answers.outputs[:, :0])
        return replace(self, answers=answers, rest=rest)

    def __len__(self) -> int:
        return len(self.features)


@dataclass(frozen=True, eq=False)
class Calibrated:
    """weight: [1, F] and bias: [1], of the newcomer's score. head: its state dict. before, after:
    the loss on the images to choose on, the mean of the groups' means. share: of them, sent to the
    newcomer."""

    weight: Tensor
    bias: Tensor
    head: dict[str, Tensor]
    before: float
    after: float
    share: float


@torch.no_grad()
def see(
    model: HubPathway,
    newcomer: nn.Module,
    normalization: tuple[Tensor, Tensor],
    batches: Iterable[tuple[Tensor, Tensor]],
    device: torch.device,
    amp: str = "none",
    room: Callable[[int], None] = lambda _: None,
) -> tuple[Seen, KeptHead]:
    """Looks at all images, twice. normalization: (mean, std), [channels] each, of the newcomer's.
    room: as of ``ask``.

    Raises ValueError for a newcomer that does not end with one head.
    """
    answers = ask(model, batches, device, amp, room)
    head = KeptHead(newcomer, "the newcomer")
    outer = model.generator
    generator = outer.generator if isinstance(outer, NewcomerGenerator) else outer
    mean, std = (value.to(device).view(-1, 1, 1) for value in normalization)
    features, inputs = [], []
    with eval_mode(model), eval_mode(newcomer):
        for images, _ in batches:
            unit = to_device(images, device)
            unit = unit.to(mean.dtype) / 255 if unit.dtype == torch.uint8 else unit
            with autocast(device, amp):
                features.append(generator.features(generator.seen(unit)).float().cpu())
                inputs.append(head.see(newcomer, (unit - mean) / std).float().cpu())
    kept = torch.cat(features), torch.cat(inputs), answers.predict()
    group = torch.zeros(len(answers.clean), dtype=torch.int64)
    return Seen(answers, *kept, group), head


def joined(seen: Seen, z: Tensor, own: Tensor) -> Tensor:
    """[n, C, ...]: the hub's outputs if every image were sent to the newcomer.

    z: [n, 1], its score. own: [n, C, ...], its outputs. Differentiable in both.
    """
    answers, rest = seen.answers, seen.rest
    clean = answers.clean
    p = torch.cat([clean, z], dim=1).softmax(dim=1)
    if rest is not None:
        weights = p.gather(1, rest.experts)
    else:
        asked = torch.zeros_like(clean)
        asked.scatter_(1, clean.topk(answers.k - 1, dim=1).indices, 1.0)
        weights = p[:, :-1] * asked
    weights = torch.cat([weights, p[:, -1:]], dim=1)
    if answers.renormalize:
        weights = weights / weights.sum(dim=1, keepdim=True)
    weights = weights.view(*weights.shape, *[1] * (own.dim() - 1))
    if rest is not None:
        others = (weights[:, :-1] * rest.added).sum(dim=1) + rest.bias
    else:
        others = answers.aggregator((weights[:, :-1] * answers.outputs).flatten(1, 2))
    return others + weights[:, -1] * own


def calibrate(
    fit: Seen,
    choose: Seen,
    layer: nn.Module,
    task: Task,
    steps: int,
    seed: int = 0,
    fit_head: bool = True,
) -> Calibrated | None:
    """Fits on ``fit`` and chooses on ``choose``; None where nothing becomes better.

    layer: of the newcomer's head, which is not changed. fit_head: False: it is fitted already, and
    the score is fitted alone.
    """
    layer = copy.deepcopy(layer).float().cpu().requires_grad_(fit_head)
    for seen in (fit, choose):
        seen.answers.aggregator.requires_grad_(False)
    fit, choose = fit.condensed(), choose.condensed()
    mean = fit.features.mean(dim=0)
    deviation = fit.features.std(dim=0, correction=0).clamp_min(1e-6)
    weight = torch.zeros(fit.features.shape[1], requires_grad=True)
    level = kth_largest(fit.answers.clean, fit.answers.k).mean()
    bias = (level - 1).clone().requires_grad_(True)
    optimizer = torch.optim.AdamW(
        [
            {"params": [weight], "lr": LR_SCORE},
            {"params": [bias], "lr": LR_SCORE, "weight_decay": 0.0},
            *([{"params": list(layer.parameters()), "lr": LR_HEAD}] if fit_head else []),
        ],
        weight_decay=DECAY,
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    draw = torch.Generator().manual_seed(seed)

    def score(seen: Seen) -> Tensor:
        return ((seen.features - mean) / deviation @ weight + bias)[:, None]

    def outputs(seen: Seen) -> Tensor:
        return layer(seen.inputs).reshape(seen.before.shape)  # of a 1 x 1 convolution, too

    found: list[Calibrated] = []
    for step in range(1, steps + 1):
        part = fit
        if len(fit) > BATCH:
            part = fit.subset(torch.randint(len(fit), (BATCH,), generator=draw))
        loss = _soft_loss(part, score(part), outputs(part), task)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // LOOKS) == 0 or step == steps:
            with torch.no_grad():
                w = weight / deviation
                state = {name: v.clone() for name, v in layer.state_dict().items()}
                z, own = score(choose), outputs(choose)
                for shift in SHIFTS:
                    b = bias + shift - (w * mean).sum()
                    losses = _hard_losses(choose, z + shift, own, task)
                    if losses is not None:
                        found.append(Calibrated(w[None].clone(), b[None], state, *losses))
    return best_of(found)


def best_of(found: Sequence[Calibrated]) -> Calibrated | None:
    """Of those that are almost the best the one that sends the fewest images; None: of none."""
    if not found:
        return None
    best = min(found, key=lambda one: one.after)
    most = best.after + ALMOST * (best.before - best.after)
    return min((one for one in found if one.after <= most), key=lambda one: (one.share, one.after))


def _soft_loss(seen: Seen, z: Tensor, own: Tensor, task: Task) -> Tensor:
    targets, answers = seen.answers.targets, seen.answers
    sent = torch.sigmoid(z - kth_largest(answers.clean, answers.k))[:, 0]
    after, before = task.loss(joined(seen, z, own), targets), task.loss(seen.before, targets)
    return by_group(sent * after + (1 - sent) * before + task.loss(own, targets), seen).mean()


def _hard_losses(
    seen: Seen, z: Tensor, own: Tensor, task: Task
) -> tuple[float, float, float] | None:
    """(loss without the newcomer, with it, share of images sent to it); None where it makes
    nothing better, or a group worse."""
    targets = seen.answers.targets
    sent = (z > kth_largest(seen.answers.clean, seen.answers.k) + MARGIN)[:, 0]
    before = task.loss(seen.before, targets).double()
    after = torch.where(sent, task.loss(joined(seen, z, own), targets).double(), before)
    old, new = by_group(before, seen), by_group(after, seen)
    if bool((new > old).any()) or not bool((new < old).any()):
        return None
    return old.mean().item(), new.mean().item(), sent.double().mean().item()


def by_group(values: Tensor, seen: Seen) -> Tensor:
    """[n] -> the means over the images of each group that there are any of."""
    _, group = seen.group.unique(return_inverse=True)
    sums = values.new_zeros(int(group.max()) + 1).index_add(0, group, values)
    return sums / group.bincount()


@torch.no_grad()
def apply(model: HubPathway, layer: nn.Module, found: Calibrated) -> None:
    """Puts what was found into a model whose last expert is the newcomer. layer: of its head."""
    score = model.generator.clean[-1]
    score.weight.copy_(found.weight)
    score.bias.copy_(found.bias)
    layer.load_state_dict(found.head)
