"""What the emulated device saw of this process: waits of the host, launches, races."""

from __future__ import annotations

from . import bindings


def waits() -> dict[str, int]:
    """How often the host waited, by what made it."""
    return _counts(bindings.ops().waits())


def launches() -> dict[str, int]:
    """How often each operator, copy or kernel ran on the device."""
    return _counts(bindings.ops().launches())


def reset() -> None:
    """Starts both counts again."""
    bindings.ops().reset_counts()


def take_races() -> list[str]:
    """The races found since the last call, each once."""
    return bindings.ops().take_races().splitlines()


def _counts(text: str) -> dict[str, int]:
    pairs = (line.split(" ", 1) for line in text.splitlines())
    return {name: int(count) for count, name in pairs}
