"""How much each expert has a say on the data set as a whole (the paper's Fig. 3a)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from .. import style
from ..arrays import to_array, to_fractions, to_names
from .bars import Bar, draw_bars


@style.styled
def weight_bars(mean: Any, asked: Any, expert_names: Sequence[str]) -> Figure:
    """Mean weight of each expert as a bar, and the share of samples that it was asked about.

    mean: [M] in 0..1, over all samples, 0 where an expert was not asked. asked: [M] in 0..1.
    """
    values, shares = (
        to_fractions(name, to_array(name, given).astype(np.float64))
        for name, given in (("mean", mean), ("asked", asked))
    )
    if values.ndim != 1 or not values.size or values.shape != shares.shape:
        raise ValueError(
            f"mean has shape {list(values.shape)} and asked {list(shares.shape)}; give one number "
            "for each expert in both"
        )
    names = to_names("expert_names", expert_names, len(values), "entries of mean")
    bars = [Bar(float(v), style.look(i).color, style.look(i).hatch) for i, v in enumerate(values)]
    columns = {
        "mean\nweight": [f"{value:.3f}" for value in values],
        "share of\nsamples": [f"{100 * share:.1f} %" for share in shares],
    }
    limits = (0.0, max(float(values.max()), 0.01))
    return draw_bars(names, {"": bars}, columns, "mean pathway weight", limits)
