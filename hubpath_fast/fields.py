"""Settings: frozen dataclasses that check themselves, and survive a trip to JSON.

Everything that is known of a setting stands at its field, once: what it may be, what it means, and
whether two runs that differ in it count as the same. Commands make their options from the fields,
the documentation its table, and resuming compares by ``identity()``.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import operator
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

S = TypeVar("S", bound="Settings")

LARGEST = 2**63  # above all integers that torch and numpy take
_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "text"}
_BOUNDS = {
    "low": ("of at least", operator.ge),
    "high": ("of at most", operator.le),
    "above": ("above", operator.gt),
    "below": ("below", operator.lt),
}


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    below: float | None = None,
    choices: Sequence[Any] | None = None,
    finite: bool = True,
    free: bool = False,
    added: bool = False,
    convert: Callable[[Any], Any] | None = None,
) -> Any:
    """A field of a ``Settings`` class.

    help: what it means, a phrase or a sentence. low, high: the least and the largest value. above,
    below: bounds that are not allowed themselves. choices: the only values. finite: False allows
    infinity. free: two runs may differ in it and still be the same run: it changes no result but by
    rounding. added: runs older than the setting have none and are as its default says, so it counts
    only where it differs from that. convert: brings other spellings of a value to the one that is
    checked and kept.
    """
    rules = {"low": low, "high": high, "above": above, "below": below, "choices": choices}
    metadata = {**rules, "help": help, "finite": finite, "free": free, "added": added}
    metadata["convert"] = convert
    if isinstance(default, (Settings, type)):
        factory = default if isinstance(default, type) else lambda: default
        return dataclasses.field(default_factory=factory, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Setting:
    """What is known of one setting.

    kind: int, float, bool or str, of a list of them its items' kind. many: whether it is a list
    (kept as a tuple). optional: whether it may be None. inner: for settings inside settings, their
    class.
    """

    name: str
    kind: type
    many: bool
    optional: bool
    default: Any
    rules: Mapping[str, Any]
    inner: type[Settings] | None = None

    @property
    def help(self) -> str:
        return self.rules["help"]

    @property
    def free(self) -> bool:
        return self.rules["free"]

    def allowed(self) -> str:
        """What a value may be, in words: "an integer in 1..5", "one of adamw, sgd"."""
        rules, word = self.rules, _WORDS.get(self.kind, self.kind.__name__)
        if rules["choices"] is not None:
            text = f"one of {', '.join(map(str, rules['choices']))}"
        else:
            bounds = [rule for rule in _BOUNDS if rules[rule] is not None]
            text = f"a list, each {word}" if self.many else word
            if bounds == ["low", "high"]:
                low, high = rules["low"], rules["high"]
                text += f" in {low}..{high}" if self.kind is int else f" from {low} to {high}"
            elif bounds:
                text += " " + " and ".join(f"{_BOUNDS[rule][0]} {rules[rule]}" for rule in bounds)
        return f"{text}, or None" if self.optional else text

    def checked(self, value: Any) -> Any:
        """The value in the form that is kept: lists as tuples, integers of a number as floats.

        Raises ValueError for anything that is not allowed.
        """
        if self.inner is not None:
            made = self.inner.from_dict(value) if isinstance(value, Mapping) else value
            if not isinstance(made, self.inner):
                raise ValueError(f"{self.name}: expected {self.inner.__name__}, got {value!r}")
            return made
        if value is None and self.optional:
            return None
        if self.rules["convert"] is not None:
            try:
                value = self.rules["convert"](value)
            except (AttributeError, TypeError):  # of a type that it does not know
                raise self._refusal(value) from None
        if self.many:
            if isinstance(value, str) or not isinstance(value, Sequence):
                raise self._refusal(value)
            return tuple(self._item(item, value) for item in value)
        return self._item(value, value)

    def _item(self, item: Any, value: Any) -> Any:
        rules = self.rules
        kinds = (int, float) if self.kind is float else (self.kind,)
        ok = isinstance(item, kinds) and (self.kind is bool or not isinstance(item, bool))
        if ok and isinstance(item, int):
            ok = abs(item) < LARGEST
        if ok and self.kind is float:
            item = float(item)
            ok = math.isfinite(item) or (not rules["finite"] and not math.isnan(item))
        for rule, (_, holds) in _BOUNDS.items():
            ok = ok and (rules[rule] is None or holds(item, rules[rule]))
        if not ok or (rules["choices"] is not None and item not in rules["choices"]):
            raise self._refusal(value)
        return item

    def _refusal(self, value: Any) -> ValueError:
        return ValueError(f"{self.name}: expected {self.allowed()}, got {_shown(value)}")


class Settings:
    """Base of the frozen dataclasses whose fields are made by ``setting``.

    A value is checked when an object is made, and kept in one form. ``check`` is for what several
    settings must be together; ``upgrade`` brings the contents of an older file to today's names.
    """

    def __post_init__(self) -> None:
        for known in self.settings():
            object.__setattr__(self, known.name, known.checked(getattr(self, known.name)))
        self.check()

    def check(self) -> None:
        """Raises ValueError where settings do not fit each other."""

    @classmethod
    def upgrade(cls, values: Mapping[str, Any]) -> Mapping[str, Any]:
        """The settings of an older file under today's names."""
        return values

    @classmethod
    def settings(cls) -> tuple[Setting, ...]:
        """What is known of each, in order."""
        found = cls.__dict__.get("_settings")
        if found is None:
            hints = typing.get_type_hints(cls)
            found = tuple(_read(field, hints[field.name]) for field in dataclasses.fields(cls))
            cls._settings = found
        return found

    def replace(self: S, **changes: Any) -> S:
        """A copy with some settings changed, checked again."""
        check_names(changes, [known.name for known in self.settings()])
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, as JSON takes them."""
        return {known.name: _plain(getattr(self, known.name)) for known in self.settings()}

    @classmethod
    def from_dict(cls: type[S], values: Mapping[str, Any]) -> S:
        """The inverse of ``to_dict``; also reads older files.

        Raises ValueError for an unknown name, with the closest ones, and for values not allowed.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"expected settings by their names, got {_shown(values)}")
        values = cls.upgrade(values)
        check_names(values, [known.name for known in cls.settings()])
        missing = [
            known.name
            for known in cls.settings()
            if known.default is MISSING and known.name not in values
        ]
        if missing:
            raise ValueError(f"{missing[0]}: nothing given; there is no default")
        return cls(**values)

    def identity(self) -> dict[str, Any]:
        """Whatever changes a result, flat: {"k": 2, "trainer.steps": 2000}."""
        values = {name: operator.attrgetter(name)(self) for name, _ in leaves(type(self))}
        return {
            name: _plain(values[name])
            for name, known in leaves(type(self))
            if not known.free and not (known.rules["added"] and values[name] == known.default)
        }


