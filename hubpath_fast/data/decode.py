"""Image files: decoding one, and finding the broken ones among many."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from .layouts import DataError, examples

CHECKING_THREADS = 8  # opening files waits for the disk, not for a core


def load_image(path: str | Path) -> Image.Image:
    """Decodes an image to RGB; DataError that names the path if it is broken or missing."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # see _problem
        raise DataError(f"cannot read the image {path} ({_reason(error)})") from error


def broken_images(paths: Sequence[Path], decode: bool = False) -> list[str]:
    """Opens every file and says of each that is broken which and why.

    decode: read all pixels, as training will. Otherwise PNG's checksums are all read; of a JPEG the
    header only, so that one that was cut short is found when ``load_image`` decodes it.
    """
    check = _undecodable if decode else _problem
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        return [problem for problem in pool.map(check, paths) if problem]


def verify_images(paths: Sequence[Path]) -> None:
    """Raises DataError if there are ``broken_images``."""
    problems = broken_images(paths)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} images cannot be read; replace or remove: "
            + examples(problems)
        )


def _problem(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ...
        return f"{path} ({_reason(error)})"
    return None


def _undecodable(path: Path) -> str | None:
    try:
        load_image(path)
    except DataError as error:
        return str(error).removeprefix("cannot read the image ")
    return None


def _reason(error: Exception) -> str:
    # PIL repeats the path in this one message.
    return "no image file" if isinstance(error, Image.UnidentifiedImageError) else str(error)
