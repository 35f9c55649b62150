"""Image files: decoding one as a viewer shows it, and finding the broken ones among many.

``load_image`` is the only way from a file to pixels: training, evaluation, prediction, caches and
checks all read by it. Its rules hold for an image by itself, never by its own darkest and brightest
pixel, which would make two different images alike.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from .layouts import DataError, examples

PILLOW = re.compile(r"PIL\.")  # its modules
CHECKING_THREADS = 8  # opening files waits for the disk, not for a core
BACKGROUND = (255, 255, 255)  # under transparent pixels: white, as on a page and in most viewers

# Pillow's own conversion cuts these off at 255.
DEEP = ("I;16", "I;16L", "I;16B", "I;16N", "I", "F")
# Of other formats Pillow does not tell whether 16 bits are signed, or how many of them are used.
DEEP_FORMATS = ("PNG", "PPM", "TIFF", "JPEG2000")
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # their values

TURNS = {  # what undoes EXIF's orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PLAIN = "save it with 8 or 16 bits a pixel, white being 255 or 65535"


def load_image(path: str | Path, upright: bool = True) -> Image.Image:
    """Decodes an image file to 8-bit RGB, as a viewer shows it.

    - Turned upright, as EXIF's orientation says; EXIF that is damaged is passed over. With
      ``upright=False`` pixels stay where they are stored.
    - Transparent pixels, by an alpha channel, a palette's or a transparent colour, are laid on
      white.
    - Grey of 16 bits is divided by 257 and rounded (of a 12-bit TIFF by 4095 / 255; PGM by its
      largest value); of colours with 16 bits a channel the upper 8 are taken. Floating point from 0
      to 1 is multiplied by 255 and rounded. A TIFF in which 0 is white is inverted.
    - Palettes, CMYK, YCbCr and Lab are converted by Pillow; embedded colour profiles are not
      applied.
    - Of an animation the first frame (of an APNG the still image), of several pages the first.

    Raises DataError, with the path, for a file that is broken, missing or no image; for integers of
    32 bits or with a sign and for floating point beyond 0..1, of which no rule says what is white.
    """
    _hush()
    try:
        with Image.open(path) as image:
            return _upright(image, _rgb(image)) if upright else _rgb(image)
    except Exception as error:  # PIL raises many kinds: OSError, SyntaxError, struct.error, ...
        raise DataError(f"cannot read the image {path} ({_reason(path, error)})") from error


def broken_images(paths: Sequence[Path], decode: bool = False) -> list[str]:
    """Opens every file and says of each that ``load_image`` would refuse which and why.

    decode: read all pixels, as training will. Otherwise PNG's checksums are all read, and images
    that are refused for their range; of a JPEG the header only, so that one that was cut short is
    found when ``load_image`` decodes it.
    """
    with ThreadPoolExecutor(CHECKING_THREADS) as pool:
        problems = pool.map(lambda path: why_broken(path, decode), paths)
        return [problem for problem in problems if problem]


def why_broken(path: Path, decode: bool = False) -> str | None:
    """What ``broken_images`` says of one file; None of a whole one."""
    return (_undecodable if decode else _problem)(path)


def verify_images(paths: Sequence[Path]) -> None:
    """Raises DataError if there are ``broken_images``."""
    problems = broken_images(paths)
    if problems:
        raise DataError(
            f"{len(problems)} of {len(paths)} images cannot be read; replace or remove: "
            + examples(problems)
        )


def _problem(path: Path) -> str | None:
    _hush()
    try:
        with Image.open(path) as image:
            if image.mode not in DEEP and not _signed(image):
                image.verify()
                return None
    except Exception as error:
        return f"{path} ({_reason(path, error)})"
    return _undecodable(path)


def _undecodable(path: Path) -> str | None:
    try:
        load_image(path)
    except DataError as error:
        return str(error).removeprefix("cannot read the image ")
    return None


def _rgb(image: Image.Image) -> Image.Image:
    """The pixels of an open file as RGB, as they are stored: not turned."""
    if image.mode in DEEP or _signed(image):
        return _scaled(image)
    if image.mode == "RGB" and "transparency" not in image.info:  # nearly all files
        image.load()
        return image.copy() if image.readonly else image  # a map of the file, or pixels of its own
    if image.mode == "La":  # of which Pillow has no other conversion
        image = image.convert("LA")
    outside = _outside(image)
    _mend_transparent_colour(image)
    rgb = _on_background(image) if _transparent(image) else image.convert("RGB")
    if outside is not None:
        rgb.paste(BACKGROUND, mask=outside)
    return rgb


def _transparent(image: Image.Image) -> bool:
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        return True
    return image.mode == "P" and image.palette is not None and image.palette.mode == "RGBA"


def _on_background(image: Image.Image) -> Image.Image:
    image.load()  # may tell another mode than the head did: an ICNS without alpha says RGBA
    if image.mode != "RGBA":
        image = image.convert("RGBA")
    if image.getchannel("A").getextrema() == (255, 255):  # as of screenshots, and quicker
        return image.convert("RGB")
    rgb = Image.new("RGB", image.size, BACKGROUND)
    rgb.paste(image, mask=image)
    return rgb


def _mend_transparent_colour(image: Image.Image) -> None:
    """A PNG's transparent colour in 8 bits: Pillow scales pixels of 2, 4 and 16 bits, not it."""
    colour = image.info.get("transparency")
    if image.format != "PNG" or image.mode not in ("L", "RGB") or colour is None:
        return
    stored = str(image.tile[0][3]) if image.tile else ""
    if stored in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if stored == "L;2" else 17)
    elif "16" in stored:
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _outside(image: Image.Image) -> Image.Image | None:
    """A mask of what a GIF's first frame leaves of the canvas: nothing is drawn there, where Pillow
    has the palette's first colour. None: it covers all."""
    if image.format != "GIF" or not image.tile:
        return None
    frame = image.tile[0][1]
    if frame == (0, 0, *image.size):
        return None
    mask = Image.new("L", image.size, 255)
    mask.paste(0, frame)
    return mask


