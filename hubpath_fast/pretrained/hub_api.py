"""Saved models on the Hugging Face hub: finding, downloading and uploading one.

Of a repository only the format's own files are fetched, and of one expert only its file. What a
server answers is put into one sentence that says what to do. The library that speaks to the hub is
imported when it is needed: a model in a folder needs none of it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoints import CONFIG_FILE, INDEX_FILE, ROUTER_FILE, CheckpointError
from ..files import printable
from ..hub.aliases import REPOSITORY_PREFIX, canonical
from .saved import CARD_FILE

if TYPE_CHECKING:
    from ..model import HubPathway

WEIGHTS = ("model.safetensors", ROUTER_FILE, "experts/*.safetensors")
FILES = (CONFIG_FILE, INDEX_FILE, *WEIGHTS)
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def locate(
    name: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    expert: int | str | None = None,
) -> Path:
    """The folder of a saved model: ``name`` itself, or what ``download`` makes of a repository.

    name: a folder of this machine, which goes first, or of the hub "OWNER/NAME",
    "hf-hub:OWNER/NAME[@REVISION]", or its address. The rest: as of ``download``.

    Raises CheckpointError: neither a folder nor such a name, and as ``download``.
    """
    if str(name) and Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    text = canonical(str(name)).removeprefix(REPOSITORY_PREFIX)
    repository, _, own_revision = text.partition("@")
    if not REPOSITORY.fullmatch(repository):
        raise CheckpointError(
            f"{printable(str(name))!r} is neither a folder nor a repository of the Hugging Face "
            f"hub, which is named OWNER/NAME{_closest(Path(name))}"
        )
    try:
        return download(
            repository,
            revision=revision or own_revision or None,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
            expert=expert,
        )
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_closest(Path(name))}") from error.__cause__


def download(
    repository: str,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
    expert: int | str | None = None,
) -> Path:
    """The folder in the local cache that holds a repository's model, downloaded where it is not.

    Args:
        repository: "OWNER/NAME".
        revision: a branch, a tag or a commit; None: the default branch.
        cache_dir: None: the hub's own (HF_HOME).
        token: to read with; True, or None: the one of `hf auth login`, False: none.
        local_files_only: never ask the network.
        expert: its number or its label: of the weights, only its file is fetched. None: all.

    Without a network, what the cache has of the revision is taken, where that is all of it.

    Raises:
        CheckpointError: no such repository or revision, no right to read it, no network and not in
            the cache, a repository that holds no model of this package or lacks one of its files,
            no such expert.
    """
    asked = f"{repository}@{revision}" if revision else repository

    def fetch(patterns: Sequence[str]) -> Path:
        from huggingface_hub import snapshot_download

        with _in_one_sentence(asked, local_files_only):
            folder = snapshot_download(
                repository,
                revision=revision,
                cache_dir=cache_dir,
                token=token,
                local_files_only=local_files_only,
                allow_patterns=list(patterns),
            )
        return Path(folder)

    folder = fetch((CONFIG_FILE, INDEX_FILE))
    config, places = _read(folder, asked, CONFIG_FILE), None
    if (folder / INDEX_FILE).is_file():
        places = _places(_read(folder, asked, INDEX_FILE))
    if expert is None:
        folder = fetch(FILES)
        wanted = set(places.values()) if places else {WEIGHTS[0]}
    else:
        wanted = _files_of(expert, config, places, asked)
        folder = fetch((CONFIG_FILE, INDEX_FILE, *wanted))
    missing = sorted(name for name in wanted if not (folder / name).is_file())
    if missing:
        raise CheckpointError(
            f"{asked}: {missing[0]} is not there{_and_more(missing)}; "
            + (
                "the cache has only a part of the model: leave local_files_only out once"
                if local_files_only
                else "the repository lacks it, or the network went away: try again, or ask its "
                "owner to push the model again"
            )
        )
    return folder


def _places(index: Mapping[str, Any]) -> dict[str, str] | None:
    """The file of each tensor, of those too that are another one; None: it is no index, as whoever
    opens the folder will say."""
    places, aliases = index.get("weight_map"), _held(index, "metadata", "aliases") or {}
    if not isinstance(places, dict) or not isinstance(aliases, dict):
        return None
    return {**places, **{name: places[kept] for name, kept in aliases.items() if kept in places}}


def _files_of(
    expert: int | str, config: Mapping[str, Any], places: Mapping[str, str] | None, asked: str
) -> set[str]:
    """The files that hold an expert's tensors."""
    experts = _held(config, "model", "experts")
    labels = [entry.get("label") for entry in experts or [] if isinstance(entry, dict)]
    if not places or not labels:
        raise CheckpointError(f"{asked} holds no experts in files of their own; open it as a whole")
    known = isinstance(expert, int) and -len(labels) <= expert < len(labels)
    if not known and expert not in labels:
        raise CheckpointError(
            f"expert: expected a number in 0..{len(labels) - 1} or one of "
            f"{', '.join(map(str, labels))}, got {expert!r}"
        )
    number = expert % len(labels) if known else labels.index(expert)
    return {file for name, file in places.items() if name.startswith(f"experts.{number}.")}


def push(
    model: HubPathway,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
    **saved: Any,
) -> str:
    """See ``HubPathway.push_to_hub``. saved: classes, slim, result and licenses, as of
    ``save_model``."""
    from .hub_mixin import SavedModelOnHub
    from .save import save_model

    def write(folder: Path) -> None:
        save_model(model, folder, card=repository, **saved)

    return _push(SavedModelOnHub(write), repository, private, token, branch, commit_message)


