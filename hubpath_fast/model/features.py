"""Heads and router trained by themselves, on what the bodies, standing still, say of each image.

The bodies look at every image once, in evaluation mode; what each head gets of it (as a rule [F]
numbers, after pooling) and what the router looks at are kept in the host's memory. A step then
costs a few small products, whatever the bodies cost. What a body does in training alone does not
happen: no dropout before the head, no batch statistics, no augmentation of images.

Letters: n images, N of a batch, M experts, C outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from ..devices import autocast, eval_mode, to_device
from .fixed_routes import FixedRoutes
from .heads import head_layers
from .pathway import HubPathway


class Kept(nn.Module):
    """A part of a model that is given the numbers of images, and reads what was kept of them.

    kept: [n, ...] on the host. It is no buffer: checkpoints are without it.
    """

    def __init__(self):
        super().__init__()
        self.kept: Tensor | None = None

    def read(self, numbers: Tensor) -> Tensor:
        """numbers: [N] of any dtype -> what was kept of these images, where ``numbers`` are."""
        return self.kept[numbers.to(self.kept.device, torch.int64)].to(numbers.device)


class KeptHead(Kept):
    """An expert's head: numbers of images [N] -> outputs [N, C, ...]."""

    head_layers = ("layer",)  # all of it is head; see ``mark_head``

    def __init__(self, expert: nn.Module, name: str):
        super().__init__()
        found = head_layers(expert)
        if len(found) != 1:
            raise _unsplit(name, f"it has {len(found)} heads" if found else "it has no head")
        [self.layer] = found
        self.name, self.row_shape = name, torch.Size()  # of one image's outputs: [C, ...]

    def see(self, expert: nn.Module, x: Tensor) -> Tensor:
        """What the head gets of the expert's images x [N, ...]: [N, ...]."""
        seen: list[tuple[tuple, Tensor]] = []
        # A copy: what changes the outputs after the head may do so in place.
        handle = self.layer.register_forward_hook(
            lambda _, inputs, output: seen.append((inputs, output.clone()))
        )
        try:
            output = expert(x)
        finally:
            handle.remove()
        if len(seen) != 1:
            raise _unsplit(self.name, f"its head is called {len(seen)} times for an image")
        inputs, own = seen[0]
        if len(inputs) != 1 or len(inputs[0]) != len(x) or not _same(own, output):
            raise _unsplit(self.name, "its outputs are not those of its head")
        self.row_shape = output.shape[1:]  # a 1 x 1 convolution's are flattened after it
        return inputs[0]

    def forward(self, numbers: Tensor) -> Tensor:
        return self.layer(self.read(numbers)).reshape(len(numbers), *self.row_shape)


class KeptGenerator(Kept):
    """A generator: numbers of images [N] -> (clean [N, M], noise [N, M]).

    What is kept of an image is what the generator's ``seen`` says. Of one without ``seen`` and
    ``from_seen``, and where it is the image itself, it is the image, as bytes if it came as such.
    """

    def __init__(self, generator: nn.Module):
        super().__init__()
        self.generator = generator
        self.split = hasattr(generator, "seen") and hasattr(generator, "from_seen")
        self.dtype = torch.get_default_dtype()  # of images that come as bytes

    def see(self, images: Tensor) -> Tensor:
        unit = self._unit(images)
        seen = self.generator.seen(unit) if self.split else unit
        return images if seen is unit else seen

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        x = self._unit(self.read(numbers))
        return self.generator.from_seen(x) if self.split else self.generator(x)

    def _unit(self, x: Tensor) -> Tensor:
        return x if x.dtype != torch.uint8 else x.to(self.dtype) / 255


class OnFeatures:
    """Trains a model without its bodies.

    trained: what to train, a ``HubPathway`` of the model's own heads, generator and aggregator, or
    the one head of any other model. It takes numbers of images, float64 [N], in place of images,
    once ``keep`` has seen those, and returns what the model returns.

    Args:
        model: a ``HubPathway``, or any other network that ends with its head.
        names: of the experts, for messages.

    Raises:
        ValueError: an expert without a head, or with several; a model with ``FixedRoutes``.
    """

    def __init__(self, model: nn.Module, names: Sequence[str] | None = None):
        self.model, self.routed = model, isinstance(model, HubPathway)
        self.experts = list(model.experts) if self.routed else [model]
        names = names or [f"expert {i} ({type(e).__name__})" for i, e in enumerate(self.experts)]
        self.heads = [KeptHead(e, name) for e, name in zip(self.experts, names, strict=True)]
        if not self.routed:
            [self.trained] = self.heads
            return
        if isinstance(model.generator, FixedRoutes):  # HubPathway asks it itself, for its weights
            raise ValueError(
                "warm_up: expected a router to train, got fixed routes; train without the warm-up"
            )
        self.generator = KeptGenerator(model.generator)
        if model.input_mean is not None:
            self.generator.dtype = model.input_mean.dtype
        self.trained = HubPathway(
            self.heads,
            self.generator,
            model.aggregator,
            model.k,
            min_group=model.min_group,
            executor="sequential",
            renormalize=model.renormalize,
        )

    @torch.no_grad()
    def see(self, images: Tensor) -> list[Tensor]:
        """What is kept of images [N, ...]: each head's [N, ...], and last the router's."""
        if not self.routed:
            return [self.heads[0].see(self.model, images)]
        unit = self.generator._unit(images)
        mean, std = self.model.input_mean, self.model.input_std
        kept = []
        for i, (head, expert) in enumerate(zip(self.heads, self.experts, strict=True)):
            x = unit if mean is None else (unit - mean[i, :, None, None]) / std[i, :, None, None]
            kept.append(head.see(expert, x))
        return [*kept, self.generator.see(images)]

    def keep(
        self,
        batches: Iterable[tuple[Tensor, Tensor]],
        count: int,
        device: torch.device,
        amp: str = "none",
        room: Callable[[int], None] = lambda _: None,
    ) -> Tensor:
        """Looks at all images once, the model in evaluation mode, and keeps what it saw.

        Args:
            batches: (images, targets), in the order of the images' numbers.
            count: n.
            device: of the model. amp: as of the training.
            room: is told how many bytes will be kept, once the first batch was seen.

        Returns:
            All targets [n, ...], on the host.

        Raises:
            ValueError: an expert whose outputs are not its head's; what ``room`` raises.
        """
        parts = [*self.heads, *([self.generator] if self.routed else [])]
        targets, start = [], 0
        with eval_mode(self.model):
            for images, target in batches:
                with autocast(device, amp):
                    seen = self.see(to_device(images, device))
                if start == 0:
                    room(count * sum(s[0].numel() * s.element_size() for s in seen))
                    for part, s in zip(parts, seen, strict=True):
                        part.kept = torch.empty(count, *s.shape[1:], dtype=s.dtype)
                for part, s in zip(parts, seen, strict=True):
                    part.kept[start : start + len(s)] = s
                targets.append(target.cpu())
                start += len(images)
        return torch.cat(targets)


def _same(one: Tensor, two: Tensor) -> bool:
    """Whether they hold the same values in the same order."""
    if not isinstance(two, Tensor) or one.numel() != two.numel():
        return False
    one = one.reshape(two.shape)
    return bool(((one == two) | (one.isnan() & two.isnan())).all())


def _unsplit(name: str, reason: str) -> ValueError:
    return ValueError(
        f"warm_up: expected networks that end with one head, but of {name} {reason}; train without "
        "the warm-up, or take another network"
    )
