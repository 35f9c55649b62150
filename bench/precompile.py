"""Compiles the kernels that checks and measurements will launch, on all cores, without a GPU.

    python -m bench.precompile [--arch 90] [--cache DIR] [--workers N]

Kernels lie afterwards in Triton's cache folder (``TRITON_CACHE_DIR``, or --cache), where any
process of the same Triton and Python finds them, also on another machine that the folder was
copied to. Operations are called on CPU tensors, forward and backward, with Triton's launch replaced
by its compilation: a kernel is compiled for exactly the arguments that a GPU would be given, and
nothing is computed. Triton before 3.7 also compiles a launcher in C for every signature, which
needs the CUDA driver's library: those are made where it is.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from hubpath_fast import HubPathwayLoss, PathwayOutput, Routing
from hubpath_fast import functional as HF
from hubpath_fast.executors.graphs.masked import masked, settled
from hubpath_fast.model import losses
from hubpath_fast.shelf.executor import GroupedHeads
from hubpath_fast.shelf.placing import place

from . import (
    check_executors,
    check_operations,
    check_padding,
    check_shelf,
    glue,
    operations,
    ops,
    step_rows,
    timing,
)
from .check_kernels import cases_of
from .children import die_with, first_line
from .inputs import Inputs, Size
from .no_device import NoDevice, cpu_tensors_go_to_kernels, driven_by
from .step_models import PRESETS, Preset

Job = tuple[str, Callable[[], object]]


def jobs() -> list[Job]:
    """(what it is, a call that launches its kernels) for all that both parts need."""
    found: dict[str, Callable[[], object]] = {}

    def add(kind: str, size: Size) -> None:
        def call() -> None:
            operations.found(check_operations.make(kind, size, "cpu", seed=None), "triton")

        found[f"{kind} {size}"] = call

    for _, kind, size in cases_of(check_operations.CASES, check_operations.CASES):
        add(kind, size)
    for name, sizes in ops.ROOF.items():
        for size in sizes:
            add(name, size)
    for size in glue.SIZES:
        found[f"glue {size}"] = functools.partial(_glue, size)
        found[f"glue inputs {size}"] = lambda size=size: _vectors(size)
    for pair in itertools.product((torch.float32, torch.bfloat16), repeat=2):
        found["images {} to {}".format(*pair)] = lambda pair=pair: _step_images(*pair)
    checks = check_executors
    drawn = check_operations.CASES["route"][1]
    for size in (*drawn, Size(checks.N, checks.M, checks.K, checks.C)):
        found[f"draw {size}"] = functools.partial(_draw, size)
    half, full = torch.bfloat16, torch.float32
    for title, (preset, px) in STEPS.items():
        # As rows run it, as replays are compared, and as a hub is checked before it is timed.
        usual = half if preset.half else full
        for n, dtype in {(preset.n, usual), (preset.n, full), (preset.n // 3, full)}:
            found[f"{title} N={n} {dtype}"] = functools.partial(_step, preset, px, n, dtype)
    networks = checks.NETWORKS | {"dropout": checks.dropped_ones}
    padded = {title: (network, checks.PX) for title, network in checks.NETWORKS.items()}
    if importlib.util.find_spec("timm") is not None:
        own = check_padding.NETWORKS | check_padding.DRAWING
        padded |= {title: (network, check_padding.PX) for title, network in own.items()}
        found["padded ResNet-50"] = functools.partial(_padded, _resnet50, 64, half)
    for dtype in (half, full):
        for title, network in networks.items():
            found[f"executors {title} {dtype}"] = functools.partial(_small_hub, network, dtype)
        found[f"padded hub {dtype}"] = functools.partial(_padded_hub, dtype)
        for title, (network, px) in padded.items():
            found[f"padded {title} {dtype}"] = functools.partial(_padded, network, px, dtype)
    for title, shelf in check_shelf.SHELVES.items():
        add("noisy_topk", Size(shelf.n, shelf.experts, shelf.k, 1))
        for free in (ROOM, 0):
            found[f"shelf {title}, {free}"] = functools.partial(_shelf, shelf, free)
    return list(found.items())


def _stand_ins() -> list[nn.Module]:
    """Instead of ResNets, of which the glue sees the images and the outputs."""
    pooled = 3 * 7 * 7
    return [nn.Sequential(nn.AvgPool2d(32), nn.Flatten(), nn.Linear(pooled, 100)) for _ in range(5)]


STEPS = {
    "the paper's step": (dataclasses.replace(PRESETS["homogeneous"], experts=_stand_ins), 224),
    "the step of Atari": (PRESETS["atari"], 84),
}


def _step(preset: Preset, px: int, n: int, dtype: torch.dtype) -> None:
    """The glue's step and the whole one; then the losses by themselves, as where it is checked."""
    setting = step_rows.make(preset, px, "cpu", n, recorded=1)
    setting.amp = dtype == torch.bfloat16
    model = step_rows.hub(setting)
    step_rows.glue_step(setting)()
    step = step_rows.hub_losses(setting, model)
    for _ in range(2):  # rows take the dtype that the experts were seen to use
        step()
    with setting.autocast():  # as ahead of captures, which draw their noise
        model(setting.x)
    with setting.autocast():
        loss = setting.criterion()(model(setting.x, setting.noise[0]), setting.y)
    loss.total.backward()
    _static_buffers(setting.x, len(setting.experts), preset.k, dtype)


