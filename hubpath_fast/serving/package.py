"""What an exported package says of itself, inside its own file.

A .pt2 file is a zip archive, and ``hubpath.json`` an entry of it (``torch.export.load`` gives it as
``extra_files``); an .onnx file has it among its metadata (``custom_metadata_map`` of onnxruntime),
under the key "hubpath". It is appended once the package was compared with its model, so that not a
byte of what was compared changes.
"""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch

from ..serve import torch_numbers

VERSION = 1
ENTRY, KEY = "hubpath.json", "hubpath"


def append_about(path: Path, format: str, about: dict[str, Any]) -> None:
    """Writes into a package what it says of itself, behind all that is there, and syncs it."""
    text = json.dumps(about, indent=2)
    if format == "onnx":
        from .onnx_file import metadata  # onnx is an extra

        with open(path, "ab") as file:
            file.write(metadata(KEY, text))
    else:
        with zipfile.ZipFile(path, "a") as archive:
            root = archive.namelist()[0].partition("/")[0]
            archive.writestr(f"{root}/extra/{ENTRY}", text)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def read_package(path: str | Path) -> dict[str, Any]:
    """What a package that ``export`` wrote says of itself; see ``export``. Nothing of it is run.

    Raises:
        ValueError: no such package, one that is damaged, or one that a newer torch made than the
            one that is here, which may not load it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: expected a package of `hubpath export`, found no file")
    try:
        about = _read(path)
        made_by = about["versions"]["torch"]
        version = about["hubpath_package"]
    except (KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path}: expected a package of `hubpath export`, which says what it is in its "
            f"{ENTRY}; got a file without it, or a damaged one ({error})"
        ) from error
    if version > VERSION:
        raise ValueError(
            f"{path}: it says what it is in version {version}, this hubpath_fast reads up to "
            f"{VERSION}; update hubpath_fast"
        )
    if about["format"] != "onnx" and torch_numbers(made_by) > torch_numbers(torch.__version__):
        raise ValueError(
            f"{path} was made by torch {made_by}, here is torch {torch.__version__}, which may not "
            f"load it; update torch, or export again with this one"
        )
    return about


def _read(path: Path) -> dict[str, Any]:
    if path.suffix == ".onnx":
        from .onnx_file import read_metadata

        return json.loads(read_metadata(path, KEY))
    with zipfile.ZipFile(path) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(f"/extra/{ENTRY}")]
        return json.loads(archive.read(name))
