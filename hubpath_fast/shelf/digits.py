"""A shelf without downloads: snapshots along the pre-training of networks on the digits.

Every architecture is trained on every rendering of the task's 700 digits for pre-training, and
kept at TAKEN of its steps, in a geometric row: 5 x 4 x 10 = 200 models of known, very different
worth, from one that has hardly begun to one that knows one rendering well. Each is a file of
safetensors with the head that it was trained with, which LEEP and NCE ask for.

The files are kept in the user's cache folder, under a hash of everything that determines them, and
checked against a hash of their bytes. One training is a step of one thread: what it gives does not
depend on how many run at the same time.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

from ..baselines import SingleModel
from ..data import DigitsTask
from ..data.digits import RENDERINGS, render, write_images
from ..data.order import generator, mix
from ..data.tensors import TensorSet
from ..files import user_cache_folder, write_bytes, write_json
from ..hub import build_experts
from ..preprocessing import resized_side
from ..training.random_state import random_state, seed_all, set_random_state

NETWORKS = ("test_resnet", "test_efficientnet", "test_byobnet", "test_nfnet")
# Steps of training that are kept: 4 * 100 ** (i / 9), rounded. The last is its end.
TAKEN = (4, 7, 11, 19, 31, 52, 86, 144, 240, 400)
BATCH_SIZE = 70  # a tenth of the digits, so that an epoch is 10 steps, and TAKEN[-1] are 40 epochs
INDEX = "index.json"
LAYOUT = torch.channels_last  # of kernels in memory: a step takes a quarter less time on CPUs
# Of the 300 target digits: 180 train and 120 choose. What is chosen on them is 0.5 points apart.
NUM_VALIDATION = 120


@dataclass(frozen=True)
class SnapshotSettings:
    """How a network is pre-trained. taken: steps after which it is kept, ascending. lr: the largest
    rate of AdamW, which falls to 0 as a cosine."""

    taken: tuple[int, ...] = TAKEN
    batch_size: int = BATCH_SIZE
    lr: float = 3e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class SnapshotTraining:
    """One training, of as many snapshots as ``settings.taken`` has steps.

    key: a hash of all that determines them. folder: where they are kept.
    """

    rendering: str
    network: str
    seed: int
    settings: SnapshotSettings
    key: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.rendering}-{self.network.removeprefix('test_')}"

    @property
    def files(self) -> list[Path]:
        """One a snapshot, in the order of steps. A file's stem is what tables call the model."""
        return [self.folder / f"{self.name}-{step:04d}.safetensors" for step in self.settings.taken]

    @property
    def specs(self) -> list[str]:
        """The snapshots as a hub takes them."""
        return [f"file/{file}?arch=timm/{self.network}" for file in self.files]


class DigitsSnapshots:
    """The snapshots of a task, in the cache or made by ``train``.

    Args:
        task: its digits for pre-training, its seed and its size in pixels are taken.
        settings: of the trainings.
        networks: names of timm's.
        cache: folder; None: the user's cache folder.
        renderings: that are trained on.
    """

    def __init__(
        self,
        task: DigitsTask,
        settings: SnapshotSettings = SnapshotSettings(),
        networks: tuple[str, ...] = NETWORKS,
        cache: Path | None = None,
        renderings: Iterable[str] = RENDERINGS,
    ):
        self.task = task
        root = (user_cache_folder() if cache is None else Path(cache)) / "digits-snapshots"
        self.trainings: list[SnapshotTraining] = []
        for rendering in renderings:
            data = task.pretrain(rendering)
            for network in networks:
                seed = mix(task.seed, "snapshots", rendering, network)
                key = _key(settings, network, seed, data)
                folder = root / f"{rendering}-{network}-{key}"
                self.trainings.append(
                    SnapshotTraining(rendering, network, seed, settings, key, folder)
                )

    @property
    def specs(self) -> list[str]:
        """All snapshots as a hub takes them: by rendering, network and step."""
        return [spec for training in self.trainings for spec in training.specs]

    def missing(self) -> list[SnapshotTraining]:
        """Those of which not every file is there with the bytes that were written."""
        return [training for training in self.trainings if not is_whole(training)]

    def train(
        self, training: SnapshotTraining, tell: Callable[[int], None] = lambda step: None
    ) -> None:
        """Trains once and writes its snapshots; what torch would draw next stays as it was.

        tell: called with the number of steps taken at each snapshot. Raises OSError where the
        folder cannot be written to.
        """
        data, digests = self.task.pretrain(training.rendering), {}
        device = torch.device("cpu")
        before = random_state(device)
        try:
            for step, state in _snapshots(training, data):
                file = training.files[training.settings.taken.index(step)]
                content = save(state)
                write_bytes(file, content)
                digests[file.name] = hashlib.sha256(content).hexdigest()
                tell(step)
        finally:
            set_random_state(before, device)
        write_json(training.folder / INDEX, {"sha256": digests})  # last: it vouches for the others


