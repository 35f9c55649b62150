"""Hubs for the digits: tiny networks, each pre-trained on one rendering of 700 digits.

A hub of equal networks descends from its first one, which is pre-trained from random weights; the
others go on from it, as the paper's detectors and segmenters went on from ImageNet's weights.

Pre-training takes about a minute on two cores, so the weights are kept in the user's cache folder,
under a hash of everything that determines them, and checked against a hash of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.markup import escape
from safetensors.torch import load, save
from torch import Tensor

from ..baselines import SingleModel
from ..data import RENDERINGS, DigitsTask, TensorStream
from ..files import user_cache_folder, write_bytes, write_json
from ..hub import Expert, build_experts, load_body
from ..tasks import Classification
from ..training import Reporting, SingleObjective, Trainer, TrainerConfig
from ..training.random_state import seed_all

# One network a rendering, in the order of RENDERINGS.
NETWORKS = ("test_resnet", "test_efficientnet", "test_byobnet", "test_resnet", "test_nfnet")
WEIGHTS, INDEX = "model.safetensors", "index.json"


@dataclass(frozen=True)
class Pretraining:
    """How an expert of the demo is pre-trained. epochs: passes over its 700 digits."""

    epochs: int = 40
    batch_size: int = 64
    lr: float = 3e-3

    def trainer_config(self, num_samples: int, seed: int) -> TrainerConfig:
        return TrainerConfig(
            steps=max(1, num_samples * self.epochs // self.batch_size),
            batch_size=self.batch_size,
            lr_expert=self.lr,
            lr_head=None,
            save_every=0,
            seed=seed,
        )


def expert_names() -> list[str]:
    """What the experts are called in tables: the rendering they know."""
    return list(RENDERINGS)


def pretrained_experts(
    task: DigitsTask,
    settings: Pretraining,
    num_outputs: int,
    console: Console,
    cache: Path | None = None,
    networks: Sequence[str] = NETWORKS,
) -> tuple[Callable[[], list[Expert]], float]:
    """The hub of a task, from the cache where it is there, pre-trained and cached where not.

    networks: names of the experts; the i-th knows the i-th rendering (a sixth the first again).

    Returns:
        (make, seconds): ``make()`` builds the experts anew, with freshly drawn heads, so that
        every method starts from the same weights; the seconds that pre-training took (0: cached).

    Raises:
        InterruptedError: a signal stopped the pre-training; what was finished is kept.
    """
    cache = user_cache_folder() if cache is None else Path(cache)
    networks = [network.removeprefix("timm/") for network in networks]
    renderings = [list(RENDERINGS)[i % len(RENDERINGS)] for i in range(len(networks))]
    descend = len(networks) > 1 and len(set(networks)) == 1
    states, seconds, origin = [], 0.0, ""
    for i, (rendering, network) in enumerate(zip(renderings, networks, strict=True)):
        seed = 1000 * task.seed + i
        data = task.pretrain(rendering)
        key = _key(settings, network, seed, origin, data.images, data.targets)
        folder = cache / "digits" / f"{rendering}-{key}"
        state = _load(folder, console)
        if state is None:
            start = states[0] if origin else None
            state, took = _pretrain(
                folder, settings, network, seed, data, console, rendering, start
            )
            seconds += took
        states.append(state)
        origin = origin or (key if descend else "")

    def make() -> list[Expert]:
        experts = build_experts(networks, num_outputs, pretrained=False, input_size=32)
        for expert, state, rendering in zip(experts, states, renderings, strict=True):
            load_body(expert, state, source=f"the cached expert of {rendering}")
        return experts

    return make, seconds


def _key(settings: Pretraining, network: str, seed: int, origin: str, *tensors: Tensor) -> str:
    """A hash of all that determines an expert's weights: settings, network, library, data, and the
    key of the expert that it descends from, if any."""
    plain = [asdict(settings), network, seed, version("timm"), torch.__version__]
    plain += [origin] if origin else []
    digest = hashlib.sha256(json.dumps(plain).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]


def _pretrain(folder, settings, network, seed, data, console, rendering, start):
    seed_all(seed)
    [expert] = build_experts([network], data.num_classes, pretrained=False, input_size=32)
    if start is not None:
        load_body(expert, start, source="the hub's first expert")
    config, task = settings.trainer_config(len(data), seed), Classification(tuple(data.classes))
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            SingleModel(expert),
            SingleObjective(task.loss),
            TensorStream(data, config.batch_size, config.seed),
            config,
            Path(scratch) / "run",
            task=task,
            reporting=Reporting(console, f"pre-train {rendering}", tensorboard=False),
        )
        result = trainer.fit()
    if result.interrupted:
        raise InterruptedError("stopped while pre-training; experts finished before are kept")
    state = {name: tensor.contiguous() for name, tensor in expert.body.state_dict().items()}
    _store(folder, state, network, console)
    return state, result.seconds


def _store(folder: Path, state: dict[str, Tensor], network: str, console: Console) -> None:
    """Weights first, then the index that vouches for them. No room is only a warning."""
    data = save(state)
    record = {"network": network, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        write_bytes(folder / WEIGHTS, data)
        write_json(folder / INDEX, record)
    except OSError as error:
        text = f"cannot cache the expert in {folder} ({error}); going on without"
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)


def _load(folder: Path, console: Console) -> dict[str, Tensor] | None:
    """The kept weights, if they are the bytes that were written; None where there are none."""
    try:
        expected = json.loads((folder / INDEX).read_text(encoding="utf-8"))["sha256"]
        data = (folder / WEIGHTS).read_bytes()
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError):
        expected, data = None, b""
    if hashlib.sha256(data).hexdigest() != expected:
        text = f"the cached expert in {folder} is damaged; pre-training it anew"
        console.print(f"[yellow]{escape(text)}[/]", soft_wrap=True)
        return None
    return load(data)
