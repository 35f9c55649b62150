"""The command line, ``hubpath``: demo, fit, evaluate, predict, compare, report,
hub, data.

Every command is a thin call of a recipe; how each ends that cannot go on, see cli_messages.py.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from .._onednn import enlarge_primitive_cache
from . import compare as cli_compare
from .data import app as data_app
from .hub import app as hub_app
from .messages import console, messages

app = typer.Typer(
    name="hubpath",
    help="Route each input to the K most useful of your pre-trained models, fine-tuned end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.add_typer(hub_app, name="hub")
app.add_typer(data_app, name="data")
app.command()(cli_compare.compare)
app.command()(cli_compare.report)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]


# Typer reads these annotations on Python 3.10 too, where it needs Optional spelt out.
OptionalInt, OptionalFloat, OptionalStr = Optional[int], Optional[float], Optional[str]  # noqa: UP045


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "hubpath-demo"
    ),
    seed: Annotated[int, typer.Option(help="of the split, the weights, the noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a few epochs, under a minute")] = False,
    device: Device = "cpu",
    single_lr: Annotated[
        OptionalFloat, typer.Option(help="rate of the single experts; default as Hub-Pathway's")
    ] = None,
) -> None:
    """The whole loop on handwritten digits: no download, no GPU, a few minutes."""
    with messages():
        from ..recipes.demo import demo as run

        run(out, seed, quick, device, single_lr, console)


@app.command()
def fit(
    data: Annotated[
        OptionalStr, typer.Option(help="folder with train/ (val/, test/) or train.txt")
    ] = None,
    hub: Annotated[
        OptionalStr, typer.Option(help="model names, comma-separated, or a hub of `hubpath hub`")
    ] = None,
    preset: Annotated[
        OptionalStr,
        typer.Option(help="paper-homogeneous, paper-heterogeneous, tiny or tiny-homogeneous"),
    ] = None,
    dataset: Annotated[
        OptionalStr, typer.Option(help="a data set of `hubpath data list`, such as cars")
    ] = None,
    data_root: Annotated[OptionalStr, typer.Option(help="folder that holds --dataset")] = None,
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
        typer.Option(
            help="peak rate of the experts; heads get 3, the router 10 times as much, or as much "
            "more as in the preset"
        ),
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
    cache: Annotated[
        OptionalStr, typer.Option(help="keep decoded images: memory, disk or none")
    ] = None,
    cache_dir: Annotated[
        OptionalStr, typer.Option(help="folder of --cache disk; default the user's cache")
    ] = None,
    validation: Annotated[
        OptionalFloat, typer.Option(help="share of train held out if there is no validation split")
    ] = None,
    crops: Annotated[
        OptionalInt, typer.Option(help="5 or 10: test over that many crops an image, too")
    ] = None,
    head_init: Annotated[
        OptionalFloat, typer.Option(help="standard deviation of the new heads' weights")
    ] = None,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="any setting of --print-config: KEY=VALUE, trainer.decay=0.2"),
    ] = None,
    flip: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--flip/--no-flip", help="mirror half of the images"),
    ] = None,
    augment: Annotated[
        OptionalStr,
        typer.Option(help="crop and flip on the host, image by image, or on the device, by batch"),
    ] = None,
    seed: Annotated[OptionalInt, typer.Option()] = None,
    seeds: Annotated[
        OptionalStr, typer.Option(help="0,1,2: a run each, in OUT/seed-S, then mean and spread")
    ] = None,
    device: Annotated[OptionalStr, typer.Option(help="cpu, cuda, cuda:1, ...")] = None,
) -> None:
    """Train a Hub-Pathway on your own images, or on a data set that has a name."""
    with messages():
        from ..recipes.fit import fit as run
        from ..recipes.seeds import fit_seeds
        from ..runs.resolve import parse_seeds, read_seeds, settings

        if seed is not None and seeds is not None:
            raise ValueError("seed and seeds: give one of them")
        chosen_seeds = None if seeds is None else parse_seeds(seeds)
        if resume and chosen_seeds is None and (held := read_seeds(out)) is not None:
            chosen_seeds = tuple(held["seeds"])
        chosen = settings(
            out,
            resume,
            config,
            top={
                "data": data,
                "dataset": dataset,
                "data_root": data_root,
                "hub": None if hub is None else [n.strip() for n in hub.split(",") if n.strip()],
                "k": k,
                "pretrained": pretrained,
                "image_size": image_size,
                "flip": flip,
                "augment": augment,
                "workers": workers,
                "cache": cache,
                "cache_dir": cache_dir,
                "validation": validation,
                "crops": crops,
                "head_init": head_init,
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
                "lr_head": lr_head,
                "lr_router": lr_router,
                "clip_norm": clip_norm,
                "accumulate": accumulate,
                "amp": "bf16" if amp else None,
                "eval_every": eval_every,
                "patience": patience,
                "save_every": save_every,
                "seed": seed,
                "device": device,
            },
            preset_name=preset,
            extra=set_ or (),
        )
        if print_config:
            print(chosen.to_json())
            return
        if chosen_seeds is not None:
            stopped = not fit_seeds(chosen, chosen_seeds, out, resume, console)
        else:
            stopped = run(chosen, out, resume, console)[0].interrupted
        if stopped:
            raise typer.Exit(130)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="folder of a run of `hubpath fit`")],
    data: Annotated[OptionalStr, typer.Option(help="other data with the same classes")] = None,
    device: Device = "cpu",
    crops: Annotated[
        int, typer.Option(help="1, 5 or 10 of each image; the logits are added up")
    ] = 1,
    data_root: Annotated[
        OptionalStr, typer.Option(help="where the run's own data set lies now")
    ] = None,
) -> None:
    """Accuracy and loss of a run's best checkpoint."""
    with messages():
        from ..recipes.predict import evaluate as recipe

        scores = recipe(run, data, device, crops, data_root)
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
    with messages():
        from ..recipes.predict import predict as recipe

        for p in recipe(run, images, device):
            experts = ", ".join(f"{name} {weight:.2f}" for name, weight in p.experts.items())
            print(f"{p.path}: {p.label} ({p.probability:.3f}); experts: {experts}")


def main() -> None:
    """The entry point."""
    enlarge_primitive_cache()  # before the first convolution: a command may run single models first
    app(sys.argv[1:])
