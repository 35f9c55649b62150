"""The rows of bench.step: a training step, or a prediction, of each way to run a hub.

All rows start from the same weights, see the same batch, and update by the same kind of optimizer.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast import reference
from hubpath_fast.devices import full_float32
from hubpath_fast.executors.graphs.backend import CudaBackend
from hubpath_fast.executors.graphs.executor import GraphsExecutor
from hubpath_fast.training.optimizer import start_momentum

from .step_models import DenseHubPathway, Given, Preset, Scores, recorded_noise

EXPLORE = 0.5
# Float32 against float64. A forward through some fifty layers loses a few units in 1e6 each; the
# gradient of the aggregator is a product of such outputs. Batch statistics over few rows amplify.
FORWARD_TOLERANCE, GRADIENT_TOLERANCE = 2e-3, 1e-2

CHECKED = 16  # samples, at most a third of a batch: convolutions in float64 are slow

VARIANTS = ("sequential contiguous", "sequential bf16")  # rows of a CPU


@dataclass
class Setting:
    """One preset at one size, on its device: what all rows share."""

    preset: Preset
    device: str
    amp: bool
    x: Tensor
    y: Tensor
    experts: list[nn.Module]
    generator: nn.Module
    noise: tuple[Tensor, ...] = ()  # of steps, in turn; none: each step draws its own

    def noises(self) -> Iterator[Tensor | None]:
        return itertools.cycle(self.noise or (None,))

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.amp)

    def loss(self, prediction: Tensor) -> Tensor:
        """Of one network on the whole batch."""
        if self.preset.task_loss is None:
            return F.cross_entropy(prediction, self.y)
        return self.preset.task_loss(prediction, self.y).mean()

    def criterion(self) -> hp.HubPathwayLoss:
        return hp.HubPathwayLoss(self.preset.task_loss, EXPLORE)

    def reference_loss(self, output: reference.ReferenceOutput, y: Tensor) -> Tensor:
        return reference.losses(output, y, EXPLORE, self.preset.task_loss)[0]

    def forward(self, model: hp.HubPathway, eps: Tensor | None) -> hp.PathwayOutput:
        """In training: where it can, the model computes the experts' loss along with the rest."""
        fused = self.y if self.preset.task_loss is None else None
        return model(self.x, eps, target=fused)


def make(preset: Preset, px: int, device: str, n: int | None = None, recorded: int = 0) -> Setting:
    """recorded: so many routings, the same in every run, are gone through in turn."""
    torch.manual_seed(0)
    experts = preset.experts()
    generator = preset.generator(len(experts), px)
    n = preset.n if n is None else n
    x, y = preset.batch(n, px)
    modules = nn.ModuleList([*experts, generator]).to(device, memory_format=torch.channels_last)
    images = x.is_floating_point() and x.dim() == 4
    x = x.to(device, memory_format=torch.channels_last if images else torch.contiguous_format)
    noise = recorded_noise(n, len(experts), preset.k, recorded)
    noise = tuple(part.to(device) for part in noise)
    half = preset.half and device == "cuda"
    return Setting(preset, device, half, x, y.to(device), experts, modules[-1], noise)


def variants(setting: Setting) -> dict[str, Setting]:
    """On a CPU, the same setting in other layouts and precisions than its rows': by row."""
    if setting.device != "cpu":
        return {}
    plain = copy.deepcopy(nn.ModuleList([*setting.experts, setting.generator]))
    plain = list(plain.to(memory_format=torch.contiguous_format))
    contiguous = dataclasses.replace(
        setting, x=setting.x.contiguous(), experts=plain[:-1], generator=plain[-1]
    )
    return dict(zip(VARIANTS, (contiguous, dataclasses.replace(setting, amp=True)), strict=True))


def hub(setting: Setting, executor: str = "sequential", lanes: int | None = None) -> hp.HubPathway:
    """A Hub-Pathway with its own copies of the experts. lanes: that captured graphs run on."""
    preset = setting.preset
    parts = copy.deepcopy((setting.experts, setting.generator))
    if lanes is not None:
        executor = GraphsExecutor(functools.partial(CudaBackend, num_streams=lanes))
    model = hp.HubPathway(*parts, k=preset.k, num_outputs=preset.outputs, executor=executor)
    return model.to(setting.device)


