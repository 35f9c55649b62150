"""``hubpath export``: a trained run, or a folder of a saved model, as a package to be run."""

from __future__ import annotations

from pathlib import Path

from ..runs.folder import open_run
from ..serving import Package
from ..serving import export as write
from ..serving.exporting import ENDINGS, FORMATS


def export(
    run: str | Path,
    out: str | Path | None = None,
    format: str = "pt2",
    form: str | None = None,
    device: str = "cpu",
    routing: bool = False,
    batch: int | None = None,
    opset: int | None = None,
) -> tuple[Package, tuple[str, ...]]:
    """Exports the model of a run; see ``serving.export``. out: None: beside the run's files,
    ``export.pt2``, ``export-aoti.pt2``, ``export.onnx`` or ``parts``.

    Returns the package and notes on the run.

    Raises:
        ValueError: no run in the folder, a wrong argument; ExportError: it could not be exported.
    """
    opened = open_run(run, device)
    if out is None:
        out = Path(run) / default_name(format, form)
    opened.check_apart(out)
    package = write(
        opened.model, out, format, form, device, routing, batch, opened.image_size, opset
    )
    return package, tuple(opened.notes)


def default_name(format: str, form: str | None) -> str:
    """Of the file or folder of a package. ValueError for a format that there is not."""
    if format not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    if "parts" in (format, form):
        return "parts"
    return f"export{'-aoti' if format == 'aoti' else ''}{ENDINGS[format]}"
