"""Checks of the executors on small networks: each a function of a device and of how hubs are made.

On a GPU they compare ``sequential`` with ``streams`` and ``graphs``; the tests run them on a CPU,
with a stand-in for what captures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import hubpath_fast as hp
from hubpath_fast import functional as HF
from hubpath_fast.devices import full_float32

from .children import Write, first_line
from .operations import relative_error
from .step_models import recorded_noise

N, M, K, C, PX = 24, 4, 2, 6, 8
MakeHub = Callable[..., hp.HubPathway]  # (experts, executor, k=K, px=PX) -> a model
# Other algorithms, padded batches and other streams add up in another order: a few roundings of
# float32 (6e-8) or bfloat16 (4e-3) through six layers, one of which divides by a deviation. A row
# or an expert that was lost, or whose weights are stale, is off by a tenth and more.
TOLERANCE = {"float32": 1e-4, "bf16": 5e-2}


def batch_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, C),
    )  # fmt: skip


def layer_norm() -> nn.Module:
    """Treats each row alone: a captured graph may pad its batch."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, C)
    )


NETWORKS = {"BatchNorm": batch_norm, "LayerNorm": layer_norm}


def make_hub(experts: list[nn.Module], executor: str, k: int = K, px: int = PX) -> hp.HubPathway:
    generator = hp.PathwayGenerator(len(experts), width=4, stride=px // PX)
    return hp.HubPathway(experts, generator, k=k, executor=executor)


def hub_of(
    network: Callable[[], nn.Module], executor: str, device: str, make: MakeHub
) -> hp.HubPathway:
    """A hub of M networks, of the same weights each time."""
    torch.manual_seed(0)
    model = make([network() for _ in range(M)], executor).to(device)
    return model.to(memory_format=torch.channels_last)


def batches(device: str, count: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(images, targets, noise) of some steps; two recorded routings in turn."""
    random = torch.Generator().manual_seed(0)
    noises = recorded_noise(N, M, K, 2)
    found = []
    for i in range(count):
        x = torch.rand(N, 3, PX, PX, generator=random)
        x = x.to(device, memory_format=torch.channels_last)
        y = torch.randint(C, (N,), generator=random)
        found.append((x, y.to(device), noises[i % 2].to(device)))
    return found


def step(model: hp.HubPathway, batch, device: str, bf16: bool = False) -> list[Tensor]:
    """A training step without an update: prediction, experts' outputs, all gradients."""
    x, y, noise = batch
    model.train().zero_grad(set_to_none=True)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        out = model(x, noise, target=y)
        loss = hp.HubPathwayLoss()(out, y).total
    loss.backward()
    gradients = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return [out.prediction.detach(), out.expert_outputs.detach(), torch.cat(gradients)]


def predict(model: hp.HubPathway, batch, device: str, bf16: bool = False) -> list[Tensor]:
    with torch.inference_mode(), torch.autocast(device, torch.bfloat16, enabled=bf16):
        return [model.eval()(batch[0])]


RESULTS = {
    "step": (step, ("prediction", "outputs", "gradients")),
    "predict": (predict, ("logits",)),
}


def agreement(
    write: Write, executors: Sequence[str], device: str, make: MakeHub = make_hub, steps: int = 12
) -> None:
    """Executors against ``sequential``, step by step on the same weights, and in predictions."""
    for title, network in NETWORKS.items():
        for precision in ("float32", "bf16"):
            for name in executors:
                text = f"{name} {title} {precision}"
                try:
                    note, error = _disagreement(name, network, precision, device, make, steps)
                except Exception as problem:
                    note, error = first_line(problem), None
                if note is None:
                    write(text, error=error)
                else:
                    write(text, ok=False, note=note)


def _disagreement(
    name: str, network, precision: str, device: str, make: MakeHub, steps: int
) -> tuple[str | None, float]:
    plain, model = (hub_of(network, executor, device, make) for executor in ("sequential", name))
    worst, bf16 = 0.0, precision == "bf16"
    with full_float32():
        for mode, (call, labels) in RESULTS.items():
            for index, batch in enumerate(batches(device, steps)):
                pairs = zip(*(call(m, batch, device, bf16) for m in (model, plain)), strict=True)
                for label, (found, expected) in zip(labels, pairs, strict=True):
                    error = relative_error(found, expected.double())
                    if not error <= TOLERANCE[precision]:
                        return f"{mode} {index}: {label} differ by {error:.1e}", error
                    worst = max(worst, error)
    buffers = zip(model.experts.buffers(), plain.experts.buffers(), strict=True)
    if any(relative_error(*(b.double() for b in pair)) > TOLERANCE[precision] for pair in buffers):
        return "BatchNorm's statistics differ", worst
    return _not_replayed(model, name), worst


def _not_replayed(model: hp.HubPathway, name: str) -> str | None:
    report = model.executor_report()
    if name == "graphs" and report.hits == 0:
        return f"no graph was replayed: {report.eager or 'nothing was captured'}"
    return None


def dropped_ones() -> nn.Module:
    """Gives ones, half of them dropped: 0 or 2."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * PX * PX, 256), nn.Dropout(0.5))
    nn.init.zeros_(network[1].weight)
    nn.init.ones_(network[1].bias)
    return network


def dropout(
    write: Write, executors: Sequence[str], device: str, make: MakeHub = make_hub, steps: int = 12
) -> None:
    """Half is dropped, drawn again in each step, and in backward what was dropped in forward."""
    for name in executors:
        model, before, problem = hub_of(dropped_ones, name, device, make), None, None
        for index, (x, _, noise) in enumerate(batches(device, steps)):
            model.train().zero_grad(set_to_none=True)
            out = model(x, noise)
            out.expert_outputs.sum().backward()
            outputs = out.expert_outputs.detach()
            share = (outputs == 0).float().mean().item()
            sums = [part.sum(dim=0) for part in outputs.split(out.routing.counts())]
            biases = [expert[1].bias.grad for expert in model.experts]
            facts = {
                "outputs are 0 or 2": bool(((outputs == 0) | (outputs == 2)).all()),
                # 12,288 of them: five standard deviations of a fair coin
                f"half is dropped, not {share:.3f}": abs(share - 0.5) < 2.5 / 12288**0.5,
                "other ones than before": before is None or not torch.equal(outputs, before),
                "backward drops what forward does": all(map(torch.equal, sums, biases)),
            }
            wrong = [fact for fact, holds in facts.items() if not holds]
            if wrong and problem is None:
                problem = f"step {index}, not so: " + "; ".join(wrong)
            before = outputs
        problem = problem or _not_replayed(model, name)
        if problem is None:
            write(f"{name} dropout", text="drawn again")
        else:
            write(f"{name} dropout", ok=False, note=problem)


class Breaks(nn.Module):
    """Row-wise network that does what no capture allows, always or only while one is under way."""

    def __init__(self, read: Callable[[Tensor], object], when: Callable[[], bool]):
        super().__init__()
        self.body, self.read, self.when = layer_norm(), read, when

    def forward(self, x: Tensor) -> Tensor:
        if self.when():
            self.read(x)
        return self.body(x)


def read_on_host(x: Tensor) -> float:
    return x.sum().item()


def capture_failures(
    write: Write, device: str, make: MakeHub = make_hub, steps: int = 20,
    read: Callable[[Tensor], object] = read_on_host,
    capturing: Callable[[], bool] = torch.cuda.is_current_stream_capturing,
) -> None:  # fmt: skip
    """After captures that failed: training goes on, draws draw, memory comes back, others capture.

    read: what a capture cannot have; capturing: whether one is under way. steps: a second capture
    is tried after six more groups of one size.
    """

    _tell(write, "after a failed capture", lambda: _goes_on(device, make, steps, read, capturing))
    _tell(write, "draws", lambda: _draws(device))
    if torch.device(device).type == "cuda":
        _tell(write, "memory", lambda: {"blocks that streams used come back": _blocks_return()})

    def captured() -> dict[str, bool]:
        note, error = _disagreement("graphs", batch_norm, "float32", device, make, steps)
        return {f"right to {error:.0e} ({note})": note is None}

    _tell(write, "a good capture", captured)


def _tell(write: Write, text: str, facts: Callable[[], dict[str, bool]]) -> None:
    """A line: ok where all facts hold. What raises is a line, too."""
    try:
        wrong = [fact for fact, holds in facts().items() if not holds]
    except Exception as error:
        write(text, ok=False, note=first_line(error))
        return
    if wrong:
        write(text, ok=False, note="not so: " + "; ".join(wrong))
    else:
        write(text, text="")


def _goes_on(
    device: str, make: MakeHub, steps: int, read: Callable, capturing: Callable[[], bool]
) -> dict[str, bool]:
    """Trains a hub two of whose experts break their captures."""

    def breaking() -> list[nn.Module]:
        torch.manual_seed(0)
        return [layer_norm(), Breaks(read, capturing), Breaks(read, lambda: True), layer_norm()]

    models = [make(breaking(), name).to(device) for name in ("graphs", "sequential")]
    models[1].load_state_dict(models[0].state_dict())
    worst, noted = 0.0, {1: [], 2: []}
    with full_float32():
        for batch in batches(device, steps):
            pairs = zip(*(step(model, batch, device) for model in models), strict=True)
            worst = max(worst, *(relative_error(found, right.double()) for found, right in pairs))
            notes = models[0].executor_report().notes
            for index, counts in noted.items():
                counts.append(sum(f"experts[{index}]: a capture failed" in n for n in notes))
    report = models[0].executor_report()
    return {
        f"training goes on, right to {worst:.0e}": worst <= TOLERANCE["float32"],
        "the other experts are captured": {0, 3} <= report.captured.keys() and report.hits > 0,
        "what reads the host is not captured": not {1, 2} & report.captured.keys(),
        # After the first failure, until the second.
        "a note names the failed capture, once": all(max(c) == 1 for c in noted.values()),
        "no note does after the second": not any(c[-1] for c in noted.values()),
        "what failed twice is eager": all(
            report.eager.get(i, "").startswith("cannot be captured") for i in noted
        ),
    }


def _draws(device: str) -> dict[str, bool]:
    first, second = (torch.rand(1000, device=device) for _ in range(2))
    scores = torch.zeros(N, M, device=device)
    routings = [HF.noisy_topk(scores, scores, K, "draw") for _ in range(2)]
    return {
        "torch draws again": not torch.equal(first, second),
        "routing draws again": not torch.equal(*(r.weights for r in routings)),
    }


def _blocks_return() -> bool:
    """Whether memory that another stream was told to use is free again once that is done."""

    def active() -> int:
        torch.empty(1, device="cuda")  # the allocator looks at what has ended when it is asked
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    stream, before = torch.cuda.Stream(), active()
    for _ in range(20):
        block = torch.empty(16 << 20, dtype=torch.uint8, device="cuda")
        block.record_stream(stream)
        del block
        torch.cuda.synchronize()
    return active() <= before
