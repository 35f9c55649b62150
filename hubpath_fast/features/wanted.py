"""Which models a shelf is to have: a list of names, in which wildcards stand for many.

timm/*resnet*.a1_in1k                              names of ``hubpath hub list``
file/snapshots/*.safetensors?arch=timm/resnet18    files of this machine
local-dir:models/*                                 folders
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Sequence

from ..hub.aliases import FILE_PREFIX, FOLDER_PREFIX, LOCAL, canonical, local_path
from ..hub.errors import HubError
from ..hub.names import WILDCARDS, closest, list_models
from ..hub.registry import find
from ..hub.source import HubModel
from ..hub.spec import HUBS, ExpertSpec, expand_names, split_names

BODY = (
    "name",
    "size",
    "mean",
    "std",
    "arch",
    "key",
    "prefix",
)  # of a spec: what features depend on


def read_names(names: str | Sequence[str], pretrained: bool) -> list[tuple[ExpertSpec, HubModel]]:
    """The models that are meant, each once, with what their sources know of them.

    Args:
        names: names with commas between, or a sequence of them; see ``ExpertSpec`` and above. What
            a spec says of fine-tuning is left out.
        pretrained: names that a wildcard finds are those of models with weights, and any other
            without is an error.

    Raises:
        HubError: all names that are unknown or read wrongly, wildcards that nothing matches, files
            that are not there, models without weights.
    """
    texts = split_names(names) if isinstance(names, str) else names
    found: dict[str, tuple[ExpertSpec, HubModel]] = {}
    problems: list[str] = []
    for text in expand_names([text.strip() for text in texts]):
        try:
            spec = ExpertSpec.parse(text)
            matches = _matches(spec)
            lacking = []
            for name in matches or [spec.name]:
                one, model = _resolved(dataclasses.replace(spec, name=name))
                lacks = _lacks_weights(model) if pretrained else None
                if lacks is None:
                    found[str(one)] = one, model
                else:
                    lacking.append(lacks)
            if len(lacking) == len(matches or [spec.name]):
                problems += lacking
        except HubError as error:
            problems += error.problems
    if problems:
        raise HubError(*problems)
    if not found:
        raise HubError("hub: nothing given; use --hub NAMES, as hubpath hub list lists them")
    return list(found.values())


def _matches(spec: ExpertSpec) -> list[str] | None:
    """The names that a name with wildcards stands for; None of one without. Raises HubError."""
    name = canonical(spec.name)
    if not any(mark in name for mark in WILDCARDS):
        return None
    if not name.startswith(LOCAL):
        found = [known for known in list_models(name) if known not in HUBS]
        hint = closest(name.strip("*"))
    else:
        prefix = FILE_PREFIX if name.startswith(FILE_PREFIX) else FOLDER_PREFIX
        path = local_path(name.removeprefix(prefix))
        if path.exists():  # a wildcard's sign may be one of a name
            return None
        found = [prefix + place for place in sorted(glob.glob(str(path)))]
        hint = f"expected files such as {path}, in {os.getcwd()}" if not path.is_absolute() else ""
        hint = hint or "look at the path"
    if not found:
        raise HubError(f"hub: nothing matches {spec.name!r}; {hint}")
    return found


def _resolved(spec: ExpertSpec) -> tuple[ExpertSpec, HubModel]:
    """A spec of the body alone, by its full name: of a path the absolute one, since a shelf is
    used from any folder."""
    kept = {name: getattr(spec, name) for name in BODY}
    model = find(ExpertSpec(**kept))
    name = canonical(spec.name)
    for prefix in LOCAL:
        if name.startswith(prefix):
            kept["name"] = prefix + os.path.abspath(local_path(name.removeprefix(prefix)))
            break
    else:
        kept["name"] = model.name
    own = ExpertSpec(**kept)
    return own, find(own)


def _lacks_weights(model: HubModel) -> str | None:
    if model.weights is None:
        return (
            f"{model.name} has no pre-trained weights; take another name, or random weights for "
            "all with --no-pretrained"
        )
    return model.weights.problem()
