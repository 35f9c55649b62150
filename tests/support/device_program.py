"""What is asked of the emulated device, in a process that has it: prints what came out, as JSON.

``python -m bench.emulated -m support.device_program``; tests/emulated/test_device.py judges it.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import hubpath_fast
from bench.emulated.device import counts
from hubpath_fast import functional as HF
from hubpath_fast.executors import ResidentExecutor

from .serving import SIZE, small_hub

CUDA = torch.device("cuda")


def refusals() -> dict[str, str]:
    """What is said of each, empty where it is allowed."""
    x, here = torch.ones(4, 3, device=CUDA), torch.ones(4, 3)
    linear = torch.nn.Linear(3, 5, device=CUDA)
    found = {
        "sum": lambda: x + here,
        "product": lambda: x @ here.T,
        "concatenation": lambda: torch.cat([x, here]),
        "layer": lambda: linear(here),
        "written": lambda: x.add_(here),
        "foreach": lambda: torch._foreach_add([x], [here]),
        "kernel": lambda: HF.noisy_topk(x, here, 1),
        "number": lambda: x + torch.tensor(2.0),
        "index": lambda: x[torch.tensor([1, 2])],
        "numpy": lambda: x.numpy(),
    }
    return {name: _refusal(function) for name, function in found.items()}


def new_memory() -> list[list[float]]:
    types = (torch.float32, torch.bfloat16, torch.int64, torch.uint8)
    return [torch.empty(2, dtype=kind, device=CUDA).cpu().tolist() for kind in types]


def races() -> dict[str, list[str]]:
    """Of programs that wait for what they use, and of ones that do not."""
    side, found = torch.cuda.Stream(), {}
    current = torch.cuda.current_stream()

    def program(name: str, function: Callable[[], object]) -> None:
        torch.cuda.synchronize()
        function()
        found[name] = counts.take_races()
        torch.cuda.synchronize()

    def double(waits: bool, then: bool) -> Tensor:
        x = torch.ones(8, device=CUDA)
        if waits:
            side.wait_stream(current)
        with torch.cuda.stream(side):
            y = x * 2
        x.record_stream(side)
        if then:
            current.wait_stream(side)
        return y + 1

    def halves(overlap: int) -> None:
        x = torch.zeros(8, device=CUDA)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            x[: 4 + overlap].fill_(1)
        x[4:].fill_(2)
        x.record_stream(side)

    def freed(marked: bool) -> None:
        x = torch.ones(8, device=CUDA)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            y = x * 2
        if marked:
            x.record_stream(side)
        del x
        torch.ones(8, device=CUDA)
        current.wait_stream(side)
        del y

    def kernel(waits: bool) -> None:
        with torch.cuda.stream(side):
            clean = torch.randn(4, 3, device=CUDA)
        if waits:
            current.wait_stream(side)
        HF.noisy_topk(clean, clean, 1)
        current.wait_stream(side)

    program("waits", lambda: double(True, True))
    program("does not wait before", lambda: double(False, True))
    program("does not wait after", lambda: double(True, False))
    program("two halves", lambda: halves(0))
    program("halves that overlap", lambda: halves(1))
    program("freed and marked", lambda: freed(True))
    program("freed", lambda: freed(False))
    program("kernel that waits", lambda: kernel(True))
    program("kernel", lambda: kernel(False))
    return found


def late_copies() -> dict[str, list[float]]:
    """Values of the host's memory without and with a wait, and of the device's after the host
    overwrote what is copied."""
    x = torch.arange(3.0, device=CUDA)
    early = x.to("cpu", non_blocking=True)
    found = {"before": early.tolist()}
    torch.cuda.synchronize()
    found["after"] = early.tolist()
    pinned = torch.ones(3).pin_memory()
    there = pinned.to(CUDA, non_blocking=True)
    pinned.fill_(5)
    found["overwritten"] = there.cpu().tolist()
    pageable = torch.ones(3)
    there = pageable.to(CUDA, non_blocking=True)
    pageable.fill_(5)
    found["not pinned"] = there.cpu().tolist()
    torch.cuda.synchronize()
    pinned = torch.ones(3).pin_memory()
    pinned.copy_(x, non_blocking=True)
    there = pinned.to(CUDA, non_blocking=True)
    doubled = there * 2
    found["on its way"] = pinned.tolist()
    found["and back"] = doubled.cpu().tolist()
    return found


def waits() -> dict[str, object]:
    x = torch.ones(3, device=CUDA)
    counts.reset()
    x.sum().item(), x[x > 0], x.cpu(), x.nonzero(), x.to("cpu", non_blocking=True)
    torch.cuda.current_stream().synchronize()
    event = torch.cuda.current_stream().record_event()
    event.synchronize(), torch.cuda.synchronize()
    found: dict[str, object] = {"counted": counts.waits()}
    torch.cuda.set_sync_debug_mode("error")
    found["forbidden"] = _refusal(lambda: x.sum().item())
    found["free"] = _refusal(lambda: ((x * 2).relu_(), event.synchronize()))
    torch.cuda.set_sync_debug_mode("default")
    return found


def captured() -> dict[str, object]:
    """A captured training step with kernels of ours and dropout's noise, against the same eagerly
    run; and what a capture may not do."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(4, 3, device=CUDA)
    x, target = torch.zeros(6, 4, device=CUDA), torch.zeros(6, 3, device=CUDA)
    inputs = [torch.randn(6, 4) for _ in range(3)]

    def step() -> tuple[Tensor, ...]:
        out = linear(torch.dropout(x, 0.5, True))
        weights = HF.noisy_topk(out, torch.zeros_like(out), 2, "draw").weights
        loss = (out - target).square().mean() + weights.sum()
        return (loss, *torch.autograd.grad(loss, tuple(linear.parameters())))

    expected = []
    step()
    torch.cuda.manual_seed(1)
    for batch in inputs:
        x.copy_(batch)
        expected.append([tensor.detach().cpu() for tensor in step()])
    torch.cuda.manual_seed(1)
    state, graph = torch.cuda.get_rng_state(), torch.cuda.CUDAGraph()
    before = x.clone()
    with torch.cuda.graph(graph):
        found = step()
        x.add_(1)
    untouched = torch.equal(torch.cuda.get_rng_state(), state) and torch.equal(before, x)
    meanwhile = [bool(tensor.isnan().all()) for tensor in found]
    errors = []
    for batch, eager in zip(inputs, expected, strict=True):
        x.copy_(batch)
        graph.replay()
        pairs = zip(found, eager, strict=True)
        errors.append(max((ours.cpu() - true).abs().max().item() for ours, true in pairs))
        errors.append((x.cpu() - batch - 1).abs().max().item())
    return {
        "untouched": untouched,
        "computed while capturing": not all(meanwhile),
        "errors": errors,
        "waits": _refusal(lambda: _capture(lambda: x.sum().item())),
        "unjoined": _refusal(lambda: _capture(_fork)),
        "foreign": _refusal(lambda: _capture(_wait_for_uncaptured)),
        "after": _refusal(lambda: x.sum().item()),
    }


