"""How commands end that cannot go on: one clear message and a status, never a traceback.

Wrong input ends with status 2, a signal with status 130, a failed training with status 1.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import typer
from rich.console import Console
from rich.markup import escape

console = Console(emoji=False)  # ":smile:" in a path is no picture
errors = Console(stderr=True, emoji=False)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Turns what a user can mend into a message and an exit status; anything else is a bug."""
    try:
        yield
    except (InterruptedError, KeyboardInterrupt) as error:
        errors.print(f"[yellow]{escape(str(error) or 'stopped')}[/]", soft_wrap=True)
        raise typer.Exit(130) from None
    except (ValueError, FileNotFoundError) as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except (FloatingPointError, OSError) as error:  # NonFiniteLoss is one of the former
        errors.print(f"[bold red]failed:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(1) from None


def show_notes(notes: Iterable[str]) -> None:
    """What a user should know beside the result."""
    for note in notes:
        console.print(f"[yellow]note[/] {escape(note)}", soft_wrap=True, highlight=False)
