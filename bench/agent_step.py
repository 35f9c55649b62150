"""Rows of ``bench.gpu_speed`` that are steps of an Atari agent, without its game and its replay:
new noise, an action and an update, as ``tasks/atari/agent.py`` has them, eager and as CUDA graphs.

Networks, batch and settings are those of ``hubpath atari fit``. Captured steps are compared with
eager ones before anything is timed. Every step waits for the device twice, for the action and for
the losses that priorities are made of, as it does in a run.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import asdict

import torch
from torch import nn

from hubpath_fast.executors.graphs.backend import CudaBackend
from hubpath_fast.tasks.atari.captured import CapturedLearner
from hubpath_fast.tasks.atari.distribution import make_atoms
from hubpath_fast.tasks.atari.hub import HubPolicy
from hubpath_fast.tasks.atari.learn import Batch, Learner
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.policy import SinglePolicy
from hubpath_fast.tasks.atari.settings import AtariSettings

from . import speed_step, timing
from .children import Write, first_line
from .operations import relative_error

ACTIONS = 18
METHODS = {"scratch": (), "hub": ("a", "b")}  # and the names of the sources
CHECKED = 3  # updates, each of which learns from the one before
# Sums in another order, through three steps of Adam: a batch, noise or weight that was not renewed
# is off by a tenth and more.
TOLERANCE = 1e-3


def settings_of(method: str) -> AtariSettings:
    return AtariSettings(game="seaquest", method=method, hub=METHODS[method])


def make_policy(method: str, settings: AtariSettings) -> nn.Module:
    torch.manual_seed(0)
    atoms = make_atoms(settings.atoms, settings.v_min, settings.v_max)
    networks = [
        RainbowNetwork(ACTIONS, settings.atoms, settings.hidden) for _ in settings.hub or "s"
    ]
    if not settings.hub:
        return SinglePolicy(*networks, atoms)
    policy = HubPolicy(networks, atoms, settings.k)
    # Drawn, but too small to be seen: graphs may draw other numbers, which are as good.
    nn.init.constant_(policy.hub.generator.noise.bias, -30.0)
    return policy


def recorded_batches(settings: AtariSettings, count: int = 4) -> list[Batch]:
    """As the replay gives them, on the CPU."""
    random, n = torch.Generator().manual_seed(1), settings.batch_size
    network = RainbowNetwork(ACTIONS)
    shape = n, network.history, *network.patches.shape

    def states() -> torch.Tensor:
        return torch.randint(256, shape, generator=random).to(torch.uint8)

    return [
        Batch(
            states(), torch.randint(ACTIONS, (n,), generator=random),
            torch.randn(n, generator=random), 0.8 * torch.ones(n), states(),
            torch.rand(n, generator=random),
        )
        for _ in range(count)
    ]  # fmt: skip


def make_learner(method: str, device: str, backend: Callable | None) -> Learner:
    """backend: of a captured one; None: eager."""
    settings, noise = settings_of(method), torch.Generator().manual_seed(2)
    policy = make_policy(method, settings).to(device)
    if backend is None:
        return Learner(policy, settings, noise)
    return CapturedLearner(policy, settings, noise, backend)


def step(learner: Learner, batch: Batch) -> torch.Tensor:
    """The losses that priorities are made of, on the CPU."""
    learner.new_noise()
    learner.act(batch.states[:1])
    return learner.update(batch).losses.task.cpu()


def stepping(learner: Learner, batches: Iterator[Batch]) -> Callable[[], torch.Tensor]:
    return lambda: step(learner, next(batches))


def check(method: str, learner: Learner, device: str) -> None:
    """Raises ValueError where its first steps are not an eager learner's, or are eager."""
    plain = make_learner(method, device, None)
    found = [step(learner, batch) for batch in recorded_batches(learner.settings, CHECKED)]
    right = [step(plain, batch) for batch in recorded_batches(learner.settings, CHECKED)]
    if learner.notes:
        raise ValueError(f"not timed: {learner.notes[0]}")
    error = max(relative_error(*pair) for pair in zip(found, right, strict=True))
    if not error <= TOLERANCE:
        raise ValueError(f"not timed: losses: relative error {error:.1e} above {TOLERANCE:.0e}")


def measure(write: Write, device: str, seconds: float, backend: Callable = CudaBackend) -> None:
    """Rows "scratch eager", "scratch captured", "hub eager" and "hub captured"."""
    functions = {}
    for method in METHODS:
        for way, made in (("eager", None), ("captured", backend)):
            name = f"{method} {way}"
            try:
                learner = make_learner(method, device, made)
                if made is not None:
                    check(method, learner, device)
                batches = itertools.cycle(recorded_batches(learner.settings))
                functions[name] = stepping(learner, batches)
                functions[name]()
            except Exception as error:
                functions.pop(name, None)
                write(name, ok=False, note=first_line(error))
    if not functions:
        return
    times = timing.interleaved(functions, device, seconds / 3, calls=1)
    values = {name: asdict(found) for name, found in times.items()}
    for name, row in values.items():
        row["steps_per_second"] = 1 / row["p50"]
        write(name, text=say(row), **row)
    # Last: the profiler may stay attached, and slow every launch after it.
    for name, function in functions.items():
        if more := speed_step.profiled(function, device, calls=4):
            write(name, text=say(values[name] | more), **values[name] | more)


def say(row: dict) -> str:
    text = [f"{row['p50'] * 1e3:.2f} ms", f"{row['steps_per_second']:.0f} steps/s"]
    return ", ".join([*text, *speed_step.say_profile(row, 1e3, 2)])
