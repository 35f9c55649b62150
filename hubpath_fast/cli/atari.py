"""``hubpath atari``: policies of games in place of classifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..files import write_json
from ..notes import show_notes
from ..tasks.atari.settings import SCRATCH, AtariSettings
from .fit import Device, OptionalPath, OptionalStr
from .messages import console, errors, messages
from .options import options

app = typer.Typer(
    help="Learn games with a hub of policies that were trained on other games.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

BAR = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())

Game = Annotated[str, typer.Argument(help="as `hubpath atari games` lists them")]
Out = Annotated[Path, typer.Option(help="folder of the run")]
Resume = Annotated[bool, typer.Option("--resume", help="go on with the run in --out")]
Set = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option("--set", help="KEY=VALUE: any setting that --print-config shows"),
]
Print = Annotated[bool, typer.Option("--print-config", help="the settings as JSON, and no run")]


@app.command()
@options(AtariSettings, ("steps", "seed", "device"), ("final_episodes", "save_every"))
def pretrain(
    asked,
    game: Game,
    out: Out = Path("hubpath-atari"),
    resume: Resume = False,
    set_: Set = None,
    print_config: Print = False,
) -> None:
    """Train a policy on a game from scratch, as a source for others: Data-Efficient Rainbow."""
    with messages():
        _fit({"game": game, "method": SCRATCH} | asked, out, resume, set_, print_config)


@app.command()
@options(
    AtariSettings, ("hub", "steps", "k", "heads", "method", "seed", "device"),
    ("explore", "renormalize", "pathway_noise", "final_episodes", "save_every"),
)  # fmt: skip
def fit(
    asked,
    game: Game,
    out: Out = Path("hubpath-atari"),
    resume: Resume = False,
    set_: Set = None,
    print_config: Print = False,
) -> None:
    """Train a Hub-Pathway over the policies of other games, RUN,RUN, on a game.

    --method takes a rival of it: finetune (one source), knowledge-flow, zoo-tuning.
    """
    with messages():
        _fit({"game": game} | asked, out, resume, set_, print_config)


@app.command()
def evaluate(
    run: Annotated[OptionalPath, typer.Argument(help="folder of a run of pretrain or fit")] = None,
    episodes: Annotated[int, typer.Option(help="games that are played", min=1)] = 100,
    random: Annotated[
        OptionalStr, typer.Option(metavar="GAME", help="in place of RUN: play it by chance")
    ] = None,
    video: Annotated[OptionalPath, typer.Option(help="draw the first game to this .gif")] = None,
    seed: Annotated[int, typer.Option(help="of the games", min=0)] = 0,
    device: Device = "cpu",
    out: Annotated[
        OptionalPath,
        typer.Option(help="write the figures here; of a run, RUN/evaluation.json by default"),
    ] = None,
) -> None:
    """What the policy of a run's last checkpoint scores: mean, interval, share of a human's score.

    Whole games over all lives, with raw scores; noise is off, and one action in a thousand is
    drawn. Nothing is chosen by these games: it is the last checkpoint, not the best.
    """
    with messages():
        from ..recipes import atari_evaluate as recipe

        player = recipe.open_player(run, random, device)
        with Progress(*BAR, console=errors, transient=True) as progress:
            task = progress.add_task("games", total=episodes)
            result = recipe.evaluate_atari(
                player, episodes, seed, video=video, on_episode=lambda _: progress.advance(task)
            )
        for line in recipe.evaluation_lines(result):
            console.print(line, soft_wrap=True, highlight=False, markup=False)
        show_notes(result["notes"], errors)
        path = out or (run / recipe.EVALUATION if run is not None else None)
        if path is not None:
            write_json(path, result)
        for written in filter(None, (video, path)):
            print(written)


@app.command()
def games(
    pattern: Annotated[
        OptionalStr, typer.Argument(help="part of a name, or a pattern such as *quest")
    ] = None,
) -> None:
    """The games of the emulator, with what humans and chance score where that is known, and ours.

    Without the emulator only our own small games are there.
    """
    with messages():
        from ..recipes.atari_games import list_games

        lines, notes = list_games(pattern)
        print("\n".join(lines))
        show_notes(notes, errors)


def _fit(
    asked: dict[str, Any], out: Path, resume: bool, set_: list[str] | None, print_config: bool
) -> None:
    from ..recipes.atari_fit import fit_atari
    from ..recipes.atari_settings import read_settings

    settings = read_settings(asked, set_ or ())
    if print_config:
        print(settings.to_json())
        return
    if fit_atari(settings, out, resume, console) is None:
        raise typer.Exit(130)


@app.command()
def compare(
    sources: Annotated[str, typer.Option(help="GAME,GAME: the hub's policies are trained on them")],
    targets: Annotated[str, typer.Option(help="GAME,...: games that every method learns")],
    out: Annotated[Path, typer.Option(help="folder of the comparison; finished runs are kept")],
    methods: Annotated[
        str,
        typer.Option(
            help="all, or names, comma-separated: scratch, finetune, knowledge-flow, zoo-tuning, "
            "hub, hub-k1"
        ),
    ] = "all",
    seeds: Annotated[str, typer.Option(help="0,1,2: every method runs once a seed")] = "0,1,2",
    steps: Annotated[int, typer.Option(help="of every run")] = 20_000,
    source_steps: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="of every source; default: as --steps"),
    ] = None,
    episodes: Annotated[int, typer.Option(help="games after the last step, for the table")] = 30,
    jobs: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="runs at a time, of one thread each; default one a core, at most 4"),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")] = "cpu",
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", help="KEY=VALUE: any setting of `hubpath atari fit`, of all runs"),
    ] = None,
) -> None:
    """Every method on the same games, from the same sources, in the same steps: one report.

    The sources are trained first, once. The same command goes on where it was stopped, and tries
    again what failed; with other methods, targets or seeds it adds to the folder.
    """
    with messages():
        from ..recipes.atari_compare import compare_atari, make_asked
        from ..runs.resolve import parse_seeds

        asked = make_asked(
            sources, targets, methods, parse_seeds(seeds), steps, source_steps, episodes, set_ or ()
        )
        if compare_atari(asked, out, jobs, device, console).failures:
            raise typer.Exit(1)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="of `hubpath atari compare` or `fit`")],
    out: Annotated[
        OptionalPath,
        typer.Option(help="folder for report.html, table.md and figures/; default FOLDER/report"),
    ] = None,
) -> None:
    """Tables and pictures of a comparison or of one run, as far as it is finished."""
    with messages():
        from ..recipes.atari_report import report_atari

        console.print(
            f"The report is in {report_atari(folder, out)}.", soft_wrap=True, markup=False
        )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for summary.json and report.html")] = Path(
        "hubpath-atari-demo"
    ),
    seed: Annotated[int, typer.Option(help="of the games, the weights, the noise")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="few steps, under a minute")] = False,
    device: Device = "cpu",
) -> None:
    """The whole loop on small games of our own: no emulator, no GPU, under ten minutes."""
    with messages():
        from ..recipes.atari_demo import atari_demo

        atari_demo(out, seed, quick, device, console)
