"""What ``hubpath tune`` measured on this machine: the fastest executor of a hub, by batches.

It is kept in one JSON file in the user's cache folder, which ``auto`` reads once in a process. A
measurement holds for the device it was made on, for hubs of the same shapes, and for batches of the
same images and precision that have at most the samples it had and more than half of them: so for
the last batch of an evaluation, too. What the file lacks, or a file that cannot be read, only means
that ``auto`` chooses by its rule.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..files import user_cache_folder, write_json

FILE = Path("executors") / "measured.json"
FORMAT = 1
WAIT_SECONDS = 30.0  # for another process that writes to the file
TRAINING, PREDICTIONS = USES = ("training", "predictions")
RETRY = "run `hubpath tune` again"


class Workload(NamedTuple):
    """Batches to run.

    samples: N of a batch; None: not known yet. gradients: training, else predictions. shape: of a
    sample. precision: autocast's; None: it is off.
    """

    device: torch.device
    samples: int | None = None
    gradients: bool = True
    shape: tuple[int, ...] = ()
    precision: torch.dtype | None = None

    @property
    def use(self) -> str:
        return TRAINING if self.gradients else PREDICTIONS


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The outcome of one measurement, and what it was made of.

    device: see ``device_name``. hub: see ``hub_key``. k: K, active experts per sample. samples: N.
    use: one of ``USES``. milliseconds: the median of each executor that ran. date: year-month-day.
    """

    device: str
    hub: str
    k: int
    samples: int
    shape: tuple[int, ...]
    precision: str
    use: str
    executor: str
    milliseconds: Mapping[str, float]
    date: str

    @property
    def of(self) -> tuple:
        """What it is about."""
        return (self.device, self.hub, self.k, self.shape, self.precision, self.use, self.samples)

    def sentence(self) -> str:
        """Why its executor is taken."""
        own = self.milliseconds[self.executor]
        others = {name: ms for name, ms in self.milliseconds.items() if name != self.executor}
        against = ", ".join(f"{in_digits(ms)} ms ({name})" for name, ms in others.items())
        fastest = own <= min(self.milliseconds.values())
        result = "it was the fastest" if fastest else "no other was faster beyond the noise"
        batch = f"{self.samples} samples" if self.samples > 1 else "1 sample"
        return (
            f"{result} for {batch} in `hubpath tune` on {self.date}: {in_digits(own)} ms against "
            f"{against}"
        )

    @classmethod
    def from_dict(cls, values: Any) -> Measured:
        """Raises ValueError, TypeError or KeyError for what is none."""
        kinds = {"k": int, "samples": int, "shape": list, "milliseconds": dict}
        for name in cls.__dataclass_fields__:
            if not isinstance(values[name], kinds.get(name, str)):
                raise ValueError(f"{name}: {values[name]!r}")
        times = {str(name): float(ms) for name, ms in values["milliseconds"].items()}
        if len(times) < 2 or values["executor"] not in times:
            raise ValueError(f"milliseconds: {times}")
        shape = tuple(map(int, values["shape"]))
        fields = {name: values[name] for name in cls.__dataclass_fields__}
        return cls(**fields | {"shape": shape, "milliseconds": times})


class Stored(NamedTuple):
    """All that is remembered. note: why there is nothing, where that is no normal thing."""

    measured: tuple[Measured, ...]
    note: str | None = None


def stored() -> Stored:
    """What the user's file holds. Read once in a process, and again after ``remember``."""
    try:
        return read(_path())
    except ImportError:  # a bare checkout on a machine without platformdirs: nothing is kept
        return Stored(())


