"""All models, stacked: one weight a model, fitted on the validation images by their log-loss.

Two forms, each convex with a single optimum. Of M*C inputs a classifier has far more than the
validation images can fix, and weights per model are what is left that they can:

    mixture   p = sum_m w_m p_m, w a distribution; by expectation and maximisation, with decay / M
              images in favour of each model (a Dirichlet prior)
    product   p = softmax(sum_m w_m log p_m), any w, near 1/M each; loss + decay/2 |w - 1/M|^2

The form and its decay are what loses the least in cross-validation over the validation images, and
what it says of those is said by weights that were fitted without them.

Letters: n images, M models, C classes, J problems that are solved at once (decays times folds).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..selection import own_losses
from .problem import Answer, CannotRun, Problem, always, folds, mix, score

FOLDS = 5
MIXTURE_DECAYS = (1.0, 10.0, 100.0)
PRODUCT_DECAYS = (0.003, 0.03, 0.3, 3.0)
MIXTURE_STEPS = 300  # of expectation and maximisation, each of which lowers the loss
PRODUCT_STEPS = 100  # of LBFGS
MIXTURE, PRODUCT = "mixture", "product"


def stacked(problem: Problem) -> Answer:
    """Raises CannotRun for a single validation image."""
    log_probs, targets = problem.log_probs["validation"], problem.targets["validation"]
    if len(targets) < 2:
        raise CannotRun("one validation image is not enough to fit weights and to try them")
    seen = _without_each_fold(len(targets), problem.seed)
    everything = torch.ones(1, len(targets))
    best = None
    for form, decays in ((MIXTURE, MIXTURE_DECAYS), (PRODUCT, PRODUCT_DECAYS)):
        parts = [*seen, *everything]
        asked = [(decay, part) for decay in decays for part in parts]
        weights = fit(
            form, log_probs, targets, torch.stack([part for _, part in asked]),
            torch.tensor([decay for decay, _ in asked]),
        )  # fmt: skip
        for i, decay in enumerate(decays):
            mine = weights[i * len(parts) : (i + 1) * len(parts)]
            found = torch.zeros(log_probs.shape[1:])
            for part, weight in zip(seen, mine, strict=False):
                left = part == 0
                found[left] = combine(form, log_probs[:, left], weight)
            loss = score(found, targets)["loss"]
            if best is None or loss < best[0]:
                best = loss, form, decay, found, mine[-1]
    _, form, decay, found, weight = best
    probabilities = {"validation": found}
    if problem.split == "test":
        probabilities["test"] = combine(form, problem.log_probs["test"], weight)
    members = torch.arange(len(problem.labels))
    return Answer(probabilities, always(members, problem), chosen={"form": form, "decay": decay})


def _without_each_fold(count: int, seed: int) -> Tensor:
    """[folds, n]: 1 for the images that weights are fitted on, 0 for those they are tried on."""
    parts = folds(count, FOLDS, seed)
    seen = torch.ones(len(parts), count)
    for i, part in enumerate(parts):
        seen[i, part] = 0.0
    return seen


def fit(form: str, log_probs: Tensor, targets: Tensor, seen: Tensor, decays: Tensor) -> Tensor:
    """Weights [J, M] of J problems.

    log_probs: [M, n, C]. targets: [n]. seen: [J, n], 1 for the images of a problem. decays: [J].
    """
    return (_mixture if form == MIXTURE else _product)(log_probs, targets, seen, decays)


def combine(form: str, log_probs: Tensor, weights: Tensor) -> Tensor:
    """Probabilities [n, C] of log_probs [M, n, C] by weights [M]."""
    if form == MIXTURE:
        return mix(log_probs, weights)
    return torch.einsum("m,mnc->nc", weights, log_probs).softmax(-1)


def _mixture(log_probs: Tensor, targets: Tensor, seen: Tensor, decays: Tensor) -> Tensor:
    models = len(log_probs)
    losses = own_losses(log_probs, targets).T  # [n, M]
    likelihood = (losses.amin(1, keepdim=True) - losses).exp()  # the best of an image: 1
    seen, prior = seen.double(), decays.double()[:, None] / models
    weights = torch.full((len(seen), models), 1 / models, dtype=torch.float64)
    for _ in range(MIXTURE_STEPS):
        share = seen / (weights @ likelihood.T)
        weights = weights * (share @ likelihood) + prior
        weights /= weights.sum(1, keepdim=True)
    return weights.to(log_probs.dtype)


def _product(log_probs: Tensor, targets: Tensor, seen: Tensor, decays: Tensor) -> Tensor:
    models, count, classes = log_probs.shape
    # What is the same for all classes falls out of the softmax; without it float32 keeps more.
    inputs = (log_probs - log_probs.mean(2, keepdim=True)).reshape(models, -1)
    hot = torch.nn.functional.one_hot(targets, classes).to(inputs.dtype)
    share = seen / seen.sum(1, keepdim=True)
    start = 1 / models
    weights = torch.full((len(seen), models), start, dtype=inputs.dtype, requires_grad=True)

    def closure() -> Tensor:
        with torch.no_grad():
            logs = (weights @ inputs).view(-1, count, classes).log_softmax(-1)
            loss = -(share * (logs * hot).sum(-1)).sum()
            loss += (decays * (weights - start).square().sum(1)).sum() / 2
            slopes = (logs.exp() - hot) * share[..., None]
            weights.grad = slopes.flatten(1) @ inputs.T + decays[:, None] * (weights - start)
        return loss

    torch.optim.LBFGS(
        [weights], max_iter=PRODUCT_STEPS, tolerance_grad=1e-6, history_size=20,
        line_search_fn="strong_wolfe",
    ).step(closure)  # fmt: skip
    return weights.detach()
