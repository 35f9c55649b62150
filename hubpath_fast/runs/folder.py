"""The folder of a run, and a trained run opened again."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..checkpoints import CONFIG_FILE
from ..data.kept import FileList
from ..data.names import one_form
from ..devices import check_device
from ..files import write_json
from ..model import FixedRoutes, HubPathway
from ..pretrained.load import open_model
from ..pretrained.saved import SavedHub
from ..training import Task, find_checkpoint, load_weights, read_log
from ..written import described, lacks
from .build import build_model, saved_task
from .config import FitConfig
from .kinds import kind_of
from .places import check_apart
from .saved import settings_of, task_of

FIT, SEEDS, RESULT, LOG = "fit.json", "seeds.json", "result.json", "log.jsonl"
ROUTES = "routes.json"
CHECKPOINTS = ("best", "last")
FILES = "files.csv.gz"  # the images; see data.kept


class Record(NamedTuple):
    """What a run does: its settings, and what the data turned out to be: what is learned, as the
    task's ``record`` has it, and the pixels a side."""

    config: FitConfig
    learned: Mapping[str, Sequence[str]]
    image_size: int

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(one_form, self.learned["classes"]))

    @property
    def task(self) -> Task:
        return saved_task(self.config, self.learned)


@dataclass(frozen=True)
class RunFolder:
    """A folder of ``hubpath fit``: the one place that knows its files.

    ``fit.json`` has the settings and the classes, ``files.csv.gz`` which image is in which split,
    ``last/`` and ``best/`` are checkpoints, ``log.jsonl`` and ``tensorboard/`` what happened,
    ``result.json`` what came of it. ``routes.json`` is there where the run keeps the same experts
    for every image in place of its router: which, and their weights. A run of several seeds has
    ``seeds.json``, the images that all draw from in ``files.csv.gz``, a run in ``seed-S/`` for
    each, and a ``result.json`` of all.

    Raises ValueError, wherever it reads, for a file that is missing or damaged.
    """

    path: Path

    @property
    def has_run(self) -> bool:
        return (self.path / FIT).is_file()

    @property
    def has_seeds(self) -> bool:
        return (self.path / SEEDS).is_file()

    @property
    def has_result(self) -> bool:
        """Whether the run has ended."""
        return (self.path / RESULT).is_file()

    def seed(self, seed: int) -> RunFolder:
        """The run of one seed of several."""
        return RunFolder(self.path / f"seed-{seed}")

    def record(self) -> Record:
        if not self.has_run:
            raise ValueError(
                described(self.path)
                or f"{self.path} holds no run of `hubpath fit` or `hubpath landmarks fit` "
                f"({lacks(self.path, FIT)}); give the folder named by --out"
            )
        config, image_size = self._read(FIT, ("config", "image_size"))
        with self._naming(FIT):
            settings = FitConfig.from_dict(config)
        names = kind_of(settings).recorded
        learned = dict(zip(names, self._read(FIT, names), strict=True))
        with self._naming(FIT):
            return _record(settings, learned, image_size)

    def write_record(self, record: Record) -> None:
        config, size = record.config.placed().to_dict(), record.image_size
        write_json(self.path / FIT, {"config": config, **record.learned, "image_size": size})

    @property
    def files(self) -> Path:
        """Where the list of the images is, or is to be."""
        return self.path / FILES

    def kept_files(self, config: FitConfig) -> FileList | None:
        """The list of the run's images, if it has one and ``config`` holds out the same of them."""
        if not self.has_run or not self.files.is_file():
            return None
        if _draw(self.record().config) != _draw(config):
            return None
        return FileList.read(self.files)

    def write_files(self, files: FileList | None) -> None:
        """None: of images that are in no files, and so cannot change."""
        if files is None:
            self.files.unlink(missing_ok=True)
        else:
            files.write(self.files)

    def seeds(self) -> tuple[FitConfig, tuple[int, ...]]:
        """The settings of a run of several seeds, and which."""
        config, seeds = self._read(SEEDS, ("config", "seeds"))
        with self._naming(SEEDS):
            if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
                raise ValueError(f"seeds: expected a list of integers, got {seeds!r}")
            return FitConfig.from_dict(config), tuple(seeds)

    def write_seeds(self, config: FitConfig, seeds: Sequence[int]) -> None:
        write_json(self.path / SEEDS, {"config": config.placed().to_dict(), "seeds": list(seeds)})

    def config(self) -> FitConfig | None:
        """The settings of what is here, of one seed or several; None where nothing is."""
        if self.has_run:
            return self.record().config
        return self.seeds()[0] if self.has_seeds else None

    def result(self) -> dict[str, Any] | None:
        """None where the run has not ended."""
        if not self.has_result:
            return None
        result = self._read(RESULT)
        if not isinstance(result, dict):
            raise ValueError(f"{self.path / RESULT} holds no result; delete it, and --resume")
        return result

    def write_result(self, result: dict[str, Any]) -> None:
        write_json(self.path / RESULT, result)

    def fixed_routes(self, num_experts: int) -> FixedRoutes | None:
        """What the run keeps in place of its router; None: it keeps that."""
        if not (self.path / ROUTES).is_file():
            return None
        experts, weights = self._read(ROUTES, ("experts", "weights"))
        with self._naming(ROUTES):
            for name, held in (("experts", experts), ("weights", weights)):
                if not isinstance(held, list):
                    raise ValueError(f"{name}: expected a list, got {held!r}")
            return FixedRoutes(experts, weights, num_experts)

    def write_routes(self, routes: FixedRoutes | None) -> None:
        """None: the run keeps its router."""
        if routes is None:
            (self.path / ROUTES).unlink(missing_ok=True)
        else:
            kept = {"experts": list(routes.experts), "weights": list(routes.weights)}
            write_json(self.path / ROUTES, kept)

    def history(self) -> list[dict[str, Any]]:
        """The lines of the log."""
        return read_log(self.path / LOG)

    def checkpoint(self) -> Path:
        """The best one; the last, where none was evaluated yet."""
        for folder in (self.path / name for name in CHECKPOINTS):
            if find_checkpoint(folder):
                return folder
        raise ValueError(f"{self.path} has no checkpoint yet; finish the run with --resume first")

    def lost_best(self) -> str | None:
        """What to say if a best checkpoint was chosen but is no longer there."""
        if find_checkpoint(self.path / "best"):
            return None
        lines = [line for line in self.history() if isinstance(line, dict)]
        if not any(line.get("best") is not None for line in lines):
            return None
        return (
            f"{self.path / 'best'} is gone: the weights are those of the last step, not of the one "
            "that was best on validation images"
        )

    def _read(self, name: str, keys: Sequence[str] = ()) -> Any:
        """What a file holds; with ``keys``, the values of these."""
        path = self.path / name
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            return [held[key] for key in keys] if keys else held
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
        except KeyError as error:
            raise ValueError(f"{path} is damaged (it lacks {error})") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error})") from error

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """What is wrong within is wrong in this file."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self.path / name}: {error}") from error


def _record(config: FitConfig, learned: Mapping[str, Any], image_size: Any) -> Record:
    for key, names in learned.items():
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{key}: expected a list of names, got {names!r}")
    if type(image_size) is not int or image_size < 1:
        raise ValueError(f"image_size: expected an integer of at least 1, got {image_size!r}")
    return Record(config, learned, image_size)


def _draw(config: FitConfig) -> tuple:
    """What decides which images are held out."""
    return config.dataset, config.validation, config.trainer.seed


@dataclass
class Run:
    """A trained run, opened again: its settings, what it learned and its model in evaluation mode.

    notes: what a user should know of it. folder: the run's; None of a saved hub, which has no data
    of its own.
    """

    config: FitConfig
    task: Any
    image_size: int
    model: HubPathway
    notes: tuple[str, ...] = ()
    folder: RunFolder | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        return self.task.classes

    @property
    def names(self) -> tuple[str, ...]:
        """What tables call the experts."""
        return self.model.origin.labels

    @property
    def device(self) -> torch.device:
        """Where it predicts: that of its router, since experts may rest elsewhere."""
        model = self.model
        router = chain(model.generator.parameters(), model.aggregator.parameters())
        return next(chain(router, model.buffers(recurse=False), model.parameters())).device

    def check_apart(self, out: str | Path) -> None:
        """Raises ValueError if ``out`` would be written among the run's images."""
        if self.folder is not None:
            check_apart(out, self.config.dataset, self.config.data)

    def room_notes(self) -> list[str]:
        """What came into memory so far, and went, where experts have a room for that."""
        report = self.model.executor_report()
        return [report.room_text] if report.room else []


