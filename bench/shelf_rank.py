"""Ranking a shelf: seconds a model of each score and of the linear heads, and of plain versions.

    OMP_NUM_THREADS=1 python -m bench.shelf_rank [--models 8] [--images 4000] [--features 512]
        [--classes 100] [--source-classes 1000] [--of 256] [--no-plain] [--out FILE]

A shelf of random float16 features that say something of their classes is written to a temporary
folder, and ranked as `hubpath shelf rank` does it. Of each score the mean over models, the fastest
one, and what ``--of`` models take at that rate. Goals are for a process that has a core to itself:
seconds are taken in the share of one that this had. Plain versions give the same values, of one
model: LogME by a decomposition of all features, and scikit-learn's logistic regression, fitted to
each fold at the one decay that was chosen.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from hubpath_fast.features import Shelf, write_shelf
from hubpath_fast.shelf.heads import held_out
from hubpath_fast.shelf.logistic import folds_of
from hubpath_fast.shelf.ranking import SCORES, YARDSTICK, rank
from hubpath_fast.shelf.selection import OBJECTIVES, greedy

from . import jsonl, records

GOALS = {("h_score", "knn", "leep"): 60.0, ("log_me",): 120.0}  # seconds, of 256 models
GOAL_MODELS = 256


def make_shelf(folder: Path, args: argparse.Namespace) -> Shelf:
    """A class's mean is seen at a fifth of the noise, along axes of falling scale, after a ReLU."""
    draw = torch.Generator().manual_seed(0)
    n, width = args.images, args.features
    targets = torch.arange(n) % args.classes
    features, heads = {}, {}
    for i in range(args.models):
        mix = torch.randn(width, width, generator=draw) * torch.logspace(0, -2, width)
        known = 0.2 * torch.randn(args.classes, width, generator=draw)[targets]
        seen = (known + torch.randn(n, width, generator=draw)) @ mix
        features[f"model{i}"] = seen.relu().half()
        weight = torch.randn(args.source_classes, width, generator=draw) / width**0.5
        heads[f"model{i}"] = weight, torch.zeros(args.source_classes)
    names = [str(c) for c in range(args.classes)]
    sizes = {"train": n}
    return write_shelf(folder / "shelf", features, targets, names, sizes, source_heads=heads)


def log_me_by_svd(x: np.ndarray, y: np.ndarray) -> float:
    """The same fixed point, of the singular values of all features."""
    n, (u, s, _) = len(x), np.linalg.svd(x, full_matrices=False)
    s, found = s**2, []
    for c in np.unique(y):
        target = (y == c).astype(float)
        z = (u.T @ target) ** 2
        rest, alpha, beta = max(target.sum() - z.sum(), 0.0), 1.0, 1.0
        for _ in range(100):
            down = alpha + beta * s
            weight, error = (z * s * (beta / down) ** 2).sum(), (z * (alpha / down) ** 2).sum()
            gamma = (beta * s / down).sum()
            alpha, beta, ratio = gamma / weight, (n - gamma) / (error + rest), alpha / beta
            if abs(alpha / beta - ratio) <= 1e-5 * ratio:
                break
        down = alpha + beta * s
        weight, error = (z * s * (beta / down) ** 2).sum(), (z * (alpha / down) ** 2).sum() + rest
        found.append(
            n / 2 * np.log(beta) - n / 2 * np.log(2 * np.pi) - beta / 2 * error
            - alpha / 2 * weight - np.log1p(beta / alpha * s).sum() / 2
        )  # fmt: skip
    return float(np.mean(found) / n)


def plain(shelf: Shelf, log_me: float, decay: float, loss: float) -> dict[str, float]:
    """Seconds of plain versions on the first model. Raises RuntimeError where values differ."""
    from sklearn.linear_model import LogisticRegression

    x, y = shelf.features(0)[0].double().numpy(), shelf.targets.numpy()
    seconds, found = _timed(lambda: log_me_by_svd(x, y))
    _check("LogME", found, log_me, 1e-6)
    folds = folds_of(shelf.targets, 0).numpy()
    deviation = x.std(0)
    z = ((x - x.mean(0)) / np.where(deviation > 0, deviation, 1)).astype(np.float32)

    def cross_validated() -> float:
        total = 0.0
        for fold in range(int(folds.max()) + 1):
            seen = folds != fold
            model = LogisticRegression(C=1 / (seen.sum() * decay), max_iter=1000)
            p = model.fit(z[seen], y[seen]).predict_proba(z[~seen])
            total -= np.log(p[np.arange(len(p)), y[~seen]]).sum()
        return total / len(y)

    regression, found = _timed(cross_validated)
    _check("the cross-validated loss", found, loss, 0.02)
    return {"log_me": seconds, "linear": regression}