def _fork() -> None:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.ones(2, device=CUDA)


def _wait_for_uncaptured() -> None:
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())


def _capture(function: Callable[[], object]) -> None:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin()
        try:
            function()
        finally:
            graph.capture_end()


def inference() -> dict[str, list]:
    """Which tensors are inference tensors, on both devices, and what refuses to change one; the
    weights are changed in place and trained afterwards."""
    return {"cuda": _inference(CUDA), "cpu": _inference(torch.device("cpu"))}


def _inference(device: torch.device) -> list:
    linear, x = torch.nn.Linear(4, 3, device=device), torch.ones(2, 4, device=device)
    with torch.inference_mode():
        y = linear(torch.ones(2, 5, 4, device=device))
        made = [y, y[0], linear.weight.t(), x.view(4, 2), x.add_(1), x * 2]
    made += [y[0], y + 1]
    linear(x).sum().backward()
    refusal = _refusal(lambda: y.add_(1)).split(".")[0]
    return [*(tensor.is_inference() for tensor in made), x._version, refusal]


def attention() -> float:
    """The largest difference of the output and of the gradient from the CPU's."""
    x, found = torch.randn(2, 2, 5, 4), []
    for device in (CUDA, torch.device("cpu")):
        ours = x.to(device).detach().clone().requires_grad_()
        out = torch.nn.functional.scaled_dot_product_attention(ours, ours, ours)
        out.square().sum().backward()
        found.append(torch.stack([out.detach(), ours.grad]).cpu())
    return (found[0] - found[1]).abs().max().item()


