"""Checks of experts with BatchNorm as captured graphs, whose groups are padded to a few sizes.

Step by step on the same weights, with groups that change, beside the same hub with its experts one
after another, and the reference in float64: outputs, gradients and BatchNorm's buffers may be no
further from the reference than a few times what the plain executor is. As in ``check_executors``,
each check is a function of a device and of how hubs are made.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast import reference
from hubpath_fast.executors.graphs.capacities import OFTEN
from hubpath_fast.hub.dense import DenseNetwork
from hubpath_fast.tasks.landmarks import map_loss
from hubpath_fast.tasks.landmarks.head import attach_heatmap_head

from .check_executors import C, M, MakeHub, make_hub
from .children import Write
from .operations import relative_error
from .verdicts import write_error, write_verdict

N, K, PX = 24, 1, 64  # 64 pixels: the last maps are 2 x 2
# Rows of each expert, step by step. In the middle the first one gets the whole batch: that is above
# what was captured ahead, runs eagerly, is captured when it has come often or the mean has moved,
# and is replayed at the latest when it comes for the last time. An expert with one row, or none, is
# not replayed.
WHOLE, TIMES = 3, int(OFTEN) + 2
COUNTS = (
    (6, 6, 6, 6), (7, 5, 4, 8), (4, 6, 9, 5),
    *[(N, 0, 0, 0)] * TIMES,
    (10, 2, 1, 11), (6, 7, 5, 6), (3, 9, 7, 5),
)  # fmt: skip
PREDICTIONS_AFTER = (WHOLE - 1, len(COUNTS) - 1)  # steps
# Other algorithms, and a fused layer that rounds less often, differ from float64 by as much as the
# plain executor does, or by a few roundings of the precision. In gradients ReLUs that are next to
# zero let an element through here and not there; a row that was lost is off by a fifth.
FACTOR, FLOOR, FLIPS = 2, {"float32": 2e-5, "bf16": 1e-2}, 2e-2
LEARNING_RATE = 1e-2


def timm_resnet(**options: float) -> nn.Module:
    """Bottlenecks, whose sum is followed by an activation."""
    from timm.models.resnet import Bottleneck, ResNet

    return ResNet(Bottleneck, [1] * 4, num_classes=C, channels=(8, 16, 24, 32), **options)


def torchvision_resnet() -> nn.Module:
    """The half of a ResNet-18 of fewer channels, which its class does not let one choose."""
    from torchvision.models.resnet import BasicBlock, ResNet

    network = ResNet(BasicBlock, [1] * 4)
    network.layer3, network.layer4 = nn.Identity(), nn.Identity()
    network.fc = nn.Linear(128, C)
    return network


def mobilenet(**options: float) -> nn.Module:
    """Squeeze-excitation, Hardswish, BatchNorm that has its activation in one module."""
    import timm

    return timm.create_model("mobilenetv3_small_050", num_classes=C, **options)


def heat_maps() -> nn.Module:
    """Maps [n, C, 8, 8] of its landmarks, from a deconvolution with BatchNorm."""
    return attach_heatmap_head(timm_resnet(), C, width=16)


def heat_map_loss(maps: Tensor, y: Tensor) -> Tensor:
    """[N]: the loss of landmarks, one a map, in places that y [N] says."""
    cells = torch.stack([y, y + 2], dim=1).to(torch.float32)[:, None, :].expand(-1, C, -1)
    return map_loss(maps, F.pad(cells % maps.shape[-1], (0, 1), value=1.0), sigma=1.0)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "timm ResNet": timm_resnet,
    "torchvision ResNet": torchvision_resnet,
    "MobileNetV3": mobilenet,
    "heat maps": heat_maps,
}
DRAWING: dict[str, Callable[[], nn.Module]] = {
    "stochastic depth": lambda: timm_resnet(drop_path_rate=0.5, drop_rate=0.5),
    "dropout": lambda: mobilenet(drop_rate=0.5),
}


def hub_of(
    network: Callable[[], nn.Module], executor: str, device: str, make: MakeHub
) -> hp.HubPathway:
    """A hub of M networks, of the same weights each time; K = 1."""
    torch.manual_seed(0)
    model = make([network() for _ in range(M)], executor, k=K, px=PX).to(device)
    return model.to(memory_format=torch.channels_last)


def reference_of(model: hp.HubPathway) -> reference.ReferenceHubPathway:
    """The same hub by the reference, in float64."""
    parts = copy.deepcopy((list(model.experts), model.generator, model.aggregator))
    return reference.ReferenceHubPathway(*parts, k=K).double()


def batch(counts: tuple[int, ...], seed: int, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """(images, targets, noise) of a step, whose noise gives each expert so many rows."""
    random = torch.Generator().manual_seed(seed)
    x = torch.rand(N, 3, PX, PX, generator=random)
    y = torch.randint(C, (N,), generator=random)
    experts = torch.repeat_interleave(torch.arange(M), torch.tensor(counts))
    experts = experts[torch.randperm(N, generator=random)]
    noise = torch.zeros(N, M).scatter(1, experts[:, None], 9.0)
    return x.to(device, memory_format=torch.channels_last), y.to(device), noise.to(device)


def step(model: nn.Module, given: tuple[Tensor, ...], device: str, bf16: bool) -> dict:
    """A training step without an update: what it gave, by name."""
    x, y, noise = given
    task_loss = heat_map_loss if isinstance(model.experts[0], DenseNetwork) else None
    model.train().zero_grad(set_to_none=True)
    if isinstance(model, hp.HubPathway):
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            out = model(x, noise, target=y if task_loss is None else None)
            loss = hp.HubPathwayLoss(task_loss)(out, y).total
    else:
        out = model(x, noise)
        loss = reference.losses(out, y, task_loss=task_loss)[0]
    loss.backward()
    gradients = [
        torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten()
        for p in model.experts.parameters()
    ]
    return {
        "prediction": out.prediction.detach(),
        "outputs": out.expert_outputs.detach(),
        "gradients": torch.cat(gradients),
        "buffers": torch.cat([b.flatten().double() for b in model.experts.buffers()]),
    }


def predict(model: nn.Module, x: Tensor, device: str, bf16: bool) -> dict:
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        return {"logits": model.eval()(x)}


def agreement(
    write: Write, device: str, make: MakeHub = make_hub,
    networks: dict[str, Callable[[], nn.Module]] | None = None,
) -> None:  # fmt: skip
    """Padded graphs against ``sequential``, in training and between it in predictions."""
    for title, network in (networks or NETWORKS).items():
        for precision in FLOOR:
            text = f"padded {title} {precision}"
            judge = partial(_disagreement, network, precision, device, make)
            write_error(write, text, judge)


def _disagreement(
    network: Callable[[], nn.Module], precision: str, device: str, make: MakeHub
) -> tuple[str | None, float]:
    model, plain = (hub_of(network, name, device, make) for name in ("graphs", "sequential"))
    wide = reference_of(plain)
    bf16, worst = precision == "bf16", 0.0
    changed = list(_changed_by_warm_up(model, device, bf16))
    if changed:
        return f"warm_up: {', '.join(changed)}", worst
    for index, counts in enumerate(COUNTS):
        given = batch(counts, index, device)
        exact = given[0].double(), given[1], given[2].double()
        calls = [("step", step, given, exact)]
        if index in PREDICTIONS_AFTER:
            calls.append(("predict", predict, given[0], exact[0]))
        for what, call, usual, double in calls:
            before = model.executor_report().misses
            found, expected, right = (
                call(model, usual, device, bf16), call(plain, usual, device, bf16),
                call(wide, double, device, False),
            )  # fmt: skip
            for name, truth in right.items():
                error = relative_error(found[name], truth.double())
                bound = FACTOR * relative_error(expected[name], truth.double()) + FLOOR[precision]
                bound += FLIPS * (name == "gradients")
                if not error <= bound:
                    return f"{what} {index}: {name} off by {error:.1e}, above {bound:.1e}", worst
                worst = max(worst, error)
            misses = model.executor_report().misses - before
            if what == "step" and index == WHOLE + TIMES - 1 and misses:
                return f"a group of {N} rows is not replayed when it comes {TIMES} times", worst
        _update([model, plain], wide)
    return _problem(model), worst


def _changed_by_warm_up(model: hp.HubPathway, device: str, bf16: bool) -> Iterator[str]:
    """What is another one after ``warm_up``, which is to change nothing that a step sees."""
    cuda = torch.device(device).type == "cuda"
    draws = torch.cuda.get_rng_state if cuda else torch.get_rng_state
    state = {name: tensor.clone() for name, tensor in model.train().state_dict().items()}
    drawn = draws()
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        report = model.warm_up(batch(COUNTS[0], 0, device)[0])
    for name, tensor in model.state_dict().items():
        if not torch.equal(tensor, state[name]):
            yield f"{name} has changed"
    if not torch.equal(draws(), drawn):
        yield "random numbers were drawn"
    if any(p.grad is not None for p in model.parameters()):
        yield "there are gradients"
    if report.exact or report.eager:
        yield f"experts are not padded: {report.exact | report.eager}"
    elif report.captured.keys() != set(range(M)):
        yield f"only experts {sorted(report.captured)} are captured"


@torch.no_grad()
def _update(models: list[hp.HubPathway], wide: nn.Module) -> None:
    """One step down for all, by the gradients of the reference: replays see new weights."""
    for model in (*models, wide):
        for p, exact in zip(model.experts.parameters(), wide.experts.parameters(), strict=True):
            if exact.grad is not None:
                p.sub_(LEARNING_RATE * exact.grad.to(p.dtype))


def _problem(model: hp.HubPathway) -> str | None:
    """More groups that ran eagerly than those that no graph was there for, in words. No graph is
    there for the whole batch at first, for one row, and for predictions of sizes seen once."""
    report = model.executor_report()
    if report.exact or report.eager:
        return f"experts are not padded: {report.exact | report.eager}"
    groups = sum(count > 1 for counts in COUNTS for count in counts)
    if report.misses > int(OFTEN) + 0.2 * groups:
        return f"{report.misses} groups of {groups} ran eagerly"
    return None


def drawing(
    write: Write, device: str, make: MakeHub = make_hub,
    networks: dict[str, Callable[[], nn.Module]] | None = None,
) -> None:  # fmt: skip
    """Dropout and stochastic depth, whose masks are drawn for all rows, padded ones among them:
    that steps run, by replays, and that all is finite."""
    for title, network in (networks or DRAWING).items():

        def judge(network=network) -> tuple[str | None, dict]:
            return _not_finite(network, device, make), {"text": "finite"}

        write_verdict(write, f"padded {title}", judge)


def _not_finite(network: Callable[[], nn.Module], device: str, make: MakeHub) -> str | None:
    model = hub_of(network, "graphs", device, make).train()
    model.warm_up(batch(COUNTS[0], 0, device)[0])
    for index, counts in enumerate(COUNTS):
        found = step(model, batch(counts, index, device), device, False)
        for name, values in found.items():
            if not values.isfinite().all():
                return f"step {index}: {name} are not all finite"
    return _problem(model)
