"""Options of a command, made from the fields of its settings."""

from __future__ import annotations

import inspect
import operator
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Optional

import typer

from ..fields import Setting, Settings, full_name, leaves, nested


def options(
    settings: type[Settings],
    shown: Iterable[str],
    hidden: Iterable[str] = (),
    spellings: Mapping[str, str] | None = None,
    defaults: Settings | None = None,
) -> Callable[[Callable], Callable]:
    """Gives a command an option for each of some settings.

    shown, hidden: their names, as ``full_name`` takes them; whether help lists them. spellings:
    further options of the same meaning, by name: {"lr_expert": "--lr"}. defaults: what holds where
    nothing is given, for help; None: that depends, such as on a preset.

    The command is a function whose first argument is what was asked for, as ``from_dict`` takes it;
    its other arguments are options that it declares itself. Shown options come before those, hidden
    ones after.
    """
    known, spellings = dict(leaves(settings)), spellings or {}
    # A parameter of a signature takes no dots; names of leaves are unique where they are options.
    names = {name: full_name(settings, name) for name in (*shown, *hidden)}
    hide = set(hidden)

    def decorate(command: Callable) -> Callable:
        def run(**arguments: Any) -> Any:
            asked = {full: arguments.pop(name) for name, full in names.items()}
            asked = {full: value for full, value in asked.items() if value is not None}
            return command(nested(asked), **arguments)

        hints = typing.get_type_hints(command, include_extras=True)
        _, *own = inspect.signature(command).parameters.values()
        own = [p.replace(annotation=hints[p.name], kind=p.KEYWORD_ONLY) for p in own]
        made = [
            _parameter(
                name, known[full], name in hide, spellings.get(name), _default(defaults, full)
            )
            for name, full in names.items()
        ]
        count = len(names) - len(hide)
        run.__signature__ = inspect.Signature([*made[:count], *own, *made[count:]])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _default(defaults: Settings | None, full: str) -> tuple[Any] | None:
    """A setting's default, by its dotted name; None: not known."""
    return None if defaults is None else (operator.attrgetter(full)(defaults),)


def _help(known: Setting, default: tuple[Any] | None) -> str:
    """What an option means, may be and is by itself. Nobody types None: what it stands for is the
    default where the default is None."""
    text, _, unset = known.help.partition("; None: ") if default else (known.help, "", "")
    choices = known.rules.get("choices")
    if choices and not all(re.search(rf"\b{re.escape(str(one))}\b", text) for one in choices):
        text += f": {known.allowed().removesuffix(', or None')}"
    if not default:
        return text
    value = unset or "none" if default[0] is None else _typed(default[0])
    return f"{text}; default: {value}"


def _typed(value: Any) -> str:
    """As it is typed."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def _parameter(
    name: str, known: Setting, hidden: bool, spelling: str | None, default: tuple[Any] | None
) -> inspect.Parameter:
    flag = "--" + name.replace("_", "-")
    names = [spelling, flag] if spelling else [flag]
    if known.kind is bool:
        names = [f"{flag}/--no-{flag.removeprefix('--')}"]
    kind = str if known.many else known.kind
    option = typer.Option(*names, help=_help(known, default), hidden=hidden, show_default=False)
    # Typer reads it on Python 3.10 too, where it needs Optional spelt out.
    annotation = Annotated[Optional[kind], option]  # noqa: UP045
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )
