"""Figures as PNG bytes."""

from __future__ import annotations

import io

from matplotlib.figure import Figure

from .style import DPI


def png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as a PNG of ``scale`` times its size in CSS pixels (100 an inch)."""
    out = io.BytesIO()
    # Without the version of the writer in it, equal figures give equal bytes.
    figure.savefig(out, format="png", dpi=DPI * scale, metadata={"Software": None})
    return out.getvalue()