@lru_cache
def read(path: Path) -> Stored:
    """What a file holds; nothing, and a note, where it is none of this format."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        if held["format"] != FORMAT:
            note = f"{path} is of another version (format {held['format']!r}, here {FORMAT})"
            return Stored((), f"{note}: it is not read; {RETRY}")
        return Stored(tuple(map(Measured.from_dict, held["measured"])))
    except FileNotFoundError:
        return Stored(())
    except OSError as error:
        return Stored((), f"{path} cannot be read: {error.strerror}")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return Stored((), f"{path} is damaged ({error!r}): it is not read; {RETRY}")


def find(
    measured: Iterable[Measured], experts: Sequence[nn.Module], k: int, work: Workload
) -> Measured | None:
    """The measurement that holds for such batches; None: there is none. Of batches that are not
    known yet, the latest of the hub."""
    if work.samples is not None:
        how = (work.shape, *_how(work))
        measured = [
            m
            for m in measured
            if m.samples // 2 < work.samples <= m.samples and (m.shape, m.precision, m.use) == how
        ]
    if not measured:
        return None
    of = (device_name(work.device), hub_key(experts, work.use), k, work.use)
    same = [m for m in measured if (m.device, m.hub, m.k, m.use) == of]
    if work.samples is None:
        return same[-1] if same else None
    return min(same, key=lambda m: m.samples, default=None)


def made(
    work: Workload,
    experts: Sequence[nn.Module],
    k: int,
    executor: str,
    milliseconds: Mapping[str, float],
) -> Measured:
    """What is to be remembered of a measurement of ``work``, made today."""
    precision, use = _how(work)
    return Measured(
        device=device_name(work.device),
        hub=hub_key(experts, use),
        k=k,
        samples=work.samples,
        shape=work.shape,
        precision=precision,
        use=use,
        executor=executor,
        milliseconds=dict(milliseconds),
        date=time.strftime("%Y-%m-%d"),
    )


def remember(new: Sequence[Measured]) -> Path:
    """Adds measurements to the user's file, in place of older ones of the same; returns the file.

    Other processes may do so at the same time. A file that cannot be read is replaced.

    Raises OSError; ValueError if another process keeps the file for long.
    """
    about = {each.of for each in new}
    return _change(lambda old: [*(m for m in old if m.of not in about), *new])


def forget(experts: Iterable[nn.Module] | None = None) -> int:
    """Drops what was measured of a hub, or all; returns how many measurements that were."""
    experts = None if experts is None else list(experts)
    keys = None if experts is None else [hub_key(experts, use) for use in USES]
    before: list[Measured] = []

    def keep(old: Sequence[Measured]) -> list[Measured]:
        before.extend(m for m in old if keys is None or m.hub in keys)
        return [m for m in old if m not in before]

    if _path().exists():
        _change(keep)
    return len(before)


def _change(change: Any) -> Path:
    path = _path()
    with _alone(path.parent):
        read.cache_clear()
        measured = change(read(path).measured)
        write_json(path, {"format": FORMAT, "measured": list(map(asdict, measured))})
        read.cache_clear()
    return path


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Within, no other process changes the file."""
    from ..locks import locked  # here: it prints, with a library that models do not need

    until = time.monotonic() + WAIT_SECONDS
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(folder, "`hubpath tune`"))
                break
            except ValueError:  # another has it, for some milliseconds
                if folder.is_file() or time.monotonic() > until:
                    raise
            time.sleep(0.02)
        yield


def _path() -> Path:
    return user_cache_folder() / FILE


def _how(work: Workload) -> tuple[str, str]:
    precision = "none" if work.precision is None else str(work.precision).removeprefix("torch.")
    return precision, work.use


def hub_key(experts: Iterable[nn.Module], use: str) -> str:
    """The same for hubs that are alike: classes of all their modules, and shapes and dtypes of all
    parameters and buffers, in the experts' order; for training also which parameters are frozen,
    whose gradients cost nothing. Which weights they have does not matter."""
    digest = hashlib.sha256()
    for expert in experts:
        for module in expert.modules():
            digest.update(f"{type(module).__module__}.{type(module).__qualname__};".encode())
        for tensor in chain(expert.parameters(), expert.buffers()):
            frozen = "frozen" if use == TRAINING and not tensor.requires_grad else ""
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype} {frozen};".encode())
        digest.update(b"|")
    return digest.hexdigest()[:16]


def in_digits(milliseconds: float) -> str:
    """Four digits, or all before the point: 0.1235, 12.35, 12,346."""
    return f"{milliseconds:,.0f}" if milliseconds >= 1000 else f"{milliseconds:.4g}"


def device_name(device: torch.device) -> str:
    """The model of a device; of a CPU also how many threads torch has."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return device.type
    return f"{_processor()}, {torch.get_num_threads()} threads"


@lru_cache
def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    found = re.search(r"model name\s*: (.*)", text)
    return found[1] if found else platform.processor() or platform.machine()