def _small_hub(network: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    """What ``check_executors`` compares: trained, and asked for predictions."""
    checks, half = check_executors, dtype == torch.bfloat16
    model = checks.hub_of(network, "sequential", "cpu", checks.make_hub)
    batch = checks.batches("cpu", 1)[0]
    for _ in range(2):
        checks.predict(model, batch, "cpu", half)
        if network is checks.dropped_ones:
            model.train()(batch[0], batch[2]).expert_outputs.sum().backward()
        else:
            checks.step(model, batch, "cpu", half)
    _static_buffers(batch[0], checks.M, checks.K, dtype)


def _resnet50() -> nn.Module:
    """The expert of the paper's step. Its layers' kernels are the same for all sizes of images."""
    import timm

    return timm.create_model("resnet50", num_classes=100)


def _padded(network: Callable[[], nn.Module], px: int, dtype: torch.dtype) -> None:
    """What captured graphs of an expert are made of, forward and backward."""
    module = network().to(memory_format=torch.channels_last)
    rows = torch.rand(4, 3, px, px).contiguous(memory_format=torch.channels_last)
    count = torch.tensor(3, dtype=torch.int32)
    half = dtype == torch.bfloat16
    with masked(module, count), torch.autocast("cpu", torch.bfloat16, half, cache_enabled=False):
        settled(module(rows)).float().sum().backward()


def _padded_hub(dtype: torch.dtype) -> None:
    """What ``check_padding`` launches besides its experts: training, prediction, captures ahead."""
    checks, half = check_padding, dtype == torch.bfloat16

    def network() -> nn.Module:
        # A convolution first, as theirs: rows are gathered to what it takes.
        maps = nn.Conv2d(3, 8, 3, 4), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1)
        return nn.Sequential(*maps, nn.Flatten(), nn.Linear(8, checks.C))

    model = checks.hub_of(network, "sequential", "cpu", check_executors.make_hub)
    batch = checks.batch(checks.COUNTS[0], 0, "cpu")
    for _ in range(2):
        checks.predict(model, batch[0], "cpu", half)
        checks.step(model, batch, "cpu", half)
    with torch.autocast("cpu", torch.bfloat16, half):
        model(batch[0])
    _static_buffers(batch[0], checks.M, checks.K, dtype)


def _draw(size: Size) -> None:
    """A routing that draws its noise, of whose mean no gradient is taken."""
    clean, noise, _ = Inputs(size, "cpu", None).scores()
    leaves = [clean.requires_grad_(), noise.requires_grad_()]
    weights = HF.noisy_topk(*leaves, size.k, "draw", backend="triton").weights
    torch.autograd.grad(weights, leaves, torch.empty_like(weights))


def _glue(size: tuple[int, int, int, int]) -> None:
    """The step that is measured, from the router to the gradients."""
    glue.step(glue.make(*size, "cpu"), "triton")()


def _vectors(size: tuple[int, int, int, int]) -> None:
    """What the glue gathers, and the routing of a step, which draws its noise."""
    inputs = Inputs(Size(*size), "cpu", None)
    clean, noise, _ = inputs.scores()
    leaves = [clean.requires_grad_(), noise.requires_grad_()]
    for eps in ("draw", None):
        found = HF.noisy_topk(*leaves, size[2], eps, backend="triton")
        upstream = [torch.empty_like(t) for t in (found.weights, found.mean)]
        results = [found.weights, found.mean]
        torch.autograd.grad(results, leaves, upstream, allow_unused=True)
    HF.gather(inputs.normal(size[0], glue.FEATURES), inputs.routing(), backend="triton")


ROOM = 2**40  # bytes, for features to lie on the device


def _shelf(shelf: check_shelf.Shelf, free: int) -> None:
    """A step of a shelf's heads, with the optimizer's updates and with the executor's."""
    n, m, k, c = shelf.n, shelf.experts, shelf.k, shelf.classes
    routing = Inputs(Size(n, m, k, c), "cpu").routing()
    numbers, targets, _ = check_shelf.batch(shelf, 0)
    for own in (False, True):
        model = check_shelf.hub_of(shelf)
        model.executor = GroupedHeads("triton")
        place(model, "cpu", free)
        optimizer = check_shelf.optimizer_of(model)
        with check_shelf.updating(model, optimizer, own):
            outputs = model.train()._outputs(numbers, routing)
            out = PathwayOutput(model._aggregate(outputs, routing), outputs, routing)
            HubPathwayLoss()(out, targets).total.backward()
            optimizer.step()


