"""hubpath_fast: transfer learning from a hub of pre-trained models, routed per sample.

    import hubpath_fast as hp
    from hubpath_fast import functional as HF

``hp.HubPathway`` is the model, ``hp.HubPathwayLoss`` its three losses, ``hp.create_model`` a hub of
named models, ``HF`` the operations underneath, ``hp.reference`` the method in a page of PyTorch.
"""

from __future__ import annotations

from pathlib import Path

from . import functional, parallel, reference
from .hub import create_model
from .model import (
    FixedRoutes,
    HubPathway,
    HubPathwayLoss,
    LinearAggregator,
    MLPAggregator,
    PathwayGenerator,
    PathwayLosses,
    PathwayOutput,
    RoutingPolicy,
    SumAggregator,
)
from .pretrained import from_pretrained, load_expert
from .routing import Routing
from .serving import export

# An installation has the kernels as ``hubpath_fast/kernels``. A checkout that was never installed
# has them at its top, and must run too: a machine with a GPU is not always one to install on.
_HERE = Path(__file__).resolve().parent
if not (_HERE / "kernels").is_dir() and (_HERE.parent / "kernels" / "noisy_topk.py").is_file():
    __path__.append(str(_HERE.parent))

__version__ = "0.1.0"
__all__ = [
    "FixedRoutes",
    "HubPathway",
    "HubPathwayLoss",
    "LinearAggregator",
    "MLPAggregator",
    "PathwayGenerator",
    "PathwayLosses",
    "PathwayOutput",
    "Routing",
    "RoutingPolicy",
    "SumAggregator",
    "create_model",
    "export",
    "from_pretrained",
    "functional",
    "load_expert",
    "parallel",
    "reference",
]
