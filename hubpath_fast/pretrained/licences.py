"""What the sources of a hub's experts state of their weights: the repository, and the licence.

Nothing is guessed: a licence that no source states is unknown. The network is not asked.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..hub.aliases import FILE_PREFIX, FOLDER_PREFIX, PACKAGE_PREFIX, REPOSITORY_PREFIX, canonical
from ..hub.errors import HubError
from ..hub.registry import find
from ..hub.source import HubModel
from ..hub.spec import ExpertSpec

UNKNOWN = "unknown"

# Of the licences that timm's models state, those that the Hugging Face hub knows by the same name;
# any other is "other" there, with a name of its own.
HUB_LICENCES = frozenset(
    ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "apple-ascl", "apple-amlr",
     "fair-noncommercial-research-license", "gemma")
)  # fmt: skip
SEVERAL = "licences-of-the-experts"  # the name of what is under several, or under unknown ones


class Weights(NamedTuple):
    """What an expert began with. name: of the weights, without a path of this machine. repository:
    on the Hugging Face hub, None: not there. licence: its name there, or an address; None: unknown.
    by: who states it, or why it is unknown."""

    name: str
    repository: str | None
    licence: str | None
    by: str


def weights_of(
    experts: Sequence[Mapping[str, Any]], given: Mapping[int | str, str] | None = None
) -> list[Weights]:
    """Of each expert of a model's description.

    given: licences by an expert's number or label, in place of what the sources state; ValueError
    for one that there is not.
    """
    given = dict(given or {})
    labels = [expert["label"] for expert in experts]
    unknown = [key for key in given if key not in labels and key not in range(len(labels))]
    if unknown:
        raise ValueError(
            f"licenses: expected experts by number, 0..{len(labels) - 1}, or label, "
            f"{', '.join(labels)}, got {unknown[0]!r}"
        )
    found = []
    for i, expert in enumerate(experts):
        weights = _stated(expert["spec"], expert["module"])
        licence = given.get(i, given.get(expert["label"]))
        if licence is not None:
            weights = weights._replace(licence=licence, by="stated by whoever saved the model")
        found.append(weights)
    return found


def metadata(weights: Sequence[Weights]) -> dict[str, Any]:
    """The fields of a card on licences and base models, as the Hugging Face hub defines them: it
    knows one licence for a model, and calls what comes of several base models a merge."""
    licences = {each.licence for each in weights}
    [licence] = licences if len(licences) == 1 else [None]
    if licence in HUB_LICENCES:
        found: dict[str, Any] = {"license": licence}
    else:
        found = {"license": "other", "license_name": SEVERAL}
        if licence is not None and licence.startswith("https://"):
            found["license_link"] = licence
        elif licence is not None:
            found["license_name"] = licence.lower().replace(" ", "-")
    bases = list(dict.fromkeys(each.repository for each in weights if each.repository))
    if bases:
        found["base_model"] = bases
        found["base_model_relation"] = "merge" if len(bases) > 1 else "finetune"
    return found


def _stated(text: str | None, module: str) -> Weights:
    if text is None:
        return Weights(f"a {module} of its author's own", None, None, "its author's own module")
    try:
        spec = ExpertSpec.parse(text)
    except HubError:
        return Weights(module, None, None, "a name that is not known here")
    name = canonical(spec.name)
    if name.startswith(FILE_PREFIX):
        architecture = f" of {spec.arch}" if spec.arch else ""
        return Weights(f"a local file{architecture}", None, None, "a local file states none")
    if name.startswith(REPOSITORY_PREFIX):
        return _of_repository(name.removeprefix(REPOSITORY_PREFIX))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a name that timm has changed
            model = find(spec)
    except HubError:
        shown = "a local folder" if name.startswith(FOLDER_PREFIX) else name
        return Weights(shown, None, None, "a name that is not known here")
    if name.startswith(FOLDER_PREFIX):
        licence = _licence_of(model.config)
        return Weights("a local folder", None, licence, "its config.json" if licence else SILENT)
    return _of_library(model)


SILENT = "its source states none"


def _of_library(model: HubModel) -> Weights:
    """Of a model that timm, torchvision or this package knows by name."""
    source, _, rest = model.name.partition("/")
    if source == "timm":
        from timm.models import get_pretrained_cfg

        repository = None if model.weights is None else model.weights.repository
        licence = _known(get_pretrained_cfg(rest.partition("@")[0]).license)
        return Weights(model.name, repository, licence, "timm" if licence else SILENT)
    if model.name.startswith(PACKAGE_PREFIX):
        licence = _known(model.weights.package.licence)
        return Weights(model.name, None, licence, "the package" if licence else SILENT)
    licence = None
    if source == "torchvision":
        from torchvision import models

        architecture, _, tag = rest.partition(".")
        licence = models.get_model_weights(architecture)[tag].meta.get("license")
    return Weights(model.name, None, licence, "torchvision" if licence else SILENT)


def _of_repository(text: str) -> Weights:
    """Of a repository of the Hugging Face hub, by what is in the cache."""
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = text.partition("@")
    if repository.startswith("timm/"):
        try:
            return _of_library(find(ExpertSpec(repository)))._replace(name=text)
        except HubError:
            pass  # none of timm's own: its files say
    path = try_to_load_from_cache(repository, "config.json", revision=revision or None)
    licence = None
    if isinstance(path, str):
        with open(path, encoding="utf-8") as file:
            licence = _licence_of(file.read())
    by = "its config.json" if licence else f"look at its page: {SILENT} where this machine sees it"
    return Weights(text, repository, licence, by)


def _licence_of(config: str) -> str | None:
    """What a ``config.json`` as timm writes it says."""
    try:
        content = json.loads(config)
    except ValueError:
        return None
    content = content if isinstance(content, dict) else {}
    settings = content.get("pretrained_cfg")
    stated = (settings if isinstance(settings, dict) else content).get("license")
    return _known(stated) if isinstance(stated, str) else None


def _known(licence: str | None) -> str | None:
    licence = (licence or "").strip().lower()
    return None if licence in ("", UNKNOWN) else licence
