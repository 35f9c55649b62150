"""The features of all images by one body.

They are gathered in a file aside, batch by batch, and mapped from there when the model's own file
is written: features of a million images need not fit into memory, and a disk that is full is an
error at a batch, not a crash.

Letters: n images, V views, b of a batch, D features, S classes of a source head.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..hub.errors import HubError
from ..hub.expert import Expert
from .bodies import (
    ends_linearly,
    features_of,
    fetch_weights,
    random_body,
    random_hash,
    read_body,
    ready,
    weights_hash,
)
from .pixels import Views
from .plan import Planned, drawn_weights
from .shelf import ShelfRecord

HALF_MAX = torch.finfo(torch.float16).max
Head = tuple[Tensor, Tensor]  # weight [S, D], bias [S]


@dataclass(frozen=True)
class Body:
    """A body that is ready. weights: their hash. known: what stands for it in a file's key. head:
    what its file of weights ends with; None: no linear layer."""

    expert: Expert
    weights: str
    known: str
    head: Head | None


def make_body(planned: Planned, record: ShelfRecord, device: torch.device) -> Body:
    """Fetches, reads or draws its weights. Raises HubError."""
    spec, model, size = planned.spec, planned.model, planned.shapes.size
    if not record.pretrained:
        expert = ready(random_body(spec, model, size, record.seed), device)
        return Body(expert, random_hash(expert), drawn_weights(record), None)
    path = fetch_weights(model)
    weights = weights_hash(path)
    expert, head = read_body(spec, model, size, path)
    return Body(ready(expert, device), weights, weights, head)


class Computation:
    """One body at work on all images.

    batch_size: of the body; on a GPU whose memory is too small for it, it is halved. seconds: that
    the body took so far, looked: for how many images.
    """

    def __init__(self, body: Body, planned: Planned, device: torch.device, batch_size: int | None):
        self.body, self.planned = body, planned
        self.batch_size = batch_size or planned.shapes.batch_size(device)
        self.seconds, self.looked = 0.0, 0

    def parts(
        self,
        squares: Tensor,
        views: Views,
        dtype: torch.dtype,
        names: Callable[[int], str],
        stop: Callable[[], None],
    ) -> Iterator[Tensor]:
        """[b, D] of the views one after another, on the host.

        squares: uint8 [n, Q, Q, 3] of the body's size. names: of images, for messages. Raises
        HubError: features that are no finite numbers, or that the dtype does not hold.
        """
        batch, shapes = self.batch_size, self.planned.shapes
        for view in range(views.count):
            for start in range(0, len(squares), batch):
                stop()
                pixels = squares[start : start + batch]
                images = views.cut(pixels, start, view, shapes.size)
                features = self.look(images)
                if features.shape[1:] != (shapes.num_features,):
                    raise HubError(
                        f"it gives features {list(features.shape[1:])} of an image, expected "
                        f"[{shapes.num_features}]"
                    )
                yield _stored(features, dtype, lambda i, s=start: names(s + i))

    def look(self, images: Tensor) -> Tensor:
        """uint8 [b, 3, S, S] -> float32 [b, D], on the host. Raises HubError."""
        began = time.perf_counter()
        while True:
            try:
                found = [
                    features_of(self.body.expert, part).cpu()
                    for part in images.split(self.batch_size)
                ]
                break
            except torch.OutOfMemoryError as error:
                most = min(self.batch_size, len(images))
                if most == 1:
                    raise HubError(f"one image is too much for its memory: {error}") from error
                self.batch_size = most // 2
            except RuntimeError as error:
                raise HubError(f"it cannot be run: {error}") from error
        self.seconds += time.perf_counter() - began
        self.looked += len(images)
        return torch.cat(found)

    def source_head(self, squares: Tensor, views: Views) -> Head | None:
        """That of the file, where its features are what the network itself gives such a layer."""
        head, shapes = self.body.head, self.planned.shapes
        if head is None or head[0].shape[1] != shapes.num_features:
            return None
        if not all(tensor.isfinite().all() for tensor in head):
            return None
        images = views.cut(squares[:2], 0, 0, shapes.size)
        return head if ends_linearly(self.body.expert, images) else None


@contextlib.contextmanager
def gathered(
    path: Path, parts: Iterable[Tensor], shape: Sequence[int], dtype: torch.dtype
) -> Iterator[Tensor]:
    """Parts one after another as one tensor of that shape, in a file that goes when the block ends.

    Raises OSError of a full disk, and what the parts raise.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(path, "wb") as file:
            for part in parts:
                file.write(part.contiguous().view(torch.uint8).numpy())
        mapped = np.memmap(path, np.uint8, "c", shape=(math.prod(shape) * dtype.itemsize,))
        yield torch.from_numpy(mapped).view(dtype).view(*shape)
    finally:
        path.unlink(missing_ok=True)


def _stored(features: Tensor, dtype: torch.dtype, name: Callable[[int], str]) -> Tensor:
    """The features as the shelf keeps them. Raises HubError."""
    finite = features.isfinite().all(dim=1)
    if not finite.all():
        first = int((~finite).nonzero()[0])
        raise HubError(f"its features of {name(first)} are not finite (NaN or infinite)")
    largest = features.abs().max().item()
    if dtype == torch.float16 and largest > HALF_MAX:
        raise HubError(
            f"its features reach {largest:.3g}, and fp16 holds {HALF_MAX:.0f} at most; make a "
            "shelf with --dtype fp32"
        )
    return features.to(dtype)