def _signed(image: Image.Image) -> bool:
    return SIGNED in getattr(image, "tag_v2", {}).get(SAMPLE_FORMAT, ())


def _scaled(image: Image.Image) -> Image.Image:
    """RGB of grey values with more than 8 bits; ValueError where no rule says what is white."""
    tags, transparent = getattr(image, "tag_v2", {}), image.info.get("transparency")
    pixels = np.asarray(image)
    grey = _from_floats(pixels) if image.mode == "F" else _from_integers(image, pixels, tags)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        grey = 255 - grey
    if isinstance(transparent, int):
        grey[pixels == transparent] = BACKGROUND[0]
    return Image.fromarray(grey).convert("RGB")


def _from_floats(pixels: np.ndarray) -> np.ndarray:
    low, high = pixels.min(), pixels.max()
    if low >= 0 and high <= 1:  # not if there is a NaN
        return np.rint(pixels * np.float32(255)).astype(np.uint8)
    found = "with NaN" if np.isnan(low) else f"from {low:g} to {high:g}"
    raise ValueError(
        f"mode F, floating point {found}: only where all are from 0 to 1 is it known what is "
        f"white; scale it so, or {PLAIN}"
    )


def _from_integers(image: Image.Image, pixels: np.ndarray, tags) -> np.ndarray:
    bits = tags.get(BITS, (16,))[0]  # a TIFF says how many; the other formats are read as 16
    kind = None
    if _signed(image):
        kind = "signed integers"
    elif bits > 16:
        kind = f"integers of {bits} bits"
    elif image.format not in DEEP_FORMATS:
        kind = f"integers of a {image.format} file"
    if kind is not None:
        raise ValueError(
            f"mode {image.mode}, {kind}, here from {pixels.min()} to {pixels.max()}: nothing says "
            f"which is white; {PLAIN}"
        )
    white = 2**bits - 1
    return ((pixels.astype(np.uint32) * 510 + white) // (2 * white)).astype(np.uint8)


def _upright(image: Image.Image, rgb: Image.Image) -> Image.Image:
    """The pixels turned as the file says. Pillow has turned a TIFF already."""
    try:
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # of damaged EXIF, which says nothing of the pixels
        turn = None
    rgb.info.clear()  # else the orientation would be there to be applied once more
    return rgb if turn is None else rgb.transpose(turn)


def _hush() -> None:
    """Ignores Pillow's warnings, of which damaged EXIF gives one a file, in every worker.

    A filter that stays: ``catch_warnings`` around each image is not safe in threads, and makes
    Python repeat all other warnings that are shown once.
    """
    if ("ignore", None, Warning, PILLOW, 0) not in warnings.filters:
        warnings.filterwarnings("ignore", module=PILLOW.pattern)


def _reason(path: str | Path, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:  # repeats the path, too
        if os.path.islink(path) and not os.path.exists(path):
            return f"a link to {os.readlink(path)}, which is not there"
        return error.strerror or str(error)
    if isinstance(error, Image.UnidentifiedImageError):  # repeats the path
        return _unidentified(path)
    if isinstance(error, MemoryError):
        return "not enough memory to decode it"
    if isinstance(error, Image.DecompressionBombError):
        return f"{error} Make it smaller"
    return str(error) or type(error).__name__


def _unidentified(path: str | Path) -> str:
    """What a file is that Pillow does not open, as far as its first bytes tell."""
    try:
        with open(path, "rb") as file:
            start = file.read(32)
    except OSError:
        start = b"?"
    if not start:
        return "an empty file"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS in place of the file; run `git lfs pull`"
    if start[4:8] == b"ftyp":
        return "a video, or HEIC, which Pillow does not read; convert it to JPEG or PNG"
    if start[:4] in (b"II*\0", b"MM\0*"):
        return f"a TIFF with pixels that Pillow does not read; {PLAIN}"
    return "no image file"
