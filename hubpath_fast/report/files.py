"""Files that are whole or not there, and figures as PNG bytes."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from .style import DPI


def png(figure: Figure, scale: float = 2.0) -> bytes:
    """The figure as a PNG of ``scale`` times its size in CSS pixels (100 an inch)."""
    out = io.BytesIO()
    # Without the version of the writer in it, equal figures give equal bytes.
    figure.savefig(out, format="png", dpi=DPI * scale, metadata={"Software": None})
    return out.getvalue()


def write_whole(path: str | Path, data: bytes) -> Path:
    """Writes beside ``path`` and renames, so that a crash or a full disk leaves what was there."""
    path = Path(path)
    handle, aside = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(aside, 0o666 & ~umask)  # mkstemp's own mode would hide it from others
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(aside)
        raise
    return path
