"""What a file or a folder is, by its name: an image, what a system left, what ``hubpath`` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from PIL import Image, features

from ..locks import LOCK
from ..written import find_written, held_in

# Kinds that Pillow knows, but that are no photographs, or that it needs other programs to read.
NOT_READ = {
    "BUFR", "EPS", "FLI", "FTEX", "GBR", "GRIB", "HDF5", "IPTC", "MPEG", "PALM", "PDF", "PSD",
    "WMF",
}  # fmt: skip
CODECS = {"AVIF": "avif", "JPEG2000": "jpg_2000", "WEBP": "webp"}  # that a Pillow may lack

# Notes, tables and annotations: no images, whatever they hold.
TEXT_ENDINGS = {
    ".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".md", ".rst", ".html", ".htm", ".yaml",
    ".yml", ".toml", ".log", ".ini", ".cfg", ".py", ".ipynb", ".sh", ".bat", ".url",
}  # fmt: skip
# What systems and other tools leave, in lower case.
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r", "picasa.ini"}
SYSTEM_FOLDERS = {
    "__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found", "system volume information",
    ".appledouble", ".spotlight-v100", ".trash", ".trashes", ".fseventsd", ".thumbnails",
    "__pycache__", ".ipynb_checkpoints", ".git", ".svn", ".dvc",
}  # fmt: skip

DRAWN = "_points.png"  # ends the names of what `hubpath landmarks predict` draws
LOCK_KEYS = {"pid", "host", "since"}


@lru_cache(maxsize=1)
def image_endings() -> frozenset[str]:
    """The endings, in lower case, of the images that this Pillow decodes and we read."""
    Image.init()
    lacking = {kind for kind, codec in CODECS.items() if not features.check(codec)}
    return frozenset(
        ending
        for ending, kind in Image.registered_extensions().items()
        # Pillow opens MPO (several JPEGs in a file) as JPEG.
        if (kind in Image.OPEN or kind == "MPO") and kind not in NOT_READ | lacking
    )


def is_image(path: Path) -> bool:
    return path.suffix.lower() in image_endings() and not path.name.startswith(".")


def is_system_file(path: Path) -> bool:
    """Whether a system left it, such as ``._x.jpg`` beside ``x.jpg``; so are hidden files, unless
    they are called like images."""
    name = path.name.lower()
    hidden_image = path.suffix.lower() in image_endings() and not name.startswith("._")
    return name in SYSTEM_FILES or (name.startswith(".") and not hidden_image)


def is_system_folder(path: Path) -> bool:
    name = path.name.lower()
    return name in SYSTEM_FOLDERS or name.startswith(".trash-")


def is_output(folder: Path, names: Iterable[str]) -> bool:
    """Whether ``hubpath`` wrote this folder, which holds these names: its figures are no images
    of the user's."""
    names = set(names)
    if find_written(folder, names) is not None:
        return True
    if LOCK in names and held_in(folder / LOCK, LOCK_KEYS) is not None:  # one that begins
        return True
    if "points.csv" in names and any(name.endswith(DRAWN) for name in names):
        return True
    trained = "log.jsonl" in names and bool(names & {"last", "best", "tensorboard"})
    return trained or {"report.html", "figures"} <= names


def missing_ending(path: Path) -> str | None:
    """What an image without an ending should end in; None if it is no image."""
    try:
        with Image.open(path) as image:
            kind = (image.format or "").lower()
    except Exception:  # Pillow raises many kinds; whatever it is, it is not known to be an image
        return None
    return {"jpeg": ".jpg", "tiff": ".tif"}.get(kind, f".{kind}")