def open_run(
    run: str | Path,
    device: str = "cpu",
    task: str | None = None,
    room: str | int | None = None,
) -> Run:
    """Opens a run's best checkpoint (the last one, where none was evaluated yet), with the routes
    that the run keeps; or the checkpoint given; or a saved hub.

    run: the folder of a run, best/ or last/ of it, or a folder of ``model.save_pretrained``.
    task: the kind of task that the caller is for, "classification" or "landmarks"; None: any.
    room: of the experts that are in memory at a time, "8GB" or a number of them; see
    ``from_pretrained``. None: all are.

    Raises:
        ValueError: the folder holds no run and no saved hub, or one of another task (with the
            command that is for it) or, with ``task``, of none; a checkpoint that is damaged or of
            another model.
    """
    on, path = check_device(device), Path(run)
    folder, above = RunFolder(path), RunFolder(path.resolve().parent)
    if not folder.has_run and path.resolve().name in CHECKPOINTS and above.has_run:
        return _open_checkpoint(above, path.resolve(), on, task, room)
    if not folder.has_run and (path / CONFIG_FILE).is_file():
        return _open_saved(path, on, task, room)
    return _open_checkpoint(folder, None, on, task, room)


def _open_checkpoint(
    folder: RunFolder,
    checkpoint: Path | None,
    device: torch.device,
    task: str | None,
    room: str | int | None,
) -> Run:
    """checkpoint: of the run; None: the best."""
    record = folder.record()
    config, image_size, learned = record.config, record.image_size, record.task
    if task is not None:
        check_task(folder.path, config, task)
    lost = folder.lost_best() if checkpoint is None else None
    checkpoint = checkpoint or folder.checkpoint()
    if room is None:
        same = device.type == torch.device(config.trainer.device).type
        here = config if same else config.replace(executor="auto", room=None)
        model = build_model(here, learned, image_size, pretrained=False)
        load_weights(model, checkpoint)
    else:  # a checkpoint is a saved hub, whose experts need not be in memory to be there
        model = open_model(SavedHub(checkpoint), room=room)
    routes = folder.fixed_routes(len(model.experts))
    if routes is not None:
        model.generator = routes
    notes = (lost,) if lost else ()
    return Run(config, learned, image_size, model.to(device).eval(), notes, folder)


def _open_saved(path: Path, device: torch.device, task: str | None, room: str | int | None) -> Run:
    hub = SavedHub(path)
    with hub.naming():
        config, learned, size = settings_of(hub.config, path), task_of(hub.model), hub.input_size
    if task is not None:
        if learned is None or size is None:
            raise ValueError(
                f"{path} does not say what its outputs mean; save it with their names, "
                "model.save_pretrained(DIR, classes=[...])"
            )
        check_task(path, config, task)
    return Run(config, learned, size, open_model(hub, room=room).to(device))


def check_task(run: str | Path, config: FitConfig, task: str) -> None:
    """Raises ValueError, with the command that is right, if a run is of another task."""
    if config.task == task:
        return
    command = kind_of(config).command
    raise ValueError(
        f"{run} is a run of `{command} fit`; use `{command} evaluate {run}`, `{command} predict "
        f"{run} ...`, or `hubpath report {run}`"
    )