def hub_of(setting: Setting, name: str) -> hp.HubPathway:
    """The hub of a row: of an executor, or "graphs, 8 lanes"."""
    executor, _, lanes = name.partition(", ")
    return hub(setting, executor, int(lanes.split()[0]) if lanes else None)


def reference_hub(setting: Setting, dense: bool = False) -> nn.Module:
    parts = copy.deepcopy((setting.experts, setting.generator))
    aggregator = hp.LinearAggregator(len(setting.experts), setting.preset.outputs)
    kind = DenseHubPathway if dense else reference.ReferenceHubPathway
    return kind(*parts, aggregator.to(setting.device), k=setting.preset.k)


def optimizer(model: nn.Module) -> torch.optim.Optimizer:
    # The rate is so low that weights stay as they are: time does not depend on it, the checks do.
    return start_momentum(torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True))


def updated(model: nn.Module, forward_backward: Callable[[], None]) -> Callable[[], None]:
    """A whole step: gradients away, forward and backward, update."""
    update = optimizer(model)

    def step() -> None:
        update.zero_grad(set_to_none=True)
        forward_backward()
        update.step()

    return step


def single_step(setting: Setting, index: int) -> Callable[[], None]:
    model = copy.deepcopy(setting.experts[index])

    def forward_backward() -> None:
        with setting.autocast():
            loss = setting.loss(model(setting.x))
        loss.backward()

    return updated(model, forward_backward)


def captured_single_step(setting: Setting, index: int) -> Callable[[], None]:
    """The same with torch's own captured graphs (CUDA)."""

    def autocast() -> torch.autocast:  # casts of weights belong into the graph
        return torch.autocast(setting.device, torch.bfloat16, setting.amp, cache_enabled=False)

    module = copy.deepcopy(setting.experts[index])
    with autocast():
        model = torch.cuda.make_graphed_callables(module, (setting.x.clone(),))

    def forward_backward() -> None:
        with autocast():
            loss = setting.loss(model(setting.x))
        loss.backward()

    return updated(module, forward_backward)


def generator_step(setting: Setting) -> Callable[[], None]:
    model = copy.deepcopy(setting.generator)

    def forward_backward() -> None:
        with setting.autocast():
            clean, noise = model(setting.x)
        (clean.float().sum() + noise.float().sum()).backward()

    return updated(model, forward_backward)


def hub_losses(setting: Setting, model: hp.HubPathway) -> Callable[[], None]:
    criterion, noises = setting.criterion(), setting.noises()

    def forward_backward() -> None:
        with setting.autocast():
            losses = criterion(setting.forward(model, next(noises)), setting.y)
        losses.total.backward()

    return forward_backward


def hub_step(setting: Setting, model: hp.HubPathway) -> Callable[[], None]:
    return updated(model, hub_losses(setting, model))


def capture_ahead(setting: Setting, model: hp.HubPathway) -> None:
    """What training steps will need of captured graphs, before any is timed."""
    with setting.autocast():
        model.train().warm_up(setting.x)


def reference_step(setting: Setting, model: nn.Module) -> Callable[[], None]:
    noises = setting.noises()

    def forward_backward() -> None:
        with setting.autocast():
            total = setting.reference_loss(model(setting.x, next(noises)), setting.y)
        total.backward()

    return updated(model, forward_backward)


def glue_step(setting: Setting) -> Callable[[], None]:
    """A step without experts, generator and optimizer: those give tensors that are there already.

    What is left is routing, the gather of the real images, joining, aggregation, losses, and their
    backward passes.
    """
    (n, m), preset = (len(setting.x), len(setting.experts)), setting.preset
    dtype = torch.bfloat16 if setting.amp else torch.float32
    shape = (n, preset.outputs, *preset.trailing)
    experts = [Given(torch.randn(shape, dtype=dtype)) for _ in range(m)]
    scores = Scores(torch.zeros(n, m), torch.zeros(n, m))
    model = hp.HubPathway(
        experts, scores, k=preset.k, num_outputs=preset.outputs, executor="sequential"
    )
    forward_backward = hub_losses(setting, model.to(setting.device))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        forward_backward()

    return step


