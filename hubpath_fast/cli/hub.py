"""The commands ``hubpath hub list``, ``hub show`` and ``hub plan``. All work without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..sizes import bytes_text, parse_bytes
from .messages import console, messages

if TYPE_CHECKING:
    from rich.table import Table

    from ..recipes.hub_plan import HubPlan

app = typer.Typer(
    help="What can be an expert, and what it costs.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("list")
def list_names(
    pattern: Annotated[
        Optional[str],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Argument(help='part of a name, or a pattern such as "timm/*convnext*"'),
    ] = None,
) -> None:
    """Names of hubs and models; without PATTERN, an overview."""
    with messages():
        from ..recipes.hub_commands import list_hub

        print("\n".join(list_hub(pattern)))


@app.command()
def show(
    name: Annotated[
        str,
        typer.Argument(help='a model, a hub, or several with commas; options too: "NAME?size=192"'),
    ],
    batch_size: Annotated[int, typer.Option(help="rows per expert, for the memory", min=1)] = 48,
) -> None:
    """Size, cost, normalisation, weights and memory of a model, or of each expert of a hub; and the
    hub's router."""
    with messages():
        from ..recipes.hub_commands import router
        from ..recipes.hub_commands import show as recipe

        entries = recipe(name)
        for entry in entries:
            print(_text(entry, batch_size))
        if len(entries) > 1:
            state = sum(entry.costs.state_bytes for entry in entries)
            parameters = sum(entry.costs.parameters for entry in entries)
            print(
                f"all {len(entries)}: {parameters / 1e6:.1f} M parameters; "
                f"{bytes_text(state)} of weights, gradients and AdamW's moments, and the "
                "activations of each image's K active experts"
            )
            print(f"router: {router(name)}")


def _text(entry, batch_size: int) -> str:
    costs = entry.costs
    giga = "unknown," if costs.flops is None else f"{costs.flops / 1e9:.2f} G"
    lines = {
        "parameters": f"{costs.parameters / 1e6:.2f} M",
        "FLOPs": f"{giga} an image, forward, at {costs.size} x {costs.size}",
        "images": f"{entry.native_size} px, mean {_numbers(entry.mean)}, std {_numbers(entry.std)}",
        "weights": entry.origin or "none: random weights only",
    }
    if entry.problem is not None:
        lines["problem"] = entry.problem
    elif entry.place is not None:
        lines["kept as"] = entry.place + ("" if entry.cached else " (not there yet)")
    lines["memory"] = (
        f"about {bytes_text(costs.training_bytes(batch_size))} to train on {batch_size} rows in "
        f"float32: {bytes_text(costs.state_bytes)} with AdamW, "
        f"{bytes_text(costs.activation_bytes)} a row"
    )
    title = f"{entry.name}  ({entry.spec})" if "?" in entry.spec else entry.name
    return "\n".join([title, *(f"  {key:<10}  {text}" for key, text in lines.items())])


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


@app.command()
def plan(
    hub: Annotated[str, typer.Option(help="a hub, or models with commas between")],
    ranks: Annotated[int, typer.Option(help="processes, each with a device of its own", min=1)],
    memory: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help='of a device, such as "80GB" or "16GiB"; default: no bound'),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="of a step, over all ranks", min=1)] = 48,
    k: Annotated[int, typer.Option(help="active experts of a sample", min=1)] = 2,
    size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="pixels a side of the images; default: what suits the hub", min=1),
    ] = None,
    parallel: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="ep, dp or DPxEP, such as 2x4; default: ep if there are enough experts"),
    ] = None,
    run: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="folder of a run of this hub, for the rows that each expert gets"),
    ] = None,
    measure: Annotated[
        bool,
        typer.Option("--measure", help="time the experts, in place of counting their work"),
    ] = False,
    device: Annotated[str, typer.Option(help="to measure on: cpu, cuda, cuda:1, ...")] = "cpu",
) -> None:
    """Which rank would have which expert of a hub; memory, time and traffic of a training step."""
    with messages():
        from ..recipes.hub_plan import plan_hub

        bound = None if memory is None else parse_bytes("memory", memory)
        found = plan_hub(
            hub, ranks, bound, batch_size, k, size, parallel, run, device if measure else None,
            lambda text: console.print(f"measuring {text}", highlight=False, markup=False),
        )  # fmt: skip
        console.print(_table(found))
        for line in _summary(found):
            console.print(line, soft_wrap=True, highlight=False, markup=False)


def _table(found: HubPlan) -> Table:
    from rich.table import Table

    shown = Table("rank" if found.dp == 1 else "rank of a replica", "experts")
    for name in ("rows", "memory", "ms" if found.measured else "work, % of the mean"):
        shown.add_column(name, justify="right")
    work = found.placed.work
    for rank, needed in enumerate(found.bytes_of_ranks):
        own = found.experts_of(rank)
        time = work[rank] if found.measured else 100 * work[rank] * found.ep / sum(work)
        rows = f"{sum(found.rows[i] for i in own):.1f}"
        experts = ", ".join(found.names[i] for i in own) or "none"
        shown.add_row(str(rank), experts, rows, bytes_text(needed), f"{time:.1f}")
    return shown


def _summary(found: HubPlan) -> list[str]:
    total = found.dp * found.ep
    kind = {1: "expert parallel"}.get(found.dp, f"{found.dp} replicas of {found.ep} ranks")
    if found.ep == 1:
        kind = "data parallel" if found.dp > 1 else "one process"
    terms = ", ".join(f"{name} {bytes_text(size)}" for name, size in found.terms.items())
    return [
        f"{total} rank{'s' * (total > 1)}: {kind}; images of {found.size} px, float32, AdamW, "
        "100 classes; working space of the libraries comes on top",
        f"imbalance: the slowest rank has {found.placed.imbalance:.2f} times the mean",
        f"a step: a rank sends {bytes_text(found.sent)}" + (f" ({terms})" if terms else ""),
    ]
