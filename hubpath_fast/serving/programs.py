"""What every export with torch.export shares: its batches, no chatter, no traces."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch

EXAMPLE = 3  # images in the example batch: sizes of 0 and 1 would be taken for fixed
MOST_SPARES = 2  # spare images of an expert in the sparse form
# In evaluation torch has another BatchNorm on CUDA for more than 65,535 images: a program has one
# of the two, and must take no batch that wants the other, spare images included.
MOST_ON_CUDA = 65_535 - MOST_SPARES


def any_batch(device: torch.device) -> dict[int, torch.export.Dim]:
    """The dynamic sizes of a batch of images on a device, its first dimension alone."""
    most = MOST_ON_CUDA if device.type == "cuda" else None
    return {0: torch.export.Dim("batch", min=1, max=most)}


def without_traces(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without the lines of source that each operation came from: most of a file, and somebody's
    folders."""
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", torch.fx.Graph()).nodes:
            node.meta.pop("stack_trace", None)
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what exporters print: of a form that fails whole graphs, of each some warnings. What
    went wrong is in the exception."""
    level = logging.root.manager.disable
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(level)
