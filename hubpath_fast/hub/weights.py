"""Pre-trained weights: finding them in the local caches, and fetching them.

Weights lie where timm and torch keep them: the Hugging Face cache (HF_HOME) and torch's
(TORCH_HOME). A download is checked against the hash that its server or its name states, and thrown
away if it differs. What a file holds is read by ``checkpoint``.
"""

from __future__ import annotations

import hashlib
import os
import re
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

import torch

from .checkpoint import PICKLED, SAFE
from .errors import HubError

CONNECT_SECONDS = 5.0
HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,})\.")  # of its SHA-256, the first digits
SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class WeightSource:
    """Where a model's weights come from: a repository, an address, or a file of this machine.

    name: of the model. repository: on the Hugging Face hub, or None. filenames: in that repository,
    the one to prefer first. revision: of that repository. url: of a plain file, for a model that is
    not on the hub. md5: the first digits of that file's, where its publisher states them. path: of
    a local file, or of the folder that holds it, which is never fetched.
    """

    name: str
    repository: str | None = None
    filenames: tuple[str, ...] = (SAFE, PICKLED)
    revision: str | None = None
    url: str | None = None
    md5: str | None = None
    path: Path | None = None

    def cached(self) -> Path | None:
        """The local file, without asking the network; None where there is none."""
        if self.repository is None:
            path = self.place()
            found = path.exists() if self.path is not None else path.is_file()
            return path if found else None
        from huggingface_hub import try_to_load_from_cache

        for filename in self.filenames:
            path = try_to_load_from_cache(self.repository, filename, revision=self.revision)
            if isinstance(path, str):
                return Path(path)
        return None

    def problem(self) -> str | None:
        """Why the weights, which are to be on this machine, cannot be read; None: they can, or
        else are fetched."""
        if self.path is None or self.cached() is not None:
            return None
        absolute, hint = Path("/", self.path), ""
        if not self.path.is_absolute() and absolute.exists():
            hint = f", but at {absolute}: an absolute path has a slash more, file/{absolute}"
        return f"{self.name}: there is no file of weights at {self.path}{hint}"

    def place(self) -> Path:
        """The file, or the folder of a repository, where the weights lie or would lie."""
        if self.path is not None:
            return self.path
        if self.repository is None:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            return folder / os.path.basename(urlparse(self.url).path)
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repository.replace('/', '--')}"

    def origin(self) -> str:
        """A web address that a person can open, or a local path."""
        if self.repository is None:
            return self.url or str(self.path)
        from huggingface_hub import constants

        return f"{constants.ENDPOINT}/{self.repository}"

    def wanted(self) -> str:
        """Which file is wanted, from where, and where it belongs."""
        if self.repository is None:
            return f"{self.name}: from {self.origin()}, kept as {self.place()}"
        files = " or ".join(self.filenames)
        return f"{self.name}: {files} from {self.origin()}, kept in {self.place()}"

    def fetch(self) -> Path:
        """The local file, downloaded if need be; the network's own errors where that fails, and
        HubError if what came is not what was published."""
        path = self.cached()
        if path is not None:
            return path
        return self._download() if self.repository is None else self._from_repository()

    def _download(self) -> Path:
        path = self.place()
        path.parent.mkdir(parents=True, exist_ok=True)
        # Downloads beside and renames; a name such as resnet-0676ba61.pth is its own check.
        hash_prefix = HASH_IN_NAME.search(path.name)
        beside = path.with_name(path.name + ".unchecked") if self.md5 else path
        torch.hub.download_url_to_file(
            self.url, str(beside), hash_prefix and hash_prefix.group(1), progress=True
        )
        if self.md5:
            digest = file_digest(beside, "md5")
            if not digest.startswith(self.md5):
                beside.unlink()
                raise HubError(
                    f"{self.name}: what came from {self.url} has the MD5 {digest}, but must "
                    f"begin with {self.md5}; the download is deleted, try again"
                )
            os.replace(beside, path)
        return path

    def _from_repository(self) -> Path:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        for filename in self.filenames:
            try:
                path = Path(hf_hub_download(self.repository, filename, revision=self.revision))
            except LocalEntryNotFoundError:  # no network, not a missing file
                raise
            except EntryNotFoundError:
                if filename == self.filenames[-1]:
                    raise
                continue
            # The cache names a large file by its SHA-256; the library itself compares sizes only.
            blob = path.resolve()
            if SHA256.fullmatch(blob.name) and file_digest(blob, "sha256") != blob.name:
                path.unlink()
                blob.unlink(missing_ok=True)
                raise HubError(
                    f"{self.name}: {filename} from {self.origin()} does not have the SHA-256 "
                    f"{blob.name} that its server states; the download is deleted, try again"
                )
            return path


