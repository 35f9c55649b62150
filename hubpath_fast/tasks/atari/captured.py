"""What an agent does at each step, as CUDA graphs: one launch to act, and one for the whole update,
where there were hundreds, each of which costs the host more than the device.

A graph reads and writes where it did when it was captured. So what changes from step to step goes
into tensors that stay (``Staged``): the state, the batch and the noise, by one copy; and what comes
out is read by one, which is the only wait. Weights, Adam's averages and the layers' noise are
changed in place anyway. What is decided in Python is decided once: this is for policies whose
update is the same operations each time (``eager_because``).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ...executors.graphs.backend import BrokenCaptureError, CudaBackend
from .learn import Batch, Learner, Update
from .noisy import NoisyLinear, noisy_layers, scaled_draw, set_drawn
from .policy import Policy, PolicyLosses
from .settings import FINETUNE, HUB, SCRATCH, AtariSettings

ALIGNMENT = 256  # bytes: kernels load up to 16 at once


def make_learner(policy: Policy, settings: AtariSettings, noise: torch.Generator) -> Learner:
    """A learner whose steps are graphs where the policy is on a GPU and can be captured; why it is
    not, is among its notes."""
    if next(policy.parameters()).device.type != "cuda":
        return Learner(policy, settings, noise)
    reason = eager_because(settings)
    if reason is None:
        return CapturedLearner(policy, settings, noise)
    learner = Learner(policy, settings, noise)
    learner.notes.append(f"steps are not captured as CUDA graphs, and slower so: {reason}")
    return learner


def eager_because(settings: AtariSettings) -> str | None:
    """Why the updates of a run are no graphs; None: they can be."""
    if settings.method in (SCRATCH, FINETUNE):
        return None
    if settings.method != HUB:
        return f"{settings.method} changes its losses from step to step"
    if settings.k < len(settings.hub):
        return (
            f"with K = {settings.k} of {len(settings.hub)} experts the host has to know how many "
            "states each is asked about"
        )
    return None


class CapturedLearner(Learner):
    """A learner that replays. It captures at its first action and its first update: whatever is
    loaded, is loaded before.

    Where a capture fails it goes on as ``Learner`` does, and a note says so.

    backend: makes what captures; see ``CudaBackend``.
    """

    def __init__(
        self,
        policy: Policy,
        settings: AtariSettings,
        noise: torch.Generator,
        backend: Callable[[torch.device], CudaBackend] = CudaBackend,
    ):
        super().__init__(policy, settings, noise)
        self._backend = backend(self.device)
        self._layers, self._target_layers = noisy_layers(self.policy), noisy_layers(self.target)
        self._drawn: Tensor | None = None  # the policy's noise, which acting sets
        self._is_set = True
        self._act: Replay | None = None
        self._update: Replay | None = None
        self._eager = False

    def new_noise(self) -> None:
        self._drawn, self._is_set = scaled_draw(self._layers, self.noise), False

    def act(self, state: Tensor) -> int:
        if self._act is None and not self._eager:
            self._act = self._record(self._acting, self._layers, {"state": state})
        if self._eager:
            self._set_noise()
            return super().act(state)
        self._is_set = True
        return int(self._act({"state": state, "noise": self._drawn})["action"])

    def update(self, batch: Batch) -> Update:
        self._set_noise()
        if self._update is None and not self._eager:
            self._update = self._record(self._updating, self._target_layers, batch._asdict())
        if self._eager:
            return super().update(batch)
        drawn = scaled_draw(self._target_layers, self.noise)
        found = self._update({**batch._asdict(), "noise": drawn})
        total, task, norm = (found.pop(name) for name in ("total", "task", "norm"))
        return Update(PolicyLosses(total, task, found), norm)

    def _set_noise(self) -> None:
        """The policy's noise where no replay set it: nobody acted."""
        if not self._is_set:
            set_drawn(self._layers, self._drawn.to(self.device))
            self._is_set = True

    def _acting(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        set_drawn(self._layers, given["noise"])
        return {"action": self.best_action(given["state"])}

    def _updating(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        set_drawn(self._target_layers, given["noise"])
        losses, norm = self.compute(Batch(*(given[name] for name in Batch._fields)))
        return {"total": losses.total, "task": losses.task, "norm": norm, **losses.terms}

    def _record(
        self,
        function: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        layers: list[NoisyLinear],
        values: Mapping[str, Tensor],
    ) -> Replay | None:
        """A graph of the function; None where there is none, and all is eager from now on."""
        present = [part for layer in layers for part in (layer.noise_in, layer.noise_out)]
        noise = torch.cat(present) if present else torch.empty(0, device=self.device)
        try:
            with self._restored():
                return Replay(function, {**values, "noise": noise}, self._backend, self.device)
        except BrokenCaptureError:
            raise
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self.notes.append(
                "steps are not captured as CUDA graphs, and slower so: a capture failed "
                f"({type(error).__name__}: {first})"
            )
            self._eager = True
            return None

    @contextlib.contextmanager
    def _restored(self) -> Iterator[None]:
        """What is within may learn, as warming up does; after it, nothing was learned. All in
        place, where graphs read it."""
        modules = self.modules()
        tensors = [*modules.parameters(), *modules.buffers()]
        before = [tensor.detach().clone() for tensor in tensors]
        averages = {
            parameter: {name: value.clone() for name, value in state.items()}
            for parameter, state in self.optimizer.state.items()
        }
        random = self._backend.random_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in zip(tensors, before, strict=True):
                    tensor.copy_(value)
                for parameter, state in self.optimizer.state.items():
                    known = averages.get(parameter, {})
                    for name, value in state.items():
                        # Adam starts at zeros, its count of steps too.
                        value.copy_(known.get(name, torch.zeros_like(value)))
            self._backend.set_random_state(random)


class Replay:
    """A function as a graph. It takes tensors by name and gives tensors by name, on the device.

    Call it with values of the same shapes, wherever they are: it gives float32 on the CPU, and has
    waited for the device.

    values: that it is captured with. Those that a call leaves out stay.
    """

    def __init__(
        self,
        function: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
        values: Mapping[str, Tensor],
        backend: CudaBackend,
        device: torch.device,
    ):
        self._given = Staged(values, device)
        self._given.write(values)
        self._shapes: dict[str, torch.Size] = {}
        self._found: list[Tensor] = []  # one, of all results

        def run() -> list[Tensor]:
            found = function(self._given.tensors)
            self._shapes = {name: value.shape for name, value in found.items()}
            self._found[:] = [torch.cat([v.detach().float().flatten() for v in found.values()])]
            return list(self._found)

        reads = self._given.memory
        with backend.undisturbed(), backend.forked([0], reads), backend.on(0):
            backend.warm_up(run)
            self._replay = backend.capture(run, backend.new_pool())
        self._function = function  # and with it all that the graph reads

    def __call__(self, values: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        self._given.write(values)
        self._replay()
        found = self._found[0].to("cpu", copy=True)
        parts = found.split([math.prod(shape) for shape in self._shapes.values()])
        named = zip(self._shapes.items(), parts, strict=True)
        return {name: part.view(shape) for (name, shape), part in named}


class Staged:
    """Tensors that stay, and are written by one copy: ``tensors`` by name, on the device.

    Whoever writes has waited for the device since the last time: the memory that is copied from is
    written again.
    """

    def __init__(self, like: Mapping[str, Tensor], device: torch.device):
        places, size = {}, 0
        for name, tensor in like.items():
            places[name] = size
            size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        on_gpu = device.type == "cuda"
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=on_gpu)
        self.memory = torch.zeros(size, dtype=torch.uint8, device=device)

        def views(memory: Tensor) -> dict[str, Tensor]:
            return {
                name: memory[place : place + like[name].nbytes]
                .view(like[name].dtype)
                .view(like[name].shape)
                for name, place in places.items()
            }

        self._views, self.tensors = views(self._host), views(self.memory)

    def write(self, values: Mapping[str, Tensor | None]) -> None:
        """None, and what is left out, stays as it was."""
        for name, value in values.items():
            if value is not None:
                self._views[name].copy_(value)
        self.memory.copy_(self._host, non_blocking=True)
