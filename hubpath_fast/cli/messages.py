"""What commands print, and how they end that cannot go on: one clear message and a status, never a
traceback.

Wrong input ends with status 2, a signal with status 130, a failed training with status 1, and so
does what was done only in part: a check that found something, a prediction without some images.
"""

from __future__ import annotations

import codecs
import contextlib
import sys
from collections.abc import Iterator

import typer
from rich.console import Console
from rich.markup import escape

from ..parallel.ranks import started, voice
from ..worker_failure import worker_failures

console = Console(emoji=False)  # ":smile:" in a path is no picture
errors = Console(stderr=True, emoji=False)

# Our own signs where an encoding lacks them, as Latin-1 and Windows' code pages lack some.
PLAIN = dict(zip("├└│─━±×…–", ("|", "`", "|", "-", "=", "+/-", "x", "...", "-"), strict=True))


def print_in_any_encoding() -> None:
    """Lets standard output and errors take any text: what their encoding has no sign for is written
    otherwise, our own signs as ``PLAIN`` says, of names the code point (``\\u732b``)."""
    codecs.register_error("hubpath", _written_otherwise)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None or an object of the caller's has none
            stream.reconfigure(errors="hubpath")


def _written_otherwise(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    made = "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text)
    return made, error.end


def say(text: str) -> None:
    """A line on standard output, as it is: brackets in it are no markup."""
    console.print(text, soft_wrap=True, highlight=False, markup=False)


@contextlib.contextmanager
def messages() -> Iterator[None]:
    """Turns what a user can mend into a message and an exit status; anything else is a bug."""
    with _ending_together(), _in_sentences():
        yield


@contextlib.contextmanager
def stopped(kept: str) -> Iterator[None]:
    """Says of Ctrl-C what is kept: a clause such as "the same command goes on from here"."""
    try:
        yield
    except KeyboardInterrupt:
        raise InterruptedError(f"stopped; {kept}") from None


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Of several ranks none ends by a signal of its own, but when all do, or once it has said what
    happened to another, upon which torchrun sends it one."""
    if started().single:
        yield
        return
    from ..training import Interrupt

    with Interrupt():
        yield


@contextlib.contextmanager
def _in_sentences() -> Iterator[None]:
    try:
        with worker_failures():
            yield
    except BrokenPipeError:  # who read our output has seen enough, as `head` does: Typer is silent
        raise
    except (InterruptedError, KeyboardInterrupt) as error:
        _print(error, f"[yellow]{escape(str(error) or 'stopped')}[/]")
        raise typer.Exit(130) from None
    except (ValueError, FileNotFoundError) as error:
        _print(error, f"[bold red]error:[/] {escape(_in_words(error))}")
        raise typer.Exit(2) from None
    except (FloatingPointError, OSError) as error:  # such as NonFiniteLoss and WorkerFailure
        _print(error, f"[bold red]failed:[/] {escape(_in_words(error))}")
        raise typer.Exit(1) from None


def _print(error: BaseException, text: str) -> None:
    """Of several ranks one says it."""
    with voice(error) as speaks:
        if speaks:
            errors.print(text, soft_wrap=True)


def _in_words(error: Exception) -> str:
    """Of the system's errors without their number: "Permission denied: /data/run"."""
    if isinstance(error, UnicodeEncodeError):
        return f"the name {error.object!a} cannot be written in {error.encoding}; set PYTHONUTF8=1"
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    names = [str(name) for name in (error.filename, error.filename2) if name is not None]
    return ": ".join([str(error.strerror), *([" -> ".join(names)] if names else [])])
