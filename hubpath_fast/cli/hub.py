"""The commands ``hubpath hub list`` and ``hubpath hub show``. Both work without a network."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from .messages import messages

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
                f"{_size(state)} of weights, gradients and AdamW's moments, and the activations of "
                "each image's K active experts"
            )
            print(f"router: {router(name)}")


def _text(entry, batch_size: int) -> str:
    costs = entry.costs
    lines = {
        "parameters": f"{costs.parameters / 1e6:.2f} M",
        "FLOPs": f"{costs.flops / 1e9:.2f} G an image, forward, at {costs.size} x {costs.size}",
        "images": f"{entry.native_size} px, mean {_numbers(entry.mean)}, std {_numbers(entry.std)}",
        "weights": entry.origin or "none: random weights only",
    }
    if entry.problem is not None:
        lines["problem"] = entry.problem
    elif entry.place is not None:
        lines["kept as"] = entry.place + ("" if entry.cached else " (not there yet)")
    lines["memory"] = (
        f"about {_size(costs.training_bytes(batch_size))} to train on {batch_size} rows in "
        f"float32: {_size(costs.state_bytes)} with AdamW, {_size(costs.activation_bytes)} a row"
    )
    title = f"{entry.name}  ({entry.spec})" if "?" in entry.spec else entry.name
    return "\n".join([title, *(f"  {key:<10}  {text}" for key, text in lines.items())])


def _numbers(values: tuple[float, ...]) -> str:
    return " ".join(f"{value:.4g}" for value in values)


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
