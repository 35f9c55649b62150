"""The command line, ``hubpath``: demo, fit, evaluate, predict.

Every command is a thin call of a recipe. Wrong input ends with one clear message and status 2, a
signal with status 130, a failed training with status 1.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.console import Console
from rich.markup import escape

from .cli_hub import app as hub_app

# Group sizes differ at every step, so oneDNN meets far more shapes than its default cache of 1,024
# prepared primitives holds. It reads this once, at its first use.
PRIMITIVE_CACHE = "8192"

app = typer.Typer(
    name="hubpath",
    help="Route each input to the K most useful of your pre-trained models, fine-tuned end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(hub_app, name="hub")
console = Console()
errors = Console(stderr=True)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "hubpath-demo"
    ),
    seed: Annotated[int, typer.Option(help="of the split, the weights, the noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a few epochs, under a minute")] = False,
    device: Device = "cpu",
) -> None:
    """The whole loop on handwritten digits: no download, no GPU, a few minutes."""
    with _messages():
        from .recipes.demo import demo as run

        run(out, seed, quick, device, console)


# Typer reads these annotations on Python 3.10 too, where it needs Optional spelt out.
OptionalInt, OptionalFloat, OptionalStr = Optional[int], Optional[float], Optional[str]  # noqa: UP045


@app.command()
def fit(
    data: Annotated[
        OptionalStr, typer.Option(help="folder with train/ (val/, test/) or train.txt")
    ] = None,
    hub: Annotated[OptionalStr, typer.Option(help="model names, comma-separated")] = None,
    out: Annotated[Path, typer.Option(help="folder of the run")] = Path("hubpath-run"),
    resume: Annotated[bool, typer.Option("--resume", help="go on with the run in --out")] = False,
    config: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="settings as --print-config shows them; other options go first"),
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="show all settings as JSON and stop")
    ] = False,
    k: Annotated[OptionalInt, typer.Option("--k", help="active experts per image")] = None,
    steps: Annotated[OptionalInt, typer.Option(help="optimizer updates")] = None,
    batch_size: Annotated[OptionalInt, typer.Option(help="images per update")] = None,
    lr: Annotated[
        OptionalFloat,
        typer.Option(help="peak rate of the experts; heads get 3, the router 10 times as much"),
    ] = None,
    lr_head: Annotated[OptionalFloat, typer.Option(help="peak rate of the new heads")] = None,
    lr_router: Annotated[
        OptionalFloat, typer.Option(help="peak rate of generator and aggregator")
    ] = None,
    optimizer: Annotated[OptionalStr, typer.Option(help="adamw or sgd")] = None,
    schedule: Annotated[
        OptionalStr, typer.Option(help="one-cycle, cosine, steps or constant")
    ] = None,
    weight_decay: Annotated[OptionalFloat, typer.Option()] = None,
    clip_norm: Annotated[OptionalFloat, typer.Option(help="largest gradient norm")] = None,
    accumulate: Annotated[OptionalInt, typer.Option(help="micro-batches per update")] = None,
    explore: Annotated[
        OptionalFloat, typer.Option(help="lambda, weight of the exploration loss")
    ] = None,
    aggregator: Annotated[OptionalStr, typer.Option(help="linear or mlp")] = None,
    image_size: Annotated[OptionalInt, typer.Option(help="pixels a side")] = None,
    pretrained: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--pretrained/--no-pretrained", help="random weights need no network"),
    ] = None,
    amp: Annotated[bool, typer.Option("--amp", help="bf16 autocast")] = False,
    eval_every: Annotated[OptionalInt, typer.Option(help="steps between evaluations")] = None,
    patience: Annotated[
        OptionalInt, typer.Option(help="evaluations without gain before it stops")
    ] = None,
    save_every: Annotated[OptionalInt, typer.Option(help="steps between checkpoints")] = None,
    workers: Annotated[OptionalInt, typer.Option(help="processes that decode images")] = None,
    flip: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--flip/--no-flip", help="mirror half of the images"),
    ] = None,
    seed: Annotated[OptionalInt, typer.Option()] = None,
    device: Annotated[OptionalStr, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Train a Hub-Pathway on your own images."""
    with _messages():
        from .recipes.fit import fit as run
        from .recipes.fit import settings

        chosen = settings(
            out,
            resume,
            config,
            top={
                "data": data,
                "hub": None if hub is None else [n.strip() for n in hub.split(",") if n.strip()],
                "k": k,
                "pretrained": pretrained,
                "image_size": image_size,
                "flip": flip,
                "workers": workers,
                "explore": explore,
                "aggregator": aggregator,
            },
            trainer={
                "steps": steps,
                "batch_size": batch_size,
                "optimizer": optimizer,
                "schedule": schedule,
                "weight_decay": weight_decay,
                "lr_expert": lr,
                "lr_head": lr_head if lr_head is not None or lr is None else 3 * lr,
                "lr_router": lr_router if lr_router is not None or lr is None else 10 * lr,
                "clip_norm": clip_norm,
                "accumulate": accumulate,
                "amp": "bf16" if amp else None,
                "eval_every": eval_every,
                "patience": patience,
                "save_every": save_every,
                "seed": seed,
                "device": device,
            },
        )
        if print_config:
            print(chosen.to_json())
            return
        result, _ = run(chosen, out, resume, console)
        if result.interrupted:
            raise typer.Exit(130)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run of `hubpath fit`")],
    data: Annotated[OptionalStr, typer.Option(help="other data with the same classes")] = None,
    device: Device = "cpu",
) -> None:
    """Accuracy and loss of a run's best checkpoint."""
    with _messages():
        from .recipes.predict import evaluate as recipe

        scores = recipe(run, data, device)
        console.print(
            f"{scores['split']}: accuracy {scores['accuracy']:.4f}, loss {scores['loss']:.4f}, "
            f"{scores['n']} images"
        )


@app.command()
def predict(
    run: Annotated[Path, typer.Argument(help="folder of a run of `hubpath fit`")],
    images: Annotated[list[Path], typer.Argument(help="image files")],
    device: Device = "cpu",
) -> None:
    """Class and probability of each image, and which experts spoke with what weight."""
    with _messages():
        from .recipes.predict import predict as recipe

        for p in recipe(run, images, device):
            experts = ", ".join(f"{name} {weight:.2f}" for name, weight in p.experts.items())
            print(f"{p.path}: {p.label} ({p.probability:.3f}); experts: {experts}")


@contextlib.contextmanager
def _messages() -> Iterator[None]:
    """Turns what a user can mend into a message and an exit status; anything else is a bug."""
    from .training import NonFiniteLoss

    try:
        yield
    except InterruptedError as error:
        errors.print(f"[yellow]{escape(str(error))}[/]", soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except (NonFiniteLoss, OSError) as error:
        errors.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def main() -> None:
    """The entry point."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", PRIMITIVE_CACHE)
    app(sys.argv[1:])
