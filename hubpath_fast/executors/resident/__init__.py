"""Hubs larger than memory: experts come when rows are routed to them, and go again."""

from .executor import ResidentExecutor
from .room import read_room
from .state import check_state

__all__ = ["ResidentExecutor", "check_state", "read_room"]
