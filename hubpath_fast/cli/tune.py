"""``hubpath tune``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from ..notes import show_notes
from .messages import console, messages, say

if TYPE_CHECKING:
    from rich.table import Table

    from ..executors import Workload
    from ..recipes.tune import Tuned


def tune(
    run: Annotated[
        Optional[Path],  # noqa: UP045  (Typer reads it on Python 3.10 too)
        typer.Argument(help="folder of a run of `hubpath fit` or `hubpath landmarks fit`"),
    ] = None,
    device: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="cpu, cuda, cuda:1, ...; default: as in training"),
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="to measure training steps for, and again predictions", min=0.1)
    ] = 20.0,
    batch_size: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="of a step; default: as in training", min=1),
    ] = None,
    forget: Annotated[
        bool, typer.Option("--forget", help="of RUN's hub, or without RUN of all, what was found")
    ] = False,
) -> None:
    """Measure what runs a run's hub the fastest on this machine, and remember it for executor=auto.

    The run stays as it is; no data is needed. It holds for hubs of the same shapes, on this device,
    in this precision, for images of this size, and for batches of this size down to half of it.
    """
    with messages():
        from ..recipes.tune import forget as drop
        from ..recipes.tune import tune as recipe

        if forget:
            count = drop(run)
            say(f"{count} measurements forgotten")
            return
        if run is None:
            raise ValueError("run: expected the folder of a run, or --forget, got neither")
        result = recipe(run, device, seconds, batch_size, lambda text: say(f"measuring {text}"))
        for tuned in result.tuned:
            say(f"\n{what(tuned.work)}")
            console.print(table(tuned))
            if (why := why_not_fastest(tuned)) is not None:
                say(why)
        if result.path is not None:
            say(f"executor=auto follows this from now on; kept in {result.path}")
        show_notes(result.notes, console)


def what(work: Workload) -> str:
    """What was measured, and on what."""
    from ..executors.remembered import device_name

    steps = "training steps" if work.gradients else "predictions"
    precision = (
        "" if work.precision is None else f" in {str(work.precision).removeprefix('torch.')}"
    )
    size = " x ".join(map(str, work.shape))
    return f"{steps} of {work.samples} x {size}{precision} on {device_name(work.device)}"


def table(tuned: Tuned) -> Table:
    """What each executor took, and which is chosen."""
    from rich.table import Table

    from ..executors.remembered import in_digits

    memory = any(spread.memory is not None for spread in tuned.times.values())
    shown = Table("executor")
    for name in ("ms per step", "p90", *(["GiB"] if memory else [])):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for name, spread in sorted(tuned.times.items(), key=lambda item: item[1].p50):
        cells = [in_digits(spread.p50), in_digits(spread.p90)]
        if memory:
            cells.append("" if spread.memory is None else f"{spread.memory / 2**30:.1f}")
        shown.add_row(name, *cells, "chosen" if name == tuned.chosen else "")
    return shown


def why_not_fastest(tuned: Tuned) -> str | None:
    """Why another one is chosen than the fastest; None: it is the fastest."""
    fastest = min(tuned.times, key=lambda name: tuned.times[name].p50)
    if tuned.chosen == fastest:
        return None
    return f"{tuned.chosen} is within the noise of {fastest}: auto's own choice"