def storage() -> list[float]:
    """The middle of a storage, as a tensor with no strides given."""
    x = torch.arange(5.0, device=CUDA)
    return torch.empty(0, device=CUDA).set_(x.untyped_storage(), 1, (3,)).tolist()


def traced() -> dict[str, bool]:
    """Whether a function that names the device says compiled and exported what it says itself."""

    def function(x: Tensor) -> Tensor:
        with torch.cuda.device(torch.cuda.current_device()):
            return torch.relu(x).softmax(dim=1)

    class Branches(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond((x > 0).any(), function, torch.zeros_like, (x,))

    x = torch.randn(4, 3, device=CUDA)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    exported = torch.export.export(Branches(), (x,), strict=False).module()
    return {name: torch.equal(found(x), function(x))
            for name, found in (("compiled", compiled), ("exported", exported))}  # fmt: skip


def packages() -> dict[str, list]:
    """Of hubs with BatchNorm: the form that each became, the most images that it takes, and the
    largest difference that its proof found, in a process of its own."""
    hubs = {"any batch": small_hub(), "parts": small_hub(), "in a room": small_hub()}
    hubs["in a room"].executor = ResidentExecutor(2)
    found = {}
    for name, hub in hubs.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / ("parts" if name == "parts" else "hub.pt2")
            options = {"format": "parts"} if name == "parts" else {}
            package = hubpath_fast.export(
                hub.to(CUDA), path, device="cuda", input_size=SIZE, **options
            )
            program = torch.export.load(path / "router.pt2" if name == "parts" else path)
            [images] = [node for node in program.graph.nodes if node.name == "images"]
            most = program.range_constraints[images.meta["val"].shape[0].node.expr].upper
            found[name] = [package.form, int(most), package.largest_difference]
    return found


def memory() -> list[int]:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    x = torch.ones(1000, device=CUDA)
    y = x * 2
    view = y[10:].view(-1, 10)
    found = [torch.cuda.memory_allocated() - before]
    del x, y
    found.append(torch.cuda.memory_allocated() - before)
    del view
    found.append(torch.cuda.memory_allocated() - before)
    return [*found, torch.cuda.max_memory_allocated() - before]


def training() -> dict[str, object]:
    """Three steps of a small hub by each executor: the largest relative difference from the
    CPU's."""
    torch.manual_seed(0)
    experts = [
        torch.nn.Sequential(
            torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(),
            torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(4, 3),
        )
        for _ in range(3)
    ]  # fmt: skip
    generator = hubpath_fast.PathwayGenerator(3)
    model = hubpath_fast.HubPathway(experts, generator, k=2, executor="sequential", min_group=2)
    x, y = torch.randn(3, 6, 3, 16, 16), torch.randint(3, (3, 6))
    eps = torch.randn(3, 6, 3)
    expected = _trained(model, "sequential", x, y, eps, torch.device("cpu"))
    found = {}
    counts.take_races()
    for executor in ("sequential", "streams", "graphs"):
        ours = _trained(model, executor, x, y, eps, CUDA)
        errors = [
            (a - b).norm() / b.norm().clamp_min(1e-3) for a, b in zip(ours, expected, strict=True)
        ]
        found[executor] = max(error.item() for error in errors)
    return {"errors": found, "races": counts.take_races()}


def _trained(
    model: torch.nn.Module, executor: str, x: Tensor, y: Tensor, eps: Tensor, device: torch.device
) -> list[Tensor]:
    model = copy.deepcopy(model)
    model.executor = executor
    model = model.to(device)
    criterion = hubpath_fast.HubPathwayLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(len(x)):
        target = y[step].to(device)
        out = model(x[step].to(device), eps=eps[step].to(device), target=target)
        loss = criterion(out, target).total
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [value.detach().cpu().double() for value in model.state_dict().values()]


def _refusal(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:
        return str(error)
    return ""


def main() -> None:
    parts = (
        refusals, new_memory, races, late_copies, waits, captured, inference, attention,
        storage, traced, packages, memory, training,
    )  # fmt: skip
    print(json.dumps({part.__name__: part() for part in parts}))


if __name__ == "__main__":
    main()
