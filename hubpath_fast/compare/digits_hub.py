"""Hubs for the digits: tiny networks, each pre-trained on one rendering of 700 digits.

A hub of equal networks descends from its first one, which is pre-trained from random weights; the
others go on from it, as the paper's detectors and segmenters went on from ImageNet's weights.

The weights are kept in the user's cache folder, under a hash of everything that determines them,
and checked against a hash of their bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from safetensors.torch import load, save
from torch import Tensor

from ..baselines import SingleModel
from ..data import DigitsTask, TensorStream
from ..data.digits import NUM_PRETRAIN
from ..files import user_cache_folder, write_bytes, write_json
from ..hub import Expert, ExpertSpec, build_experts, load_body
from ..tasks import Classification
from ..training import Reporting, SingleObjective, Trainer, TrainerConfig
from ..training.random_state import seed_all
from .settings import pretrained_on

# One network a rendering, in the order of RENDERINGS.
NETWORKS = ("test_resnet", "test_efficientnet", "test_byobnet", "test_resnet", "test_nfnet")
WEIGHTS, INDEX = "model.safetensors", "index.json"
# Of kernels in memory: with it a step of 64 takes a quarter less time on CPUs.
LAYOUT = torch.channels_last


@dataclass(frozen=True)
class Pretraining:
    """How an expert is pre-trained. epochs: passes over its 700 digits."""

    epochs: int = 40
    batch_size: int = 64
    lr: float = 3e-3

    @property
    def steps(self) -> int:
        return max(1, NUM_PRETRAIN * self.epochs // self.batch_size)


def expert_store(out_dir: Path) -> Path:
    """The user's cache folder, or one in ``out_dir`` where that cannot be written to."""
    cache = user_cache_folder()
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        return out_dir / "experts"
    return cache if os.access(cache, os.W_OK) else out_dir / "experts"


def plain_spec(network: str) -> ExpertSpec:
    """A network's name without the options that are of fine-tuning."""
    return replace(ExpertSpec.parse(network), lr_factor=1.0, freeze="none", batchnorm=None)


@dataclass(frozen=True)
class Member:
    """An expert of a digits' hub.

    index: its number. before: those it descends from, by number. key: a hash of all that determines
    its weights. folder: where they are kept.
    """

    index: int
    rendering: str
    network: str
    seed: int
    before: tuple[int, ...]
    key: str
    folder: Path


class DigitsHub:
    """The pre-trained weights of a hub, in the cache or made where they are asked for.

    Args:
        task: the digits, at the size that their experts are to know.
        settings: of the pre-training.
        networks: names of the experts; the i-th knows the i-th rendering (see ``pretrained_on``).
        cache: folder of the weights; None: the user's cache folder.
        rendering: that all know, in place of one each.

    members: its experts. notes: what a user should know of the cache, such as a damaged file.
    """

    def __init__(
        self,
        task: DigitsTask,
        settings: Pretraining,
        networks: Sequence[str] = NETWORKS,
        cache: Path | None = None,
        rendering: str | None = None,
    ):
        self.task, self.settings, self.notes = task, settings, []
        cache = (user_cache_folder() if cache is None else Path(cache)) / "digits"
        networks = [str(plain_spec(network)).removeprefix("timm/") for network in networks]
        descend = len(networks) > 1 and len(set(networks)) == 1
        self.members: list[Member] = []
        known = pretrained_on(len(networks), rendering)
        for i, (network, rendering) in enumerate(zip(networks, known, strict=True)):
            seed, before = 1000 * task.seed + i, (0,) if descend and i else ()
            origin = self.members[0].key if before else ""
            data = task.pretrain(rendering)
            key = _key(settings, network, seed, origin, data.images, data.targets)
            folder = cache / f"{rendering}-{key}"
            self.members.append(Member(i, rendering, network, seed, before, key, folder))

    def load(self, index: int, expert: Expert) -> None:
        """Gives an expert its pre-trained body, pre-training it first if it is not in the cache."""
        source = f"the cached expert of {self.members[index].rendering}"
        load_body(expert, self._state(index), source=source)

    def missing(self) -> list[Member]:
        """Those whose weights are not in the cache, whole."""
        return [member for member in self.members if self._cached(member) is None]

    def pretrain(self, index: int, run_dir: Path | None = None) -> tuple[dict[str, Tensor], float]:
        """Pre-trains an expert and caches it.

        run_dir: of the training, which goes on from there if it was stopped; None: a temporary one.

        Returns:
            (the body's weights, seconds of training).

        Raises:
            InterruptedError: a signal stopped it.
        """
        member = self.members[index]
        data, start = self.task.pretrain(member.rendering), [self._state(i) for i in member.before]
        task = Classification(tuple(data.classes))
        seed_all(member.seed)
        [expert] = build_experts([member.network], task.num_outputs, False, self.task.size)
        for state in start:
            load_body(expert, state, source="the hub's first expert")
        expert.module.to(memory_format=LAYOUT)
        config = TrainerConfig(
            steps=self.settings.steps, batch_size=self.settings.batch_size,
            lr_expert=self.settings.lr, lr_head=None, save_every=0, seed=member.seed,
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as scratch:
            trainer = Trainer(
                SingleModel(expert),
                SingleObjective(task.loss),
                TensorStream(data, config.batch_size, config.seed),
                config,
                run_dir or scratch,
                task=task,
                run={"key": member.key},
                resume=True,
                reporting=Reporting(Console(quiet=True), tensorboard=False),
            )
            result = trainer.fit()
        if result.interrupted:
            raise InterruptedError(f"stopped while pre-training the expert of {member.rendering}")
        state = {name: tensor.contiguous() for name, tensor in expert.body.state_dict().items()}
        self._store(member, state)
        return state, result.seconds

    def _state(self, index: int) -> dict[str, Tensor]:
        state = self._cached(self.members[index])
        return self.pretrain(index)[0] if state is None else state

    def _cached(self, member: Member) -> dict[str, Tensor] | None:
        """The kept weights, if they are the bytes that were written; None where there are none."""
        try:
            index = json.loads((member.folder / INDEX).read_text(encoding="utf-8"))
            expected, data = index["sha256"], (member.folder / WEIGHTS).read_bytes()
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            expected, data = None, b""
        if hashlib.sha256(data).hexdigest() != expected:
            text = f"the cached expert in {member.folder} is damaged; pre-training it again"
            self.notes.append(text)
            return None
        return load(data)

    def _store(self, member: Member, state: dict[str, Tensor]) -> None:
        """Weights first, then the index that vouches for them. No room is only a warning."""
        data = save(state)
        record = {"network": member.network, "sha256": hashlib.sha256(data).hexdigest()}
        try:
            write_bytes(member.folder / WEIGHTS, data)
            write_json(member.folder / INDEX, record)
        except OSError as error:
            text = f"cannot cache the expert in {member.folder} ({error}); going on without"
            self.notes.append(text)


def _key(settings: Pretraining, network: str, seed: int, origin: str, *tensors: Tensor) -> str:
    """A hash of all that determines an expert's weights: settings, network, library, layout, data,
    and the key of the expert that it descends from, if any."""
    plain = [asdict(settings), network, seed, version("timm"), torch.__version__, str(LAYOUT)]
    plain += [origin] if origin else []
    digest = hashlib.sha256(json.dumps(plain).encode())
    for tensor in tensors:
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
