"""torchvision, imported when something of it is asked for: that takes a second, for which commands
that only list or print settings should not wait."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Later:
    """Stands for a module, by name, until an attribute of it is needed."""

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(import_module(self._name), name)


datasets = Later("torchvision.datasets")
v2 = Later("torchvision.transforms.v2")