def _timed(compute: Callable[[], float]) -> tuple[float, float]:
    began = time.perf_counter()
    found = compute()
    return time.perf_counter() - began, found


def _check(what: str, plain: float, ours: float, tolerance: float) -> None:
    if abs(plain - ours) > tolerance * abs(plain):
        raise RuntimeError(f"{what} is {ours:.8g}, by the plain version {plain:.8g}")


def measure(args: argparse.Namespace) -> dict:
    """A row: seconds of each score, of plain versions, and of choosing sets."""
    with tempfile.TemporaryDirectory() as folder:
        shelf = make_shelf(Path(folder), args)
        began = time.perf_counter(), time.process_time()
        rows, heads = rank(shelf)
        wall, busy = time.perf_counter() - began[0], time.process_time() - began[1]
        first = rows[0]
        slow = (
            plain(shelf, first.scores["log_me"], heads[0].decay, first.loss) if args.plain else {}
        )
        logits, targets, _ = held_out(shelf, heads, range(len(heads)))
        logits = logits[torch.arange(args.of) % len(heads)]
        choosing = {
            objective: _timed(lambda o=objective: len(greedy(logits, targets, 16, o)))[0]
            for objective in OBJECTIVES
        }
    names = (*SCORES, YARDSTICK)
    return {
        **{n: getattr(args, n) for n in ("images", "features", "classes", "source_classes", "of")},
        "models": args.models,
        "core_share": busy / wall,
        "mean": {name: sum(row.seconds[name] for row in rows) / len(rows) for name in names},
        "best": {name: min(row.seconds[name] for row in rows) for name in names},
        "plain": slow,
        "sets": choosing,
        **records.environment("cpu"),
    }  # fmt: skip


def show(row: dict) -> str:
    of = row["of"]
    lines = [f"{'score':<14}{'s a model':>11}{'fastest':>10}{f's of {of}':>11}{'plain, s':>11}"]
    for name, mean in row["mean"].items():
        best, slow = row["best"][name], row["plain"].get(name)
        text = f"{name:<14}{mean:>11.3f}{best:>10.3f}{of * best:>11.1f}"
        lines.append(text + ("" if slow is None else f"{slow:>11.2f}"))
    share = min(1.0, row["core_share"])
    lines.append(
        f"this process had {100 * share:.0f} % of a core; seconds of {of} models with all of it:"
    )
    for names, goal in GOALS.items():
        took = share * of * sum(row["mean"][name] for name in names)
        goal *= of / GOAL_MODELS
        text = f"  {' + '.join(names)} {took:.1f}, goal {goal:.0f}"
        lines.append(text + ("  missed" if took > goal else ""))
    lines.append(f"  everything {share * of * sum(row['mean'].values()):.0f}")
    sets = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in row["sets"].items())
    lines.append(f"16 of {of} models chosen on {row['images']} images: {sets}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(prog="python -m bench.shelf_rank", description=__doc__)
    parser.add_argument("--models", type=int, default=8, help="that are ranked")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--source-classes", type=int, default=1000)
    parser.add_argument("--of", type=int, default=GOAL_MODELS, help="models of a whole shelf")
    parser.add_argument("--no-plain", dest="plain", action="store_false")
    parser.add_argument("--out", type=Path, help="append the row to this file, as a JSON line")
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    print(
        f"{records.device_name('cpu')}, {torch.get_num_threads()} threads; {args.images} images, "
        f"{args.features} features, {args.classes} classes"
    )
    row = measure(args)
    print(show(row))
    if args.out is not None:
        jsonl.write(args.out, [row])
    return row


if __name__ == "__main__":
    main()
