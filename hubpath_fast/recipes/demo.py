"""``hubpath demo``: the whole loop on real images, with no download and no GPU.

Five tiny networks are pre-trained, each on one rendering of handwritten digits; then the target
task, a few hundred digits in all renderings mixed, is learned in every way that Hub-Pathway has to
beat, with the same number of steps and the same batches. Choices (which single expert is best,
which K are) are made on a validation split; all figures are on the test split, where nothing is
chosen.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from ..baselines import SingleModel, oracle
from ..compare.digits_hub import NETWORKS, Pretraining, expert_names, pretrained_experts
from ..data import DigitsTask, TensorBatches, TensorSet, TensorStream
from ..files import write_json
from ..hub import create_model
from ..runs.measure import dense_weights, probabilities
from ..tasks import Classification
from ..training import (
    PathwayObjective,
    Reporting,
    SingleObjective,
    Trainer,
    TrainerConfig,
    TrainResult,
)
from ..training.random_state import seed_all
from .demo_report import write_report

SUMMARY, REPORT, RUNS = "summary.json", "report.html", "runs"


@dataclass(frozen=True)
class Rates:
    """Peak learning rates of experts' bodies, their new heads, and generator and aggregator."""

    body: float
    head: float
    router: float = 3e-3


@dataclass(frozen=True)
class DemoSettings:
    """The demo's sizes and rates.

    epochs: passes of every method over the target's training digits. num_validation: of the 300
    target digits, how many are held out to choose the best single experts on. k: K.
    generator_stride: of the pooling before the generator. explore: lambda.
    rates: of every method, chosen for Hub-Pathway on validation digits of seeds 0, 1 and 2. single:
    of single experts, if other than ``rates``; alone, they do better with larger ones (README).
    """

    pretraining: Pretraining = field(default_factory=Pretraining)
    epochs: int = 60
    batch_size: int = 48
    num_validation: int = 100
    k: int = 2
    generator_stride: int = 2
    explore: float = 1.0
    rates: Rates = Rates(body=5e-4, head=3e-3)
    single: Rates | None = None

    def trainer_config(self, rates: Rates, num_samples: int, seed: int, device: str):
        """The trainer's settings; the number of steps is the same for every method."""
        steps = num_samples * self.epochs // self.batch_size
        return TrainerConfig(
            steps=steps,
            batch_size=self.batch_size,
            lr_expert=rates.body,
            lr_head=rates.head,
            lr_router=rates.router,
            eval_every=max(1, steps // 10),
            save_every=0,
            log_every=10,
            seed=seed,
            device=device,
        )


QUICK = DemoSettings(pretraining=Pretraining(epochs=7), epochs=16)


@dataclass
class Row:
    """One method: which test images it gets right, and what it cost.

    forwards: of experts, per image. seconds: of training. bound: a bound that no method can reach
    by choosing on other data, so that it does not compete.
    """

    name: str
    correct: Tensor  # [test images] bool
    forwards: int
    seconds: float
    bound: bool = False

    @property
    def accuracy(self) -> float:
        return self.correct.double().mean().item()


@dataclass
class Demo:
    """Everything the table, ``summary.json`` and the report are made of."""

    settings: DemoSettings
    seed: int
    test: TensorSet
    rows: list[Row]
    weights: Tensor  # [test images, experts], 0 where inactive
    prediction: Tensor  # [test images] int64, of Hub-Pathway
    history: list[dict[str, Any]]
    seconds: float
    pretrain_seconds: float

    def accuracy(self, name: str) -> float:
        return next(row.accuracy for row in self.rows if row.name == name)


def demo(
    out_dir: str | Path = "hubpath-demo",
    seed: int = 0,
    quick: bool = False,
    device: str = "cpu",
    single_lr: float | None = None,
    console: Console | None = None,
    settings: DemoSettings | None = None,
    cache: Path | None = None,
) -> dict[str, Any]:
    """Runs the demo and writes ``summary.json`` and ``report.html`` into ``out_dir``.

    Args:
        out_dir: a new or empty folder, or one of an earlier demo, which is then replaced.
        seed: of the split, the weights, the noise and the order of batches.
        quick: a few epochs only, to see it work; the figures say little then.
        device: anything torch.device takes.
        single_lr: peak rate of the single experts; default the rates of Hub-Pathway.
        settings: sizes and rates; default those of the demo, or of ``quick``.
        cache: where pre-trained experts are kept; default the user's cache folder.

    Returns:
        The contents of ``summary.json``: accuracies in 0..1 on the test split.

    Raises:
        ValueError: out_dir holds something else. InterruptedError: a signal stopped a training.
    """
    began = time.perf_counter()
    console = console or Console()
    settings = settings or (QUICK if quick else DemoSettings())
    if single_lr is not None:
        settings = replace(settings, single=Rates(single_lr, single_lr))
    out_dir = _prepare(Path(out_dir))
    task = DigitsTask(seed, settings.num_validation)
    console.print(
        f"[bold]hubpath demo[/]: {len(task.target)} digits in five renderings to learn from, "
        f"{len(task.validation)} to choose on, {len(task.test)} to test on; seed {seed}"
    )
    make, pretrain_seconds = pretrained_experts(
        task, settings.pretraining, task.target.num_classes, console, cache
    )
    if pretrain_seconds == 0:
        console.print("The five pre-trained experts come from the cache.")

    bench = Bench(task, settings, seed, device, out_dir, console)
    singles, validation, probabilities = bench.singles(make)
    rows = vote_rows(settings.k, singles, validation, probabilities, task.test.targets)
    pathway, weights, prediction, history = bench.pathway(make)
    rows = [*singles, *rows[:-1], pathway, rows[-1]]
    result = Demo(
        settings, seed, task.test, rows, weights, prediction, history,
        time.perf_counter() - began, pretrain_seconds,
    )  # fmt: skip
    summary = summarise(result)
    write_json(out_dir / SUMMARY, summary)
    write_report(out_dir / REPORT, result)
    console.print(_table(result))
    console.print(
        f"{summary['seconds']:.0f} s. The numbers are in {out_dir / SUMMARY}, the figures in "
        f"{out_dir / REPORT}."
    )
    return summary


@dataclass
class Bench:
    """Trains one method after another on the same task with the same budget."""

    task: DigitsTask
    settings: DemoSettings
    seed: int
    device: str
    out_dir: Path
    console: Console

    def singles(self, make: Callable) -> tuple[list[Row], list[float], Tensor]:
        """Every expert alone: rows, validation accuracies, probabilities [M, test images, C]."""
        seed_all(self.seed)
        rates = self.settings.single or self.settings.rates
        rows, validation, probabilities = [], [], []
        for expert, name in zip(make(), expert_names(), strict=True):
            model = SingleModel(expert)
            result = self._train(
                model, SingleObjective(self._classification.loss), rates, f"single {name}"
            )
            correct = self._probabilities(model, self.task.validation).argmax(1)
            validation.append((correct == self.task.validation.targets).double().mean().item())
            probabilities.append(self._probabilities(model, self.task.test))
            correct = probabilities[-1].argmax(1) == self.task.test.targets
            rows.append(Row(f"single: {name}", correct, 1, result.seconds))
        return rows, validation, torch.stack(probabilities)

    def pathway(self, make: Callable) -> tuple[Row, Tensor, Tensor, list[dict[str, Any]]]:
        """Hub-Pathway: its row, weights [test images, M], predictions, and training history."""
        seed_all(self.seed)
        settings = self.settings
        model = create_model(
            make(),
            self.task.target.num_classes,
            settings.k,
            generator_stride=settings.generator_stride,
        )
        objective = PathwayObjective(self._classification.criterion(settings.explore))
        result = self._train(model, objective, settings.rates, "Hub-Pathway", expert_names())
        prediction = self._probabilities(model, self.task.test).argmax(1)
        test = TensorBatches(self.task.test, device=self.device)
        weights = dense_weights(model, test, self.device)
        correct = prediction == self.task.test.targets
        row = Row("Hub-Pathway", correct, settings.k, result.seconds)
        return row, weights, prediction, result.history

    @property
    def _classification(self) -> Classification:
        return Classification(tuple(self.task.target.classes))

    def _train(
        self, model: nn.Module, objective, rates: Rates, label: str, names: list[str] | None = None
    ) -> TrainResult:
        num_samples = len(self.task.target)
        config = self.settings.trainer_config(rates, num_samples, self.seed, self.device)
        trainer = Trainer(
            model,
            objective,
            TensorStream(self.task.target, config.batch_size, self.seed, device=self.device),
            config,
            self.out_dir / RUNS / label.replace(": ", "-").replace(" ", "-"),
            task=self._classification,
            validation=TensorBatches(self.task.validation, device=self.device),
            reporting=Reporting(self.console, label, names, tensorboard=False),
        )
        result = trainer.fit()
        if result.interrupted:
            raise InterruptedError(f"stopped while training {label}")
        return result  # with the weights of the last step: nothing is chosen among steps

    def _probabilities(self, model: nn.Module, data: TensorSet) -> Tensor:
        """[n, C] float32 on the host, in evaluation mode."""
        return probabilities(model, TensorBatches(data, device=self.device), self.device)


def vote_rows(
    k: int, singles: list[Row], validation: list[float], probabilities: Tensor, targets: Tensor
) -> list[Row]:
    """Best single, the ensembles and the oracle, from fine-tuned singles [M, N, C].

    The best are chosen on the validation accuracies; the row "in hindsight" is the single expert
    that happens to be best on the test split, which nobody can choose.
    """
    task = Classification(tuple(map(str, range(probabilities.shape[2]))))
    top = task.metric.ranked(validation)[:k]

    def right(vote: str, members: Tensor) -> Tensor:
        return task.scores(task.votes[vote](members), targets).bool()

    hindsight = max(singles, key=lambda row: row.accuracy)
    everyone, seconds = len(singles), sum(row.seconds for row in singles)
    soft, hard = right("soft", probabilities), right("hard", probabilities)
    of_best = right("soft", probabilities[top])
    return [
        Row("best single", singles[top[0]].correct, 1, seconds),
        Row("best single, in hindsight", hindsight.correct, 1, seconds, bound=True),
        Row(f"ensemble of the best {k}", of_best, k, seconds),
        Row("ensemble, soft vote", soft, everyone, seconds),
        Row("ensemble, hard vote", hard, everyone, seconds),
        Row("oracle", oracle(task, probabilities, targets).bool(), everyone, seconds, bound=True),
    ]


def summarise(result: Demo) -> dict[str, Any]:
    """What ``summary.json`` holds; accuracies in 0..1, all on the same test split."""
    k = result.settings.k
    return {
        "best_single": result.accuracy("best single"),
        "ensemble": result.accuracy("ensemble, soft vote"),
        "ensemble_hard": result.accuracy("ensemble, hard vote"),
        "ensemble_top_k": result.accuracy(f"ensemble of the best {k}"),
        "hub_pathway": result.accuracy("Hub-Pathway"),
        "oracle": result.accuracy("oracle"),
        "best_single_in_hindsight": result.accuracy("best single, in hindsight"),
        "singles": {
            row.name.removeprefix("single: "): row.accuracy
            for row in result.rows
            if row.name.startswith("single: ")
        },
        "rates": asdict(result.settings.rates),
        "rates_single": asdict(result.settings.single or result.settings.rates),
        "networks": dict(zip(expert_names(), NETWORKS, strict=True)),
        "seconds": result.seconds,
        "pretrain_seconds": result.pretrain_seconds,
        "seed": result.seed,
        "k": k,
        "test_images": len(result.test),
    }


def _table(result: Demo) -> Table:
    table = Table(title=f"test accuracy on {len(result.test)} digits, seed {result.seed}")
    table.add_column("method")
    for column in ("accuracy", "expert forwards per image", "training s"):
        table.add_column(column, justify="right")
    best = max(row.accuracy for row in result.rows if not row.bound)
    for row in result.rows:
        style = "dim" if row.bound else "bold" if row.accuracy == best else None
        table.add_row(
            row.name, f"{row.accuracy:.3f}", str(row.forwards), f"{row.seconds:.0f}", style=style
        )
    return table


def _prepare(out_dir: Path) -> Path:
    """Makes room for a new demo; refuses a folder that holds anything else."""
    if out_dir.exists() and not out_dir.is_dir():
        raise ValueError(f"out: {out_dir} is a file; give a folder")
    out_dir.mkdir(parents=True, exist_ok=True)
    ours = {SUMMARY, REPORT, RUNS}
    strange = sorted(p.name for p in out_dir.iterdir() if p.name not in ours)
    runs = out_dir / RUNS
    if strange or (runs.exists() and not runs.is_dir()):
        raise ValueError(
            f"out: {out_dir} holds something that is no demo ({', '.join(strange[:5])}); choose "
            "another folder"
        )
    shutil.rmtree(runs, ignore_errors=True)
    for name in (SUMMARY, REPORT):
        (out_dir / name).unlink(missing_ok=True)
    return out_dir
