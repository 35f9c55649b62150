"""A model's name, or a file's, as other tools and pages write it, in the form of ``registry``.

    hf-hub:timm/NAME, hf_hub:..., https://huggingface.co/timm/NAME  ->  hf-hub:timm/NAME
    torchvision.models.resnet50, ResNet50_Weights.IMAGENET1K_V2     ->  torchvision/...
    file:///PATH                                                    ->  file//PATH
    package/Some_Name                                               ->  package/some-name

This module imports neither timm nor torchvision.
"""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote

FILE_PREFIX, FOLDER_PREFIX, REPOSITORY_PREFIX = "file/", "local-dir:", "hf-hub:"
PACKAGE_PREFIX = "package/"
LOCAL = (FILE_PREFIX, FOLDER_PREFIX)
ADDRESS = re.compile(
    r"(?:hf[-_]hub:|(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/)", re.IGNORECASE
)
BEHIND_REPOSITORY = re.compile(r"(?:/(?:tree|blob|resolve)/.*|/+)$")  # a page of its files
MODULE = re.compile(r"(timm|torchvision)(?:\.models\.|[.:])|models\.", re.IGNORECASE)
SECTION = re.compile(r"(?:segmentation|detection)\.")


def canonical(name: str) -> str:
    """The name in the registry's form, without spaces around; one of another form as it is."""
    name = name.strip()
    if name.startswith("file://"):
        path = unquote(name.removeprefix("file://").removeprefix("localhost"))
        return FILE_PREFIX + re.sub(r"^/(?=[A-Za-z]:)", "", path)  # /C:/x of Windows
    if name.startswith(LOCAL):
        return name
    if name.startswith(PACKAGE_PREFIX):
        return PACKAGE_PREFIX + distribution(name.removeprefix(PACKAGE_PREFIX))
    address = ADDRESS.match(name)
    if address:
        return REPOSITORY_PREFIX + BEHIND_REPOSITORY.sub("", name[address.end() :])
    module = MODULE.match(name)
    if module:
        source = (module[1] or "torchvision").lower()
        return f"{source}/" + SECTION.sub("", name[module.end() :])
    if "/" not in name and "_Weights" in name:
        return "torchvision/" + name
    return name


def distribution(name: str) -> str:
    """A Python distribution's name in the one form of its many that installers compare."""
    return re.sub(r"[-_.]+", "-", name).lower()


def local_path(text: str) -> Path:
    """A path of this machine: "~" replaced, and in the Unicode form that its files have, since two
    forms of one name look alike."""
    path = Path(text).expanduser()
    if not path.exists():
        for form in ("NFC", "NFD"):
            other = Path(unicodedata.normalize(form, str(path)))
            if other.exists():
                return other
    return path
