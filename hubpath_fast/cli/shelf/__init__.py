"""``hubpath shelf``: hundreds of models that stand still, by features computed once."""

from __future__ import annotations

import typer

from .add import add
from .compare import compare
from .demo import demo
from .extract import extract
from .fit import fit
from .predict import predict
from .prune import prune
from .rank import rank
from .unfreeze import unfreeze

app = typer.Typer(
    help="Hundreds of frozen models: compute their features once; then rank, route and prune them "
    "in minutes.",
    no_args_is_help=True,
    rich_markup_mode=None,
)
for command in (extract, rank, fit, compare, prune, add, predict, unfreeze, demo):
    app.command()(command)