def digits_splits(seed: int, num_validation: int = NUM_VALIDATION) -> dict[str, TensorSet]:
    """The images of a digits' shelf: "train", "validation" and "test".

    The test split is the task's, each of the 797 digits in one rendering. Of the other two every
    digit is there in all five renderings, one after the other: heads learn what a rendering does to
    a class, and 0.5 points of the validation images are three images and not a third of one. No
    digit is in two splits.
    """
    task = DigitsTask(seed, num_validation)
    every = np.arange(len(RENDERINGS))
    splits = {"test": task.test}
    for split, part in (("train", "target"), ("validation", "validation")):
        digits = np.repeat(task.indices[part], len(every))
        splits[split] = render(digits, np.tile(every, len(task.indices[part])), task.size)
    return {split: splits[split] for split in ("train", "validation", "test")}


def write_shelf_images(out_dir: str | Path, splits: dict[str, TensorSet]) -> Path:
    """Writes them as PNG files, ``out_dir/{train,val,test}/CLASS/NUMBER_RENDERING.png``.

    Evaluation shows a network the centre of an image, 7/8 a side. So that this is the digit as
    the snapshots know it, to the bit, the files have a border, which repeats the outermost pixels.
    Returns out_dir.
    """
    padded = {}
    for split, data in splits.items():
        size = data.images.shape[-1]
        before = round((resized_side(size) - size) / 2)  # as torchvision's CenterCrop rounds
        after = resized_side(size) - size - before
        images = F.pad(data.images.float(), (before, after) * 2, mode="replicate").byte()
        padded["val" if split == "validation" else split] = replace(data, images=images)
    return write_images(out_dir, padded)


def is_whole(training: SnapshotTraining) -> bool:
    """Whether all its files are there with the bytes that were written."""
    try:
        known = json.loads((training.folder / INDEX).read_text(encoding="utf-8"))["sha256"]
        return all(
            hashlib.sha256(file.read_bytes()).hexdigest() == known[file.name]
            for file in training.files
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _snapshots(
    training: SnapshotTraining, data: TensorSet
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(step, the network's tensors) of each snapshot, while it is trained."""
    settings = training.settings
    seed_all(training.seed)
    [expert] = build_experts([training.network], len(data.classes), False, data.images.shape[-1])
    model = SingleModel(expert).train()
    expert.module.to(memory_format=LAYOUT)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, settings.taken[-1])
    for step, batch in enumerate(_batches(training, len(data)), start=1):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(data.images[batch]), data.targets[batch]).backward()
        optimizer.step()
        schedule.step()
        if step in settings.taken:
            state = expert.body.state_dict()
            yield step, {name: tensor.clone().contiguous() for name, tensor in state.items()}


def _batches(training: SnapshotTraining, total: int) -> Iterator[Tensor]:
    """The numbers of each step's digits: epoch after epoch in a new order, whole batches only."""
    settings = training.settings
    each = total // settings.batch_size
    for step in range(settings.taken[-1]):
        epoch, place = divmod(step, each)
        if place == 0:
            order = torch.randperm(total, generator=generator(training.seed, "order", epoch))
        yield order[place * settings.batch_size : (place + 1) * settings.batch_size]


def _key(settings: SnapshotSettings, network: str, seed: int, data: TensorSet) -> str:
    plain = [asdict(settings), network, seed, version("timm"), torch.__version__, str(LAYOUT)]
    digest = hashlib.sha256(json.dumps(plain).encode())
    for tensor in (data.images, data.targets):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()[:16]
