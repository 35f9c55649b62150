"""Small real pictures to route over, out of two npm packages: emoji in 9 categories, two styles.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0
    python -m bench.emoji emoji-datasource-google-16.0.0.tgz \\
                          emoji-datasource-twitter-16.0.0.tgz --out emoji

Writes OUT/train|val|test/CATEGORY/STYLE-IMAGE.png, 3,812 pictures of 64 x 64 pixels with
transparency: the 1,906 emoji that both styles have, without variations of skin tone. Within each
category the emoji are put in the order of the SHA-256 of their code points; the first half is for
training, the next 15 % for validation, the rest for tests, so that an emoji is in the same split in
both styles and in every copy.

The pictures are Noto Emoji (Google, Apache-2.0) and Twemoji (Twitter and contributors, CC-BY 4.0),
the list of categories MIT (Cal Henderson).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubpath_fast.files import UNFINISHED

VERSION = "16.0.0"
PIXELS = 64
SPLITS = ("train", "val", "test")
TRAIN, VAL = 0.5, 0.15  # shares of a category's emoji
UNWANTED = "Component"  # swatches of skin tones
PNG_HEAD = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + PIXELS.to_bytes(4, "big") * 2
IMAGE_NAME = re.compile(r"[0-9a-f]+(?:-[0-9a-f]+)*\.png")
CATEGORY = re.compile(r"[A-Za-z]+(?: (?:& )?[A-Za-z]+)*")


@dataclass(frozen=True)
class Style:
    """One npm package: its name, the integrity that npm states for this version, its licence."""

    name: str
    integrity: str
    licence: str

    @property
    def package(self) -> str:
        return f"emoji-datasource-{self.name}"


STYLES = (
    Style(
        "google",
        "sha512-ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==",
        "Noto Emoji, Google, Apache-2.0",
    ),
    Style(
        "twitter",
        "sha512-7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==",
        "Twemoji, Twitter, Inc and other contributors, CC-BY 4.0",
    ),
)


@dataclass(frozen=True)
class Picture:
    """path: SPLIT, CATEGORY, file. data: of a PNG file."""

    path: tuple[str, str, str]
    data: bytes


def identify(paths: Sequence[Path], styles: Sequence[Style]) -> dict[Style, Path]:
    """Which file is which package; ValueError unless they are exactly those, to the last byte."""
    command = "npm pack " + " ".join(f"{style.package}@{VERSION}" for style in styles)
    known = {style.integrity: style for style in styles}
    found: dict[Style, Path] = {}
    for path in paths:
        if not path.is_file():
            raise ValueError(f"there is no file {path}; get it with `{command}`")
        with open(path, "rb") as file:
            sha512 = hashlib.sha512()
            while block := file.read(2**20):
                sha512.update(block)
        integrity = "sha512-" + base64.b64encode(sha512.digest()).decode()
        if integrity not in known:
            expected = ", ".join(f"{s.integrity} of {s.package}@{VERSION}" for s in styles)
            raise ValueError(
                f"{path} is cut short, changed, or another version: its integrity is {integrity}, "
                f"expected one of {expected}; get it with `{command}`"
            )
        found[known[integrity]] = path
    missing = [style.package for style in styles if style not in found]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: not given; get both with `{command}`")
    return {style: found[style] for style in styles}


def pictures(path: Path, style: Style, styles: Sequence[Style]) -> Iterator[Picture]:
    """The pictures of a package, read by the names in its list, wherever its archive says that they
    belong. Raises ValueError where the list and the archive do not fit together."""
    with tarfile.open(path) as archive:
        members = {member.name: member for member in archive.getmembers() if member.isfile()}

        def read(name: str) -> bytes:
            if f"package/{name}" not in members:
                raise ValueError(f"{path} has no file package/{name}")
            return archive.extractfile(members[f"package/{name}"]).read()

        for category, split, image in places(json.loads(read("emoji.json")), styles):
            if not IMAGE_NAME.fullmatch(image) or not CATEGORY.fullmatch(category):
                raise ValueError(f"{path}: {image!r} of {category!r} is no name of an emoji's file")
            data = read(f"img/{style.name}/{PIXELS}/{image}")
            if not data.startswith(PNG_HEAD):
                raise ValueError(f"{path}: {image} is no PNG of {PIXELS} x {PIXELS} pixels")
            folder = category.replace(" & ", " and ")
            yield Picture((split, folder, f"{style.name}-{image}"), data)


def places(emoji: Sequence[dict], styles: Sequence[Style]) -> Iterator[tuple[str, str, str]]:
    """(category, split, file) of each emoji that all styles have."""
    categories: dict[str, list[dict]] = {}
    for entry in emoji:
        drawn = all(entry[f"has_img_{style.name}"] for style in styles)
        if drawn and entry["category"] != UNWANTED:
            categories.setdefault(entry["category"], []).append(entry)
    for category, entries in categories.items():
        entries.sort(key=lambda entry: hashlib.sha256(entry["unified"].encode()).digest())
        train = round(TRAIN * len(entries))
        val = train + round(VAL * len(entries))
        for i, entry in enumerate(entries):
            yield category, SPLITS[(i >= train) + (i >= val)], entry["image"]


def write(found: dict[Style, Path], out: Path) -> Counter:
    """Writes the folder, whole or not at all; the number of pictures by (split, category).

    Raises ValueError if ``out`` is there already and is not an empty folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already; delete it, or give another folder as --out")
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}{UNFINISHED}")
    counts: Counter = Counter()
    try:
        for style, path in found.items():
            for picture in pictures(path, style, list(found)):
                file = aside.joinpath(*picture.path)
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(picture.data)
                counts[picture.path[:2]] += 1
        if out.exists():
            out.rmdir()  # empty; Windows replaces no folder
        os.replace(aside, out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return counts


def parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = argparse.ArgumentParser(
        prog="python -m bench.emoji",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", type=Path, nargs="+", metavar="PACKAGE.tgz")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    return parser, parser.parse_args(arguments)


def main(arguments: list[str] | None = None, styles: Sequence[Style] = STYLES) -> None:
    parser, args = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        counts = write(identify(args.packages, styles), args.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{'':<22}" + "".join(f"{split:>7}" for split in SPLITS))
    for category in sorted({category for _, category in counts}):
        row = "".join(f"{counts[split, category]:>7}" for split in SPLITS)
        print(f"{category:<22}{row}")
    print(f"{counts.total()} pictures in {args.out}")
    for style in styles:
        print(f"  {style.name}-*: {style.licence}")


if __name__ == "__main__":
    main()
