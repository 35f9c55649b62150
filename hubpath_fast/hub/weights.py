"""Pre-trained weights: finding them in the local caches, fetching them, reading them safely.

Files are read as safetensors or with ``weights_only=True``; code in a pickle is never run. Weights
lie where timm and torch keep them: the Hugging Face cache (HF_HOME) and torch's (TORCH_HOME).
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch
from torch import Tensor

from .errors import HubError

SAFE, PICKLED = "model.safetensors", "pytorch_model.bin"
CONNECT_SECONDS = 5.0
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # of its SHA-256, the first digits


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from.

    name: of the model. repository: on the Hugging Face hub, or None. filenames: in that repository,
    the one to prefer first. revision: of that repository. url: of a plain file, for a model that is
    not on the hub.
    """

    name: str
    repository: str | None
    filenames: tuple[str, ...] = (SAFE, PICKLED)
    revision: str | None = None
    url: str | None = None

    def cached(self) -> Path | None:
        """The local file, without asking the network; None where there is none."""
        if self.repository is None:
            path = self.cache_folder() / os.path.basename(urlparse(self.url).path)
            return path if path.is_file() else None
        from huggingface_hub import try_to_load_from_cache

        for filename in self.filenames:
            path = try_to_load_from_cache(self.repository, filename, revision=self.revision)
            if isinstance(path, str):
                return Path(path)
        return None

    def cache_folder(self) -> Path:
        """Where the file lies, or would lie, once fetched."""
        if self.repository is None:
            return Path(torch.hub.get_dir()) / "checkpoints"
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"

    def origin(self) -> str:
        """A web address that a person can open."""
        if self.repository is None:
            return self.url
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository}"

    def fetch(self) -> Path:
        """The local file, downloaded if need be; the network's own errors where that fails."""
        path = self.cached()
        if path is not None:
            return path
        if self.repository is None:
            path = self.cache_folder() / os.path.basename(urlparse(self.url).path)
            path.parent.mkdir(parents=True, exist_ok=True)
            # Downloads beside and renames; a name such as resnet-0676ba61.pth is its own check.
            hash_prefix = HASH_IN_NAME.search(path.name)
            torch.hub.download_url_to_file(
                self.url, str(path), hash_prefix and hash_prefix.group(1), progress=True
            )
            return path
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for filename in self.filenames[:-1]:
            try:
                return Path(hf_hub_download(self.repository, filename, revision=self.revision))
            except LocalEntryNotFoundError:  # no network, not a missing file
                raise
            except EntryNotFoundError:
                continue
        return Path(hf_hub_download(self.repository, self.filenames[-1], revision=self.revision))


def fetch_all(sources: Sequence[WeightSource]) -> list[Path]:
    """The local files of all sources, downloading what is missing.

    Raises HubError that names every file still wanted, where it comes from and where it belongs, if
    the network is off or cannot be reached. That is asked once, briefly, before the first download:
    the libraries' own retries take most of a minute per file.
    """
    missing = [source for source in sources if source.cached() is None]
    reason = _unreachable(missing) if missing else None
    if reason:
        raise HubError([_wanted(missing, reason)])
    paths = []
    for source in sources:
        try:
            paths.append(source.fetch())
        except Exception as error:  # each backend raises its own kinds, httpx's among them
            still = [s for s in missing if s.cached() is None]
            raise HubError([_wanted(still, f"{type(error).__name__}: {error}")]) from error
    return paths


def _unreachable(sources: Sequence[WeightSource]) -> str | None:
    """Why the network cannot be used for these sources, or None."""
    if all(source.repository is None for source in sources):
        return None  # torch.hub fails at once by itself
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE)"
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
    except Exception as error:  # requests' or httpx's, by the version of huggingface_hub
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return None


def _wanted(sources: Sequence[WeightSource], reason: str) -> str:
    unique = {source.name: source for source in sources}.values()
    lines = [f"    {s.name}: from {s.origin()}, kept in {s.cache_folder()}" for s in unique]
    return "\n".join(
        [
            f"pre-trained weights are missing and cannot be downloaded: {reason}",
            *lines,
            "    Run once with a network, copy the cache folder from a machine that has it, or "
            "start from random weights with pretrained=False (--no-pretrained).",
        ]
    )


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """A state dict from a ``.safetensors`` file or a checkpoint of tensors, on the CPU.

    A checkpoint may hold the state dict itself or under "state_dict" or "model". Raises HubError if
    the file is missing, broken, holds pickled code (which is not run), or holds no tensors by name.
    """
    path = Path(path)
    if not path.is_file():
        raise HubError([f"there is no file of weights at {path}"])
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's on tar and legacy formats
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise HubError(
            [
                f"{path} is not a plain file of tensors: it holds other pickled objects, which "
                "could run code and are refused, or is no checkpoint at all. Save its state dict "
                "as safetensors instead."
            ]
        ) from error
    except Exception as error:  # safetensors' own, zip's and struct's: all mean a broken file
        raise HubError([f"{path} is broken or no file of weights ({error})"]) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise HubError([f"{path} holds {type(content).__name__}, not tensors by name"])
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd:
        raise HubError(
            [
                f"{path} holds more than tensors by name, for example {odd[0]!r}; "
                'a checkpoint needs its state dict at the top, under "state_dict" or under "model"'
            ]
        )
    return dict(content)
