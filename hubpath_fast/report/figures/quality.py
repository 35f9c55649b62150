"""Do the weights point to experts that do well? (the paper's Fig. 3b)"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from ...measure import Measure
from .. import style
from ..arrays import to_names
from ..quality import Quality
from .axis import value_formatter, value_limits
from .bars import Bar, draw_bars

SHOWN = {
    "top": ("largest\nweight", "expert of the largest weight", style.OKABE_ITO[0]),
    "random": ("random\nexpert", "random expert (expectation)", style.PLAIN),
}


@style.styled
def quality_bars(qualities: Sequence[Quality], names: Sequence[str], measure: Measure) -> Figure:
    """A pair of bars a line: what the top-weighted and a random expert reach on the counted
    samples, whose number stands beside the name. A line without any has a dash."""
    if not qualities:
        raise ValueError("qualities is empty; give at least one")
    names = style.fit_all(to_names("names", names, len(qualities), "qualities"), 2.0, style.NORMAL)
    values = {key: [getattr(quality, key) for quality in qualities] for key in SHOWN}
    known = [v for column in values.values() for v in column if not np.isnan(v)] or [0.0, 1.0]
    low, high = value_limits(min(0.0, *known), max(known), measure)
    top = measure.limits[1]
    return draw_bars(
        [f"{name}  (n = {q.counted})" for name, q in zip(names, qualities, strict=True)],
        {
            label: [Bar(None if np.isnan(v) else v, color) for v in values[key]]
            for key, (_, label, color) in SHOWN.items()
        },
        {
            head: ["–" if np.isnan(v) else measure.number(v) for v in values[key]]
            for key, (head, _, _) in SHOWN.items()
        },
        f"{measure.label} (mean over the counted samples)",
        (low if min(known) < 0 else 0.0, high if top is None else top),
        value_formatter(measure),
    )  # fmt: skip
