"""Backward elimination of a hub of hundreds of experts, beside the same with whole predictions.

    python -m bench.shelf_prune [--experts 200] [--images 500] [--classes 10] [--k 2]
        [--aggregator sum|linear] [--plain-steps 2]

What the experts say is drawn: of each image its class, the better the later the expert; scores are
drawn, too, so that most experts are asked. One thread; seconds are of the processor, which is what
an idle thread takes, about, where other processes share the cores. Whole predictions are timed for
the first steps alone, and taken for all: a later step has fewer hubs, and the seconds of all are in
proportion to M * M / 2 hubs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from hubpath_fast.model import make_aggregator
from hubpath_fast.runs.answers import HubAnswers
from hubpath_fast.runs.prune import Losses, smallest_within
from hubpath_fast.tasks import Classification


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=200)
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--aggregator", choices=("sum", "linear"), default="sum")
    parser.add_argument("--plain-steps", type=int, default=2, help="of whole predictions; 0: none")
    options = parser.parse_args()
    torch.set_num_threads(1)
    answers = draw(options)
    task = Classification(tuple(map(str, range(options.classes))))
    found = Losses(answers, task)
    each, seconds = timed(found.of_each)
    worst = max(loss.lost for loss in each)
    print(f"without each of {options.experts}: {seconds:.2f} s; at most {worst:.2f} points lost")
    steps, seconds = timed(found.eliminate)
    print(f"elimination down to {options.k}: {seconds:.2f} s")
    chosen = smallest_within(steps, 0.5)
    print(f"the smallest within 0.5 points: {None if chosen is None else len(chosen.kept)} experts")
    if options.plain_steps:
        plain, seconds = timed(lambda: plain_steps(answers, task, options.plain_steps))
        same = plain == [step.dropped for step in steps[: options.plain_steps]]
        hubs = sum(options.experts - i for i in range(options.plain_steps))
        whole = seconds / hubs * sum(range(options.k + 1, options.experts + 1))
        print(f"whole predictions: {seconds:.1f} s for {options.plain_steps} steps, {whole:.0f} s "
              f"for all; the same experts: {same}")  # fmt: skip


def draw(options: argparse.Namespace) -> HubAnswers:
    random = torch.Generator().manual_seed(0)
    n, m, c = options.images, options.experts, options.classes
    targets = torch.randint(c, (n,), generator=random)
    outputs = torch.randn(n, m, c, generator=random)
    known = 3 * torch.linspace(0, 1, m)[None, :, None].expand(n, m, 1)
    outputs.scatter_add_(2, targets[:, None, None].expand(n, m, 1), known)
    clean = 3 * torch.randn(n, m, generator=random)
    aggregator = make_aggregator(options.aggregator, m, c).requires_grad_(False)
    return HubAnswers(clean, outputs, targets, options.k, False, aggregator)


def plain_steps(answers: HubAnswers, task: Classification, count: int) -> list[int]:
    """The first experts that go, each smaller hub predicted as a whole."""
    kept, dropped = list(range(answers.num_experts)), []
    for _ in range(count):
        weights = answers.weights(kept).sum(dim=0)
        values = []
        for i in kept:
            outputs = answers.predict([j for j in kept if j != i])
            score = task.scores(task.predict(outputs), answers.targets).mean().item()
            values.append((-score, weights[i].item(), i))
        dropped.append(min(values)[2])
        kept.remove(dropped[-1])
    return dropped


def timed(work: Callable):
    """(what it returns, seconds of the processor)."""
    began = time.process_time()
    return work(), time.process_time() - began


if __name__ == "__main__":
    main()
