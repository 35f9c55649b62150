"""How well a model's features suit a task, without training: scores that cost milliseconds a model.

Each says something else, and which of them orders models best varies by data set, so that
``ranking`` prints how each agrees with cross-validated linear heads. Larger is better for all.

``h_score``  Bao et al. 2019, tr(cov(f)^-1 cov(E[f|y])), regularised as Ibrahim et al. 2021: the
             covariance is shrunk to a multiple of the identity as far as Ledoit and Wolf (2004)
             estimate, and the score multiplied by what is left of it, or features that are more
             numerous than images would separate any labels.
``log_me``   You et al. 2021: the evidence per image of a Bayesian linear regression on one-hot
             classes, both precisions chosen to maximise it. From the eigenvalues of f^T f: a
             product and a D x D problem in place of a decomposition of all features.
``leep``     Nguyen et al. 2020, and ``nce``, Tran et al. 2019: how well the classes follow from
             those that the model was pre-trained on, soft and hard.
``knn``      the accuracy of the nearest other images' votes.

Letters: n images, D features, C classes, S source classes. Features that are more numerous than
images are replaced by coordinates in the space that the images span, which changes no score.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

NEIGHBOURS = 5
MAX_QUERIES = 2048  # images that neighbours are sought for: the error of 2,048 is at most 1.1 %
MAX_PROBABILITIES = 1 << 27  # of source classes at once: 512 MiB
ROWS = 1024  # of a block: float16 features are never all converted to float64
MAX_FIXED_POINTS = 100
PRECISION_TOLERANCE = 1e-5  # relative, of the ratio of the two precisions
RELATIVE_ZERO = 1e-12  # of an eigenvalue to the largest, in float64


@dataclass(frozen=True)
class Moments:
    """What ``h_score`` and ``log_me`` need of features, in float64: r = min(n, D) dimensions.

    width: D. counts: [C], images of each class. sums: [C, r], of each class's features.
    products: [r, r], f^T f. fourth: the sum over images of |f - mean|^4.
    """

    width: int
    counts: Tensor
    sums: Tensor
    products: Tensor
    fourth: float

    @property
    def images(self) -> int:
        return int(self.counts.sum())


def check_images(targets: Tensor, num_classes: int) -> None:
    """Raises ValueError where there are fewer images than classes."""
    if len(targets) < num_classes or num_classes < 2:
        raise ValueError(
            f"shelf: expected two classes or more and at least as many training images, got "
            f"{len(targets)} images of {num_classes} classes; extract more images, or leave "
            "classes out"
        )


def spanned(features: Tensor) -> tuple[Tensor, Tensor]:
    """Coordinates [n, n] of features [n, D] in the space that they span, and its basis [D, n].

    Raises no error for images that are alike: their dimensions are zero.
    """
    features = features.double()
    values, vectors = torch.linalg.eigh(features @ features.mT)
    zero = values <= RELATIVE_ZERO * values[-1].clamp_min(0)
    root = values.clamp_min(0).sqrt().masked_fill(zero, 0)
    basis = features.mT @ (vectors / root.masked_fill(zero, torch.inf))
    return vectors * root, basis


def moments(features: Tensor, targets: Tensor, num_classes: int) -> Moments:
    """features: [n, D] of any float dtype. targets: int64 [n]."""
    check_images(targets, num_classes)
    width = features.shape[1]
    if width > len(features):
        features, _ = spanned(features)
    dimensions = features.shape[1]
    products = torch.zeros(dimensions, dimensions, dtype=torch.float64)
    sums = torch.zeros(num_classes, dimensions, dtype=torch.float64)
    for block, classes in zip(features.split(ROWS), targets.split(ROWS), strict=True):
        block = block.double()
        products.addmm_(block.mT, block)
        sums.index_add_(0, classes, block)
    mean = sums.sum(0) / len(features)
    fourth = sum(
        float((block.double() - mean).square().sum(1).square().sum())
        for block in features.split(ROWS)
    )
    return Moments(width, targets.bincount(minlength=num_classes).double(), sums, products, fourth)


def h_score(found: Moments) -> float:
    """Between 0 and C - 1; 0 of features that are all alike."""
    n, seen = found.images, found.counts > 0
    mean = found.sums.sum(0) / n
    covariance = found.products / n - torch.outer(mean, mean)
    variance = float(covariance.trace()) / found.width
    noise = RELATIVE_ZERO * float(found.products.trace()) / (n * found.width)
    if variance <= noise:
        return 0.0
    squares = float(covariance.square().sum())
    distance = squares - found.width * variance**2  # of the covariance to the identity's multiple
    error = (found.fourth / n - squares) / n
    shrinkage = min(1.0, error / distance) if distance > RELATIVE_ZERO * squares else 1.0
    shrunk = (1 - shrinkage) * covariance
    shrunk.diagonal().add_(max(shrinkage * variance, noise))
    apart = (found.sums[seen] / found.counts[seen, None] - mean).mT
    weights = found.counts[seen] / n
    inverse = torch.cholesky_solve(apart, torch.linalg.cholesky(shrunk))
    return float((1 - shrinkage) * ((apart * inverse).sum(0) * weights).sum())


def log_me(found: Moments) -> float:
    """The mean over the classes that images are of; natural logarithms."""
    values, vectors = torch.linalg.eigh(found.products)
    kept = values > RELATIVE_ZERO * values[-1].clamp_min(0)
    values = values[kept, None]
    counts = found.counts[found.counts > 0]
    # A class's indicator is |y|^2 = counts; of it, the features' directions explain ``energy``.
    energy = (vectors[:, kept].mT @ found.sums[found.counts > 0].mT).square() / values
    rest = (counts - energy.sum(0)).clamp_min(0)
    n = found.images
    evidence = _evidence(values, energy, rest, n) / n
    return float(evidence.mean())


def _evidence(values: Tensor, energy: Tensor, rest: Tensor, n: int) -> Tensor:
    """The logarithm of the evidence of each class, at its best precisions.

    values: [r, 1], eigenvalues of f^T f. energy: [r, C], squares of the targets along them. rest:
    [C], what no direction explains.

    With the weights' precision alpha, the noise's beta and ratio = alpha / beta, the weights are
    the ridge regression's, and MacKay's fixed point is alpha = gamma / |w|^2 and
    beta = (n - gamma) / |y - f w|^2, gamma the number of directions that the data determine.
    """
    tiny = RELATIVE_ZERO * (energy.sum(0) + rest)
    floor = RELATIVE_ZERO * (values.max() if len(values) else 1.0)
    ratio = torch.ones_like(rest)
    for _ in range(MAX_FIXED_POINTS):
        weight, error, gamma = _ridge(values, energy, rest, ratio)
        alpha = gamma / weight.clamp_min(1e-300)
        beta = (n - gamma).clamp_min(1e-300) / torch.maximum(error, tiny)
        previous, ratio = ratio, (alpha / beta).clamp(floor, 1e300)
        if bool(((ratio - previous).abs() <= PRECISION_TOLERANCE * previous).all()):
            break
    weight, error, _ = _ridge(values, energy, rest, ratio)
    # beta at its best for this ratio, which the fixed point, not quite reached, may miss.
    beta = n / torch.maximum(error + ratio * weight, tiny)
    shrink = torch.log1p(values / ratio).sum(0)  # log |A| - D log alpha, as sum log(1 + beta s / a)
    return 0.5 * (n * beta.log() - n * math.log(2 * math.pi) - n - shrink)


def _ridge(values: Tensor, energy: Tensor, rest: Tensor, ratio: Tensor):
    """|w|^2, |y - f w|^2 and gamma of each class: [C] each."""
    down = values + ratio
    weight = (energy * values / down.square()).sum(0)
    error = (energy * (ratio / down).square()).sum(0) + rest
    return weight, error, (values / down).sum(0)


def source_probabilities(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What a model's own head says of features [n, D]: float32 [n, S]. weight: [S, D]."""
    return torch.addmm(bias.float(), features.float(), weight.float().mT).softmax(1)


