"""Ranks that fail: what one raises, said by the others; and one that is gone, in one sentence.

A rank that ends leaves a word in the store that all of them share, where it still can; the others
find it when their next collective fails. One that is killed leaves none.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

KEY = "failed"
# What others raise of an error, by the first of these that it is: commands end alike by kind.
KINDS = (FloatingPointError, FileNotFoundError, ValueError, InterruptedError, OSError)


class RankFailure(OSError):
    """Another rank of the run has ended, or did not come to a collective in time."""

    @classmethod
    def of(cls, error: Exception, world: int, store: Any) -> RankFailure:
        """error: torch's. store: where ranks leave their last words; None: there is none."""
        words = [] if store is None else _found(store, world)
        if words:
            return cls(f"the run cannot go on: {'; '.join(words)}")
        if re.search("time[d ]*out", str(error), re.IGNORECASE):
            return cls("the run cannot go on: another rank is alive and did not come in time")
        return cls(
            "the run cannot go on: another rank has ended without a word, as if it was killed"
        )


class Words(NamedTuple):
    """An exception as another process can say it. kind: of ``KINDS``. number, place: the errno and
    the file of a system's error."""

    kind: int | None
    text: str
    number: int | None = None
    place: str | None = None


def words_of(error: Exception) -> Words:
    kind = next((i for i, kind in enumerate(KINDS) if isinstance(error, kind)), None)
    notes = getattr(error, "__notes__", [])
    text = str(error) or type(error).__name__
    if isinstance(error, OSError) and error.strerror is not None:
        place = None if error.filename is None else str(error.filename)
        return Words(kind, error.strerror, error.errno, place)
    if kind is None:
        text = f"{type(error).__name__}: {text}"
    return Words(kind, " ".join([text, *(f"({note})" for note in notes)]))


def like(words: Words, before: str) -> Exception:
    """An exception of the same kind, whose message starts with ``before``."""
    kind = RuntimeError if words.kind is None else KINDS[words.kind]
    if words.number is not None:
        return OSError(words.number, before + words.text, words.place)
    return kind(before + words.text)


@contextmanager
def last_words(rank: int, store: Any) -> Iterator[None]:
    """What ends this rank goes to the store; not what all ranks know already."""
    try:
        yield
    except BaseException as error:
        known = isinstance(error, RankFailure) or getattr(error, "agreed", False)
        if store is not None and not known:
            text = f"rank {rank} has ended: {str(error) or type(error).__name__}"
            with suppress(RuntimeError):  # the store's process is gone as well
                store.set(f"{KEY}/{rank}", text)
        raise


def _found(store: Any, world: int) -> list[str]:
    try:
        keys = [f"{KEY}/{rank}" for rank in range(world)]
        return [store.get(key).decode() for key in keys if store.check([key])]
    except RuntimeError:
        return []