def _step_images(source: torch.dtype, target: torch.dtype) -> None:
    """The images of the paper's step, to rows and into static input buffers."""
    n, m, k = 48, 5, 2
    routing = Inputs(Size(n, m, k, 100), "cpu", None).routing()
    last = torch.channels_last
    x = torch.empty((n, 3, 224, 224), dtype=source).contiguous(memory_format=last)
    HF.gather(x, routing, dtype=target, memory_format=last, backend="triton")
    _static_buffers(x, m, k, target)


def _static_buffers(x: torch.Tensor, m: int, k: int, dtype: torch.dtype) -> None:
    """The static input buffers that captured graphs read. dtype: of rows of images."""
    n, dtype = len(x), dtype if x.is_floating_point() else x.dtype
    routing = Inputs(Size(n, m, k, 1), "cpu", None).routing()
    out = torch.empty((m * n, *x.shape[1:]), dtype=dtype)
    out = out.contiguous(memory_format=HF.own_memory_format(x))
    HF.gather_into(out, x, routing, backend="triton")


@contextlib.contextmanager
def cpu_tensors_are_taken() -> Iterator[None]:
    """Within, public operations take CPU tensors to the kernels, of which nothing may be run."""
    counts, of_samples = Routing.counts, losses.of_samples

    def shares(routing: Routing) -> list[int]:
        """Nothing was routed: every expert is given its share of the rows."""
        n, k = routing.experts.shape
        return [len(part) for part in torch.arange(n * k).tensor_split(routing.num_experts)]

    Routing.counts = shares
    losses.of_samples = lambda y, rows: y[:1].expand(len(rows), *y.shape[1:])  # nor are rows known
    try:
        with cpu_tensors_go_to_kernels():
            yield
    finally:
        Routing.counts, losses.of_samples = counts, of_samples


@contextlib.contextmanager
def launches_go_to(take: Callable[..., object]) -> Iterator[None]:
    """Within, public operations take CPU tensors to the kernels, and a launch calls ``take(kernel,
    *arguments, grid=..., **options)`` instead: nothing is run, so nothing is computed."""
    from hubpath_fast.kernels._tiles import expert_of

    kind = type(expert_of)  # of all kernels: compiled or interpreted
    run = kind.run

    def instead(self, *arguments, grid, warmup, **options):
        return take(self, *arguments, grid=grid, **options)

    kind.run = instead
    try:
        with cpu_tensors_are_taken():
            yield
    finally:
        kind.run = run


@contextlib.contextmanager
def launches_compile(arch: int) -> Iterator[list[str]]:
    """Within, a launch compiles its kernel and does not run it: the names of those launched.

    Raises RuntimeError where the kernels are interpreted.
    """
    timing.refuse_interpreter()
    from triton.runtime.jit import JITFunction

    run, names, met = JITFunction.run, [], []

    def compile_only(kernel, *arguments, **options):
        compiled = run(kernel, *arguments, warmup=True, **options)
        if compiled not in met:
            met.append(compiled)
            _compile_launcher(compiled)
        names.append(kernel.fn.__name__)
        return compiled

    with driven_by(NoDevice(arch)), launches_go_to(compile_only):
        yield names


def _compile_launcher(kernel) -> None:
    """The kernel's launcher in C, where this Triton has one and the driver's library is there."""
    with contextlib.suppress(Exception):  # then whoever launches first compiles it
        from triton.backends.nvidia.driver import CudaLauncher

        CudaLauncher(kernel.src, kernel.metadata)


def compile_jobs(chosen: list[Job], arch: int) -> list[str]:
    """Runs jobs in this process: what went wrong."""
    problems = []
    torch.set_num_threads(1)
    with launches_compile(arch):
        for text, call in chosen:
            try:
                call()
            except Exception as error:
                problems.append(f"{text}: {first_line(error)}")
                print(problems[-1], flush=True)
    return problems


def compile_all(arch: int, workers: int) -> int:
    """All jobs, by forked processes: how many of these met a problem (which they print)."""
    all_jobs, pids, parent = jobs(), [], os.getpid()
    workers = min(workers, len(all_jobs))
    for index in range(workers):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                die_with(parent)
                status = 1 if compile_jobs(all_jobs[index::workers], arch) else 0
            finally:
                sys.stdout.flush()
                os._exit(status)
        pids.append(pid)
    return sum(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0 for pid in pids)


def cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores that this process may keep busy, at most 32: of the host's, as far as a container's
    quota goes."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no such file, or no limit: "max"
        microseconds, period = map(int, quota.read_text().split())
        found = min(found, microseconds // period)
    return max(1, min(found, 32))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench.precompile", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, default=90, help="80, 90, 100; default 90")
    parser.add_argument("--cache", type=Path, help="Triton's cache folder; default its own")
    parser.add_argument("--workers", type=int, default=cores(), help="processes; default: cores")
    args = parser.parse_args(argv)
    if args.cache is not None:
        os.environ["TRITON_CACHE_DIR"] = str(args.cache.resolve())
    start = time.monotonic()
    failed = compile_all(args.arch, args.workers)
    seconds = time.monotonic() - start
    # Each worker has said what went wrong.
    problems = f"{failed} workers met problems"
    print(f"{len(jobs())} jobs on {args.workers} cores in {seconds:.0f} s, {problems}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