def leep(probabilities: Tensor, targets: Tensor, num_classes: int) -> float:
    """The mean log-likelihood of the classes when they are drawn by P(y | source class).

    probabilities: [n, S] of the source classes. targets: int64 [n].
    """
    joint = probabilities.new_zeros(num_classes, probabilities.shape[1])
    joint.index_add_(0, targets, probabilities)
    tiny = torch.finfo(joint.dtype).tiny
    joint /= joint.sum(0).clamp_min(tiny)  # P(y | z)
    expected = torch.stack(
        [
            torch.mv(probabilities[targets == c], joint[c]).clamp_min(tiny).log().double().sum()
            for c in targets.unique().tolist()
        ]
    )
    return float(expected.sum() / len(targets))


def nce(probabilities: Tensor, targets: Tensor, num_classes: int) -> float:
    """Minus the conditional entropy, in nats, of the classes given the likeliest source class."""
    sources = probabilities.shape[1]
    pairs = targets * sources + probabilities.argmax(1)
    joint = pairs.bincount(minlength=num_classes * sources).double() / len(targets)
    joint = joint.view(num_classes, sources)
    return float(torch.xlogy(joint, joint).sum() - torch.xlogy(joint.sum(0), joint.sum(0)).sum())


def knn(features: Tensor, targets: Tensor, num_classes: int, k: int = NEIGHBOURS) -> float:
    """The share of images whose class the k nearest others vote for, by cosine.

    features: [n, D]. Of as many votes, the class of the nearest of them wins. Neighbours of at most
    ``MAX_QUERIES`` images are sought, evenly spread, among all n.
    """
    check_images(targets, num_classes)
    k = min(k, len(features) - 1)
    unit = torch.nn.functional.normalize(
        features if features.dtype == torch.float64 else features.float()
    )
    # A nearer one has more than all that are farther, and all together less than a vote.
    votes = 1 + 0.5 ** torch.arange(1, k + 1)
    queries = evenly(len(features), MAX_QUERIES)
    right = 0
    for block in queries.split(ROWS // 2):
        near = unit[block] @ unit.mT
        near[torch.arange(len(block)), block] = -torch.inf
        classes = targets[near.topk(k, dim=1).indices]
        count = torch.zeros(len(block), num_classes).scatter_add_(
            1, classes, votes.expand_as(classes)
        )
        right += int((count.argmax(1) == targets[block]).sum())
    return right / len(queries)


def evenly(n: int, most: int) -> Tensor:
    """Numbers below n, all or ``most`` of them evenly spread: int64."""
    if n <= most:
        return torch.arange(n)
    return torch.arange(most) * n // most
