"""Several processes that train one model: each has some of its experts, or all of them.

``start`` connects what ``torchrun`` has started, ``HubPathway.distribute`` gives each rank its
experts, and ``Gradients`` stands between backward and the update.
"""

from .collectives import counted
from .failure import RankFailure
from .ranks import Ranks, layout, start, started, stop
from .reduce import Gradients
from .share import Share

__all__ = [
    "Gradients",
    "RankFailure",
    "Ranks",
    "Share",
    "counted",
    "layout",
    "start",
    "started",
    "stop",
]