def push_folder(
    folder: str | Path,
    repository: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Puts the files of a saved model, and its card, on the hub. Returns the commit's address.

    The rest: as of ``HubPathway.push_to_hub``.

    Raises CheckpointError: a folder that holds no saved model, a repository that cannot be written
    to.
    """
    from .hub_mixin import SavedModelOnHub

    folder = Path(folder)
    _read(folder, str(folder), CONFIG_FILE)

    def write(aside: Path) -> None:
        for pattern in (*FILES, CARD_FILE):
            for file in folder.glob(pattern):
                _link(file, aside / file.relative_to(folder))

    return _push(SavedModelOnHub(write), repository, private, token, branch, commit_message)


def check_repository(name: str) -> None:
    """Raises CheckpointError for what cannot be the name of one."""
    if not REPOSITORY.fullmatch(name):
        raise CheckpointError(
            f"repo_id: expected OWNER/NAME of the Hugging Face hub, got {printable(name)!r}"
        )


def _push(
    saved: Any,
    repository: str,
    private: bool | None,
    token: str | bool | None,
    branch: str | None,
    commit_message: str | None,
) -> str:
    check_repository(repository)
    with _in_one_sentence(repository, False, writing=True):
        if branch is not None:
            saved.make_branch(repository, branch, private, token)
        return str(
            saved.push_to_hub(
                repository,
                private=private,
                token=token,
                branch=branch,
                commit_message=commit_message or "A Hub-Pathway, saved by hubpath_fast",
                # Of an earlier push: experts that the hub no longer has. Files that stay the same
                # are not sent again.
                delete_patterns=[*WEIGHTS, INDEX_FILE],
            )
        )


def _link(file: Path, place: Path) -> None:
    """A link costs no bytes, whatever file system the temporary folder is on."""
    import shutil

    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        place.symlink_to(file.resolve())
    except OSError:  # Windows, without the right to
        shutil.copy2(file, place)


def _read(folder: Path, asked: str, name: str) -> dict[str, Any]:
    """A JSON file of a model of this package."""
    path = folder / name
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{asked} holds no model of hubpath_fast (no {name}); give one that "
            "model.save_pretrained or model.push_to_hub wrote"
        ) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{asked}: {name} is damaged ({error})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{asked}: {name} is damaged (it holds no object)")
    if name == CONFIG_FILE and "hubpath_format" not in held:
        kind = held.get("architecture") or held.get("model_type") or held.get("library_name")
        what = f"; it describes {kind!r}" if isinstance(kind, str) else ""
        raise CheckpointError(
            f"{asked} holds no model of hubpath_fast{what}; a model of timm's can be an expert of "
            f"a hub: {REPOSITORY_PREFIX}OWNER/NAME"
        )
    return held


def _held(values: Any, *keys: str) -> Any:
    for key in keys:
        values = values.get(key) if isinstance(values, dict) else None
    return values


@contextlib.contextmanager
def _in_one_sentence(asked: str, local_only: bool, writing: bool = False) -> Iterator[None]:
    """What the hub or the network says against it, as a CheckpointError that says what to do."""
    try:
        yield
    except Exception as error:  # of huggingface_hub, and of its transport, which varies by version
        text = _reason(error, asked, local_only, writing)
        if text is None:
            raise
        raise CheckpointError(text) from error


def _reason(error: Exception, asked: str, local_only: bool, writing: bool) -> str | None:
    """None: an error of something else."""
    from huggingface_hub import constants, errors

    right = "`hf auth login`, or token=, gives the right to"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.HFValidationError):
        return f"{asked} is no name of a repository, OWNER/NAME: {_first_line(error)}"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"{asked} is open only to those whom its owner lets in; ask for it on "
            f"{constants.ENDPOINT}/{asked.partition('@')[0]}, then {right} read it"
        )
    if writing and status in (401, 403):
        return f"{asked} cannot be written to with this token ({status}); {right} write it"
    if isinstance(error, errors.RevisionNotFoundError):
        name, _, revision = asked.partition("@")
        return f"{name} has no revision {revision or 'main'!r}; give a branch, a tag or a commit"
    if isinstance(error, errors.RepositoryNotFoundError) or status == 401:
        return (
            f"there is no repository {asked} on {constants.ENDPOINT}, or it is private; look at "
            f"its name, and {right} read a private one"
        )
    if isinstance(error, errors.LocalEntryNotFoundError):
        if local_only:
            why = "with local_files_only the network is not asked: leave it out once"
        elif constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: run once without it"
        else:
            why = f"{constants.ENDPOINT} cannot be reached: run once with a network"
        return (
            f"{asked} is not in the cache, or not all of it, and {why}, or name a folder that "
            "model.save_pretrained wrote"
        )
    if isinstance(error, (errors.HfHubHTTPError, errors.OfflineModeIsEnabled)):
        return f"{asked}: {constants.ENDPOINT} refuses ({_first_line(error)}); try again later"
    if type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests"):
        return f"{asked}: {constants.ENDPOINT} cannot be reached ({_first_line(error)})"
    return None


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _and_more(names: Sequence[str]) -> str:
    return f", nor {len(names) - 1} more" if len(names) > 1 else ""


def _closest(path: Path) -> str:
    """The folder beside it with the closest name, for a message; empty if there is none."""
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        folders = [f.name for f in path.expanduser().parent.iterdir() if f.is_dir()]
        for name in difflib.get_close_matches(path.name, folders, n=1):
            return f". Did you mean the folder {printable(str(path.parent / name))}?"
    return ""