def leaves(cls: type[Settings], prefix: str = "") -> Iterator[tuple[str, Setting]]:
    """All settings with their dotted names, those inside of settings too."""
    for known in cls.settings():
        if known.inner is None:
            yield prefix + known.name, known
        else:
            yield from leaves(known.inner, f"{prefix}{known.name}.")


def full_name(cls: type[Settings], name: str) -> str:
    """The dotted name of a setting, of which the last parts will do where it is the only one.

    Raises ValueError, with the closest names, where none or several are meant.
    """
    known = [full for full, _ in leaves(cls)]
    found = [full for full in known if full == name or full.endswith(f".{name}")]
    if len(found) > 1:
        raise ValueError(f"setting {name!r}: expected one of {', '.join(found)}")
    if not found:
        whole = known if "." in name else [full.rpartition(".")[2] for full in known]
        check_names({name: None}, list(dict.fromkeys(whole)))
    return found[0]


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """{"k": 1, "trainer.steps": 2} -> {"k": 1, "trainer": {"steps": 2}}."""
    made: dict[str, Any] = {}
    for name, value in values.items():
        *outer, last = name.split(".")
        inner = made
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return made


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Where two identities differ, in words: "k: 2 there, 3 now"."""
    absent = "absent"
    return [
        f"{name}: {old.get(name, absent)!r} there, {new.get(name, absent)!r} now"
        for name in {**old, **new}
        if old.get(name, absent) != new.get(name, absent)
    ]


def there_are(
    known: Iterable[str], name: str, spellings: Mapping[str, str] | None = None, most: int = 3
) -> str:
    """What there is instead of an unknown name, for its message: the closest ones, then all.

    spellings: of what is known, as a user may have typed it. most: of the closest, that many.
    """
    spellings = spellings or {other: other for other in known}
    close = difflib.get_close_matches(name, spellings, n=most, cutoff=0.5)
    close = dict.fromkeys(spellings[spelling] for spelling in close)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    return f"{hint}There are {', '.join(known)}"


def check_names(given: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises ValueError for the first name that is not known, with the closest."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=3, cutoff=0.5)
            close = close or [other for other in known if str(name) in other.split("_")]
            hint = f"closest: {', '.join(close)}" if close else f"known: {', '.join(known)}"
            raise ValueError(f"unknown setting {name!r}; {hint}")


def _read(field: dataclasses.Field, hint: Any) -> Setting:
    args = typing.get_args(hint)
    optional = type(None) in args and typing.get_origin(hint) in (typing.Union, types.UnionType)
    if optional:
        [hint] = [kind for kind in args if kind is not type(None)]
    many = typing.get_origin(hint) is tuple
    kind = typing.get_args(hint)[0] if many else hint
    inner = kind if isinstance(kind, type) and issubclass(kind, Settings) else None
    factory = field.default_factory
    default = field.default if factory is MISSING else factory()
    return Setting(field.name, kind, many, optional, default, field.metadata, inner)


def _shown(value: Any) -> str:
    """As Python writes it, cut where nobody would read on."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no integers of more than 4,300 digits
        return "an integer of thousands of digits"
    return text if len(text) <= 200 else f"{text[:60]}... ({len(text)} characters)"


def _plain(value: Any) -> Any:
    if isinstance(value, Settings):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
