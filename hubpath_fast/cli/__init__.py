"""The command line, ``hubpath``: demo, fit, evaluate, predict, save, tune, compare and others.

Every command is a thin call of a recipe; how each ends that cannot go on, see messages.py.
"""

from __future__ import annotations

import sys

import typer

from .._onednn import enlarge_primitive_cache
from ..parallel import started
from .add import add
from .atari import app as atari_app
from .budget import budget
from .compare import compare, report
from .data import app as data_app
from .demo import demo
from .export import export
from .fit import evaluate, fit
from .hub import app as hub_app
from .landmarks import app as landmarks_app
from .messages import errors, print_in_any_encoding
from .predict import predict
from .prune import prune
from .save import save
from .shelf import app as shelf_app
from .tune import tune

app = typer.Typer(
    name="hubpath",
    help="Route each input to the K most useful of your pre-trained models, fine-tuned end to end.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
COMMANDS = (
    demo, fit, evaluate, predict, save, export, tune, budget, add, prune, compare, report,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.add_typer(hub_app, name="hub")
app.add_typer(data_app, name="data")
app.add_typer(shelf_app, name="shelf")
app.add_typer(landmarks_app, name="landmarks")
app.add_typer(atari_app, name="atari")


def main() -> None:
    """What ``hubpath_command`` calls once everything is imported."""
    print_in_any_encoding()
    enlarge_primitive_cache()  # before the first convolution: a command may run single models first
    refuse_ranks(sys.argv[1:])
    app(sys.argv[1:])


def refuse_ranks(arguments: list[str]) -> None:
    """Ends with a message where torchrun has started a command that knows no other processes."""
    ranks = started()
    fits = arguments[:1] == ["fit"] or arguments[:2] == ["landmarks", "fit"]
    if ranks.single or fits:
        return
    if ranks.is_first:
        errors.print(
            f"[bold red]error:[/] {ranks.world} processes were started of a command that is one; "
            "torchrun is for `fit` and `landmarks fit`: run this one by `hubpath`"
        )
    sys.exit(2)
