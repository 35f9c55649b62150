"""The one setting of oneDNN, torch's convolution library on CPUs, that a hub cannot do without.

Group sizes differ at every step, and each is another shape to every layer of an expert: far more
than the 1,024 prepared primitives that oneDNN keeps by default, so it prepares them again. There is
no function of torch for it; oneDNN reads an environment variable once, when it prepares its first
primitive.
"""

from __future__ import annotations

import os

VARIABLE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
CAPACITY = 8192


def enlarge_primitive_cache() -> None:
    """Let oneDNN keep ``CAPACITY`` primitives, unless the user has set another number.

    Without effect once a convolution or matrix product has gone through oneDNN in this process.
    """
    os.environ.setdefault(VARIABLE, str(CAPACITY))
