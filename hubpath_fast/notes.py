"""What a user should know beside a result, as all commands print it."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.markup import escape

from .files import printable


def show_notes(notes: Iterable[str], console: Console) -> None:
    for note in notes:
        console.print(f"[yellow]note[/] {escape(printable(note))}", soft_wrap=True, highlight=False)
