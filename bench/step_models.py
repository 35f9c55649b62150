"""What bench.step times: the experts of each preset, and a hub that runs them all on all samples.

Weights are random: time does not depend on them, and nothing is downloaded. At its start the
generator's scores are all equal, so that the noise alone routes: groups are balanced on average and
differ at every step, as in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast.reference import ReferenceHubPathway, ReferenceOutput, noisy_topk
from hubpath_fast.tasks.atari.distribution import categorical_loss
from hubpath_fast.tasks.atari.hub import StateGenerator
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.patches import FramePatches

TINY = ("test_resnet", "test_efficientnet", "test_byobnet", "test_resnet", "test_nfnet")
HETEROGENEOUS = (
    "mobilenetv3_large_100", "efficientnet_b3", "swin_tiny_patch4_window7_224", "convnext_tiny",
    "resnet50",
)  # fmt: skip


@dataclass(frozen=True)
class Preset:
    """A setting. sizes: pixels a side, the first is the one of the summary. stride: pixels a side
    that the generator's pooling makes one, by size; width: of the generator.

    outputs: C of an expert's [n, C, *trailing]. half: whether steps on a GPU are in bfloat16.
    """

    experts: Callable[[], list[nn.Module]]
    n: int
    k: int
    outputs: int
    sizes: tuple[int, ...]
    stride: dict[int, int]
    width: int = 16
    trailing: tuple[int, ...] = ()
    half: bool = True

    def batch(self, n: int, px: int) -> tuple[Tensor, Tensor]:
        """Samples and their targets, from torch's generator."""
        return torch.rand(n, 3, px, px), torch.randint(self.outputs, (n,))

    def generator(self, num_experts: int, px: int) -> nn.Module:
        return hp.PathwayGenerator(num_experts, 3, self.width, self.stride[px])

    # (prediction [n, C, ...], y [n, ...]) -> [n]; None: cross-entropy
    task_loss: Callable[[Tensor, Tensor], Tensor] | None = None


def timm_experts(names, outputs: int) -> list[nn.Module]:
    import timm

    return [timm.create_model(name, num_classes=outputs) for name in names]


HISTORY = 4  # frames of a state


class AtariPreset(Preset):
    """Networks of Data-Efficient Rainbow and the hub of them, on what ``HubPolicy`` gives them:
    the numbers [n, cells, H*p*p], 0 to 255, that it makes of stored states once for all. A target
    is the action that was taken, then the distribution [Z] of its return: one tensor [n, 1 + Z]."""

    def batch(self, n: int, px: int) -> tuple[Tensor, Tensor]:
        cells, pixels = FramePatches((px, px)).shape
        states = torch.randint(256, (n, cells, HISTORY * pixels)).float()
        distribution = torch.rand(n, *self.trailing).softmax(dim=1)
        return states, torch.cat([torch.randint(self.outputs, (n, 1)), distribution], dim=1)

    def generator(self, num_experts: int, px: int) -> nn.Module:
        return StateGenerator(num_experts, HISTORY, FramePatches((px, px)))


def atari_loss(logits: Tensor, y: Tensor) -> Tensor:
    return categorical_loss(logits, y[:, 0].long(), y[:, 1:])


PRESETS = {
    # Beside experts of 10 ms a width of 16, the default, is more than a tenth of a step at 32 px.
    "tiny": Preset(lambda: timm_experts(TINY, 10), 48, 2, 10, (96, 32), {96: 8, 32: 4}, 8),
    "homogeneous": Preset(
        lambda: timm_experts(("resnet50",) * 5, 100), 48, 2, 100, (224,), {224: 8}
    ),
    "heterogeneous": Preset(lambda: timm_experts(HETEROGENEOUS, 100), 48, 2, 100, (224,), {224: 8}),
    "atari": AtariPreset(
        lambda: [RainbowNetwork(18) for _ in range(2)],
        32,
        2,
        18,
        (84,),
        {},
        trailing=(51,),
        half=False,
        task_loss=atari_loss,
    ),
}


class DenseHubPathway(ReferenceHubPathway):
    """All M experts on all N samples, then masked: what one writes without routing.

    BatchNorm sees all samples here and an expert's own rows elsewhere, so in training the results
    differ by design from the reference's; in evaluation they are the same.
    """

    def forward(self, x: Tensor, eps: Tensor | None = None):
        clean, noise = self.generator(x)
        if eps is None and self.training:
            eps = torch.randn_like(clean)
        routing = noisy_topk(clean, noise, self.k, eps, self.renormalize)
        outputs = torch.stack([expert(x) for expert in self.experts], dim=1)  # [N, M, C, ...]
        dense = torch.zeros_like(clean).scatter(1, routing.experts, routing.weights.to(clean.dtype))
        ones = [1] * (outputs.dim() - 2)
        weighted = outputs * dense.to(outputs.dtype).view(*dense.shape, *ones)
        prediction = self.aggregator(weighted.flatten(1, 2))
        if not self.training:
            return prediction
        index = routing.experts.view(*routing.experts.shape, *ones)
        slots = outputs.gather(1, index.expand(-1, -1, *outputs.shape[2:]))
        rows = slots.flatten(0, 1).index_select(0, routing.rows.long())
        return ReferenceOutput(prediction, rows, routing)


def recorded_noise(n: int, m: int, k: int, count: int, seed: int = 0) -> list[Tensor]:
    """Noise [N, M] for some steps, the same in every run: at equal scores it alone routes.

    A sample whose K-th and next largest are close is drawn again, so that rounding, or weights that
    moved a little, give no expert another number of rows.
    """
    random = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        noise = torch.randn(n, m, generator=random)
        while k < m:
            largest = noise.topk(k + 1, dim=1).values
            close = largest[:, k - 1] - largest[:, k] < 0.05
            if not close.any():
                break
            noise[close] = torch.randn(n, m, generator=random)[close]
        found.append(noise)
    return found


class Given(nn.Module):
    """An expert of no cost: gives the first rows of outputs [N, C, ...] that require a gradient.

    They are a new leaf each time: neither is the gradient of a slice filled up to all rows, nor are
    gradients added up over steps, which no expert's step has.
    """

    def __init__(self, outputs: Tensor):
        super().__init__()
        self.outputs = nn.Parameter(outputs, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.outputs[: len(x)].detach().requires_grad_()


class Scores(nn.Module):
    """A generator of no cost: given scores, clean and noise [N, M]."""

    def __init__(self, clean: Tensor, noise: Tensor):
        super().__init__()
        self.clean, self.noise = nn.Parameter(clean), nn.Parameter(noise)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.clean, self.noise


def balanced_scores(n: int, m: int, k: int) -> Scores:
    """Sample s goes to experts s*k, s*k + 1, ... (modulo M); no noise to speak of."""
    chosen = (torch.arange(n)[:, None] * k + torch.arange(k)) % m
    clean = torch.zeros(n, m).scatter(1, chosen, 5.0)
    return Scores(clean, torch.full((n, m), -30.0))
