"""Which of a model's tensors lie in which file.

An expert is the unit: its parameters and buffers are one file, ``experts/NN-LABEL.safetensors``,
and all that is no expert's is ``router.safetensors``. Memory that several names share is written
once, in the first expert that has it, so that an expert's file is all that opening it needs unless
it shares memory with another expert.

Experts that another rank has are on the meta device: their tensors have names and shapes here, and
their files are that rank's to write and to read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

FORMAT = 1
SINGLE_FILE, ROUTER_FILE = "model.safetensors", "router.safetensors"
INDEX_FILE, CONFIG_FILE = "model.safetensors.index.json", "config.json"
STATE_FILE = "state.pt"  # what training adds; a checkpoint of format 0 is known by it
EXPERTS = "experts"  # the name of the module list, and of the folder
LABEL_LENGTH = 60


@dataclass(frozen=True)
class Part:
    """What one file holds. tensors: by name. aliases: names of tensors that are one of those, with
    its name. moving: names of tensors that may change without any counter telling."""

    file: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    aliases: dict[str, str] = field(default_factory=dict)
    moving: frozenset[str] = frozenset()

    @property
    def elsewhere(self) -> bool:
        """Whether its values are another rank's."""
        return any(tensor.is_meta for tensor in self.tensors.values())


def parts_of(
    model: nn.Module, labels: Sequence[str] = ()
) -> tuple[dict[str, Part], dict[str, str]]:
    """The parts of a model by file, the router first; and all aliases, those between parts too.

    labels: of the experts, for their files' names; by default "expert". Raises ValueError where
    they are more or fewer than the experts, and TypeError for a state that is no tensor.
    """
    files = file_names(model, labels)
    state = model.state_dict()
    for name, value in state.items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the model's state_dict holds {name}, a {type(value).__name__}: only tensors can "
                "be saved; keep it out of get_extra_state()"
            )
    aliases = _aliases(state)
    # A forward pass may write to them, and a replay of captured work does so uncounted.
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    names: dict[str, list[str]] = {file: [] for file in files}
    for name in state:
        names[file_of(name, files)].append(name)
    return {
        file: Part(
            file,
            {name: state[name].detach() for name in own if name not in aliases},
            {name: aliases[name] for name in own if aliases.get(name) in own},
            moving=frozenset(buffers.intersection(own).difference(aliases)),
        )
        for file, own in names.items()
    }, aliases


def file_names(model: nn.Module, labels: Sequence[str] = ()) -> list[str]:
    """The files of a model: the router's, then the experts' in order; or the only one."""
    experts = getattr(model, EXPERTS, None)
    if not isinstance(experts, nn.ModuleList):
        return [SINGLE_FILE]
    labels = list(labels) or ["expert"] * len(experts)
    if len(labels) != len(experts):
        raise ValueError(
            f"labels: expected one for each of the {len(experts)} experts, got {len(labels)}"
        )
    digits = max(2, len(str(len(experts) - 1)))
    names = [f"{i:0{digits}d}-{_plain(label)}" for i, label in enumerate(labels)]
    return [ROUTER_FILE, *(f"{EXPERTS}/{name}.safetensors" for name in names)]


def file_of(name: str, files: Sequence[str]) -> str:
    """Of ``file_names`` the one that a parameter or buffer of this name lies in."""
    if len(files) > 1 and name.startswith(f"{EXPERTS}."):
        return files[1 + int(name.split(".", 2)[1])]
    return files[0]


def _plain(label: str) -> str:
    """A label as any file system takes it."""
    text = re.sub(r"[^A-Za-z0-9._+]+", "-", label).replace("..", ".")
    return text[:LABEL_LENGTH].strip("-.") or "expert"


def _aliases(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Names of tensors that are another one, with its name: an expert's where one has it."""
    aliases: dict[str, str] = {}
    first: dict[tuple, str] = {}
    for name in sorted(state, key=lambda name: not name.startswith(f"{EXPERTS}.")):
        value = state[name]
        storage = _memory(value)
        key = (storage, value.storage_offset(), value.shape, value.stride(), value.dtype)
        if storage and first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return aliases


def _memory(tensor: Tensor) -> int:
    """The number of the memory that a tensor looks at; 0: of none."""
    storage = tensor.untyped_storage()
    if tensor.is_meta:  # its addresses are all 0
        return storage._cdata if storage.nbytes() else 0
    return storage.data_ptr()