def file_digest(path: Path, algorithm: str) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.new(algorithm)
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def fetch_all(sources: Sequence[WeightSource]) -> list[Path]:
    """The local files of all sources, downloading what is missing.

    Raises HubError that names every file still wanted, where it comes from and where it belongs, if
    the network is off or cannot be reached. That is asked once a server, briefly, before the first
    download: the libraries' own retries take most of a minute per file.
    """
    missing = [source for source in sources if source.cached() is None]
    reasons = _unreachable(missing)
    if reasons:
        raise HubError(_wanted(missing, "; ".join(reasons)))
    paths = []
    for source in sources:
        try:
            paths.append(source.fetch())
        except HubError:
            raise
        except Exception as error:  # each backend raises its own kinds, httpx's among them
            still = [s for s in missing if s.cached() is None]
            raise HubError(_wanted(still, f"{type(error).__name__}: {error}")) from error
    return paths


def fetch_config(source: WeightSource) -> Path:
    """The local file that says what a repository's network is, downloaded if need be; HubError
    where it cannot be had."""
    path = source.cached()
    if path is not None:
        return path
    [file] = source.filenames
    what = f"{source.name}: its {file}, which says what network it is,"
    reasons = _unreachable([source])
    if reasons:
        raise HubError(
            f"{what} is not in {source.place()} and cannot be downloaded: {'; '.join(reasons)}. "
            "Run once with a network, or name a copy of its folder as local-dir:PATH"
        )
    try:
        return source.fetch()
    except Exception as error:  # no such repository or file, or one that asks for a login
        text = str(error).strip().splitlines()
        reason = text[0] if text else type(error).__name__
        raise HubError(f"{what} cannot be had from {source.origin()}: {reason}") from error


def _unreachable(sources: Sequence[WeightSource]) -> list[str]:
    """Why the network cannot be used for these sources; empty if it can."""
    reasons = []
    if any(source.repository for source in sources):
        from huggingface_hub import constants, get_session

        if constants.HF_HUB_OFFLINE:
            reasons.append("offline mode is on (HF_HUB_OFFLINE)")
        else:
            try:
                get_session().head(constants.ENDPOINT, timeout=CONNECT_SECONDS)
            except Exception as error:  # requests' or httpx's, by the version of huggingface_hub
                reasons.append(f"{constants.ENDPOINT} cannot be reached ({error})")
    plain = [source for source in sources if source.repository is None]
    for server, source in {urlparse(source.url).netloc: source for source in plain}.items():
        try:
            request = urllib.request.Request(source.url, method="HEAD")
            urllib.request.urlopen(request, timeout=CONNECT_SECONDS).close()
        except urllib.error.HTTPError:  # it is there, and says no: the download will say to what
            continue
        except OSError as error:
            reasons.append(f"{server} cannot be reached ({getattr(error, 'reason', error)})")
    return reasons


def _wanted(sources: Sequence[WeightSource], reason: str) -> str:
    unique = {source.name: source for source in sources}.values()
    return "\n".join(
        [
            f"pre-trained weights are missing and cannot be downloaded: {reason}",
            *(f"    {source.wanted()}" for source in unique),
            "    Run once with a network, put the files there by hand (of a Hugging Face folder, "
            "the whole folder from a machine that has it), name a file that lies elsewhere as "
            "file/PATH?arch=NAME, or start from random weights with pretrained=False "
            "(--no-pretrained).",
        ]
    )