def experts_step(setting: Setting, model: hp.HubPathway) -> Callable[[], None]:
    """The experts alone, forward and backward, on group sizes that routing draws each time."""
    model = copy.deepcopy(model).train()
    n, m = len(setting.x), len(setting.experts)
    zeros = torch.zeros(n, m, device=setting.device)

    def step() -> None:
        routing = hp.functional.noisy_topk(zeros, zeros, setting.preset.k, "draw")
        for expert, count in zip(model.experts, routing.counts(), strict=True):
            if count:
                expert.zero_grad(set_to_none=True)
                with setting.autocast():
                    output = expert(setting.x[: min(count, n)])
                output.float().sum().backward()

    return step


def predict(setting: Setting, model: nn.Module, n: int) -> Callable[[], Tensor]:
    model = model.eval()
    repeats = -(-n // len(setting.x))
    layout = torch.channels_last
    if setting.x.dim() != 4 or not setting.x.is_contiguous(memory_format=layout):
        layout = torch.contiguous_format
    x = torch.cat([setting.x] * repeats)[:n].contiguous(memory_format=layout)

    def call() -> Tensor:
        with torch.inference_mode(), setting.autocast():
            return model(x)

    return call


def replays_differ(setting: Setting, model: hp.HubPathway) -> str | None:
    """Why a step as the model runs it by now, captured, is not the eager one; None: it is right.

    Both against float32: in the precision of the rows, the model may be twice as far from it as
    the eager step is, and a thousandth.
    """
    eager = hub(setting)
    eager.load_state_dict(model.state_dict())
    plain = dataclasses.replace(setting, amp=False)
    with full_float32():
        right = _results(plain, eager)
    usual, found = _results(setting, eager), _results(setting, model)
    for name, wanted, a, b in zip(("prediction", "gradients"), right, usual, found, strict=True):
        allowed = 2 * ((a - wanted).norm() / wanted.norm()).item() + 1e-3
        error = ((b - wanted).norm() / wanted.norm()).item()
        if not error <= allowed:
            return f"replays: {name}: relative error {error:.1e} above {allowed:.0e}"
    return None


def _results(setting: Setting, model: hp.HubPathway) -> tuple[Tensor, Tensor]:
    """Of one training step: the prediction, and all experts' gradients."""
    model.train().zero_grad(set_to_none=True)
    with setting.autocast():
        out = setting.forward(model, next(setting.noises()))
        loss = setting.criterion()(out, setting.y).total
    loss.backward()
    gradients = [p.grad.flatten() for p in model.experts.parameters() if p.grad is not None]
    return out.prediction.detach().float(), torch.cat(gradients).float()


def check(setting: Setting, model: hp.HubPathway, compiled: bool = False) -> str | None:
    """Why a copy's training step is wrong, against the reference in float64; None: it is right.

    compiled: the copy's experts are compiled first.
    """
    with full_float32():
        return _difference(setting, model, compiled)


def _difference(setting: Setting, model: hp.HubPathway, compiled: bool) -> str | None:
    model = copy.deepcopy(model).train()
    if compiled:
        model.compile_experts()
    truth = reference_hub(setting).double().train()
    n = max(1, min(CHECKED, len(setting.x) // 3))
    x, y = setting.x[:n], setting.y[:n]
    eps = torch.randn(len(x), len(setting.experts), device=setting.device)
    criterion, wide = setting.criterion(), x.double() if x.is_floating_point() else x
    dropouts = [m for part in (model, truth) for m in part.modules()]
    for module in dropouts:  # two draws of dropout have nothing in common
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    out, expected = model(x, eps), truth(wide, eps.double())
    criterion(out, y).total.backward()
    setting.reference_loss(expected, y).backward()
    if out.routing.counts() != expected.routing.counts():
        return "other experts are chosen"
    pairs = {
        "prediction": (out.prediction, expected.prediction, FORWARD_TOLERANCE),
        "expert outputs": (out.expert_outputs, expected.expert_outputs, FORWARD_TOLERANCE),
        "aggregator's gradient": (
            model.aggregator.weight.grad, truth.aggregator.weight.grad, GRADIENT_TOLERANCE,
        ),
        "generator's gradient": (
            model.generator.clean.weight.grad, truth.generator.clean.weight.grad,
            GRADIENT_TOLERANCE,
        ),
    }  # fmt: skip
    for name, (found, wanted, tolerance) in pairs.items():
        error = ((found.double() - wanted).norm() / wanted.norm()).item()
        if not error <= tolerance:
            return f"{name}: relative error {error:.1e} above {tolerance:.0e}"
    return None
