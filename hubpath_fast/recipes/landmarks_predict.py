"""``hubpath landmarks predict``: the landmarks of faces in photographs, whose boxes are given."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import torch
from PIL import ImageDraw
from torch import Tensor

from ..data import DataError
from ..data.decode import load_image
from ..data.given import Given
from ..data.kinds import DRAWN
from ..files import printable, write_text
from ..runs import measure
from ..runs.folder import Run
from ..tasks.landmarks.faces import CELL, DEFAULT_REACH, Face
from ..tasks.landmarks.geometry import PIXELS_PER_SCALE, crop_matrix, invert, transform_points
from ..tasks.landmarks.photos import look, read_face_image
from ..tasks.landmarks.task import EMPTY
from ..tasks.landmarks.windows import MARGIN, cut, find_place, read_crop
from .predict import stacked

BATCH = 16  # crops at a time
LARGEST = 10  # sides of the photograph that a box may have: a larger crop shows next to nothing
WHOLE = "image"  # a box that is the whole photograph
POINTS = "points.csv"
COLUMNS = ("image", "name", "x", "y", "confidence")
FOUND, LOST, BOX = (0, 230, 118), (255, 82, 82), (255, 214, 0)

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class FacePoints:
    """What a run finds in a photograph.

    given: its path, as it was given. box: x0, y0, x1, y1. points: float64 [L, 2], x before y, and
    confidence: float32 [L], the maximum of each map. All in pixels of the photograph as viewers
    show it, with 0 for the centre of the first. experts: who spoke with what weight, largest first.
    note: what to know of it. error: why there is nothing; then the others are None or empty.
    """

    given: str
    box: Box | None = None
    points: Tensor | None = field(default=None, repr=False, compare=False)
    confidence: Tensor | None = field(default=None, repr=False, compare=False)
    experts: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None
    error: str | None = None

    @property
    def empty(self) -> int:
        """How many maps have no value that says anything."""
        return 0 if self.confidence is None else int((~(self.confidence >= EMPTY)).sum())


def read_box(text: str) -> Box | None:
    """ "30,40,210,260" -> (30, 40, 210, 260); None of "image".

    Raises ValueError unless it is four numbers, x0 < x1 and y0 < y1.
    """
    if text.strip().lower() == WHOLE:
        return None
    wanted = f"expected x0,y0,x1,y1 in pixels, such as 30,40,210,260, or {WHOLE}"
    parts = text.split(",")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        raise ValueError(f"box: {wanted}, got {text!r}") from None
    if len(numbers) != 4:
        raise ValueError(f"box: {wanted}, got {len(numbers)} numbers, {text!r}")
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"box: {wanted}, got {text!r}")
    x0, y0, x1, y1 = numbers
    if x0 >= x1 or y0 >= y1:
        raise ValueError(
            f"box: expected x0,y0,x1,y1 with x0 < x1 and y0 < y1, got the empty box {text!r}"
        )
    return x0, y0, x1, y1


def boxes_of(texts: Sequence[str], photos: int) -> list[Box | None]:
    """A box for each photograph: one for all, or one for each in turn.

    Raises ValueError for another number of boxes, none, or one that is none.
    """
    if not texts:
        raise ValueError(
            "box: nothing given, and a run finds the points of a face, not the face; give --box "
            f"x0,y0,x1,y1 of a tight box around the points, or --box {WHOLE} where a face fills "
            "the photograph"
        )
    boxes = [read_box(text) for text in texts]
    if len(boxes) == 1:
        return boxes * photos
    if len(boxes) != photos:
        raise ValueError(
            f"box: expected one for all {photos} photographs or one for each, got {len(boxes)}"
        )
    return boxes


def predict_landmarks(
    run: Run,
    images: Iterable[str | Path | Given],
    boxes: Iterable[Box | None],
    expert_major: bool = False,
) -> Iterator[FacePoints]:
    """Finds the landmarks of a face in each photograph, a batch at a time; one that cannot be read,
    or whose box lies outside, has its ``error``, and the others are answered.

    run: of landmarks, of ``open_run``. boxes: x0, y0, x1, y1, one a photograph, as tight around the
    landmarks as those of the faces that the run was trained on; None: the whole photograph.
    expert_major: see ``predict_each``.
    """
    device = str(run.device)
    size, names = run.image_size, run.names
    at_once = measure.images_at_once(run.model, run.task, size) if expert_major else BATCH
    cut = (_cut(image, box, size) for image, box in zip(images, boxes, strict=True))
    while part := list(islice(cut, at_once)):
        crops = [crop for _, crop, _ in part if crop is not None]
        faces = [(face, matrix) for face, _, matrix in part]
        del part  # with its crops, which are stacked
        answers: Iterator[tuple[Tensor, Tensor]] = iter(())
        if crops:
            batches, amp = stacked(crops, BATCH), run.config.trainer.amp
            answers = zip(
                *measure.predict(run.model, run.task, batches, device, amp, expert_major),
                strict=True,
            )
        for face, matrix in faces:
            if matrix is None:
                yield face
                continue
            found, weights = next(answers)
            in_crop = CELL * found[None, :, :2].double()
            points = transform_points(invert(matrix), in_crop)[0]
            asked = [i for i in weights.argsort(descending=True).tolist() if weights[i] > 0]
            spoke = {names[i]: weights[i].item() for i in asked}
            yield FacePoints(face.given, face.box, points, found[:, 2], spoke, face.note)


def _cut(
    image: str | Path | Given, box: Box | None, size: int
) -> tuple[FacePoints, Tensor | None, Tensor | None]:
    """(the face without its points, its crop uint8 [3, S, S], the matrix [1, 2, 3]); the last
    two are None where there is an error."""
    path, problem = image if isinstance(image, Given) else (str(image), None)
    if problem is not None:
        return FacePoints(path, error=f"{path}: {problem}"), None, None
    try:
        pixels = read_face_image(path, upright=True)
        note = _turned(path)
    except DataError as error:
        return FacePoints(path, error=str(error)), None, None
    height, width = pixels.shape[1:]
    if box is None:
        box = (-0.5, -0.5, width - 0.5, height - 0.5)
    problem = _no_box(box, width, height)
    if problem is not None:
        return FacePoints(path, error=f"{path}: {problem}"), None, None
    x0, y0, x1, y1 = box
    center, scale = ((x0 + x1) / 2, (y0 + y1) / 2), max(x1 - x0, y1 - y0) / PIXELS_PER_SCALE
    face = Face(path, torch.zeros(0, 2), center, scale, Path(path), Path(path), 0)
    matrix = crop_matrix([center], [scale], [0.0], size, MARGIN)
    # Read as evaluation reads it, to the bit.
    window = cut(pixels, find_place(face, size, DEFAULT_REACH, width, height))
    return FacePoints(path, box, note=note), read_crop(window, matrix[0], size, 0), matrix


def _no_box(box: Box, width: int, height: int) -> str | None:
    """Why no face can be in a box of a photograph of this size; None if one can."""
    x0, y0, x1, y1 = box
    named = f"the box {x0:g},{y0:g},{x1:g},{y1:g}"
    photograph = f"the photograph of {width} x {height} pixels"
    if x1 <= -0.5 or y1 <= -0.5 or x0 >= width - 0.5 or y0 >= height - 0.5:
        return f"{named} lies outside {photograph}"
    side, most = max(x1 - x0, y1 - y0), LARGEST * max(width, height)
    if not 1 <= side <= most:
        return f"{named} has {side:g} pixels a side, expected 1 to {most} in {photograph}"
    return None


def _turned(path: str) -> str | None:
    orientation = look(Path(path)).orientation
    if orientation == 1:
        return None
    return (
        f"{path} has an EXIF orientation ({orientation}): it was turned upright, and its box and "
        "points are those of the photograph as viewers show it"
    )


def face_text(face: FacePoints, drawn: Path) -> str:
    """What was found, on one line."""
    experts = ", ".join(f"{name} {weight:.2f}" for name, weight in face.experts.items())
    lost = f", {face.empty} of them in empty maps" if face.empty else ""
    mean = face.confidence.mean().item()
    return (
        f"{face.given}: {len(face.points)} points{lost}, mean confidence {mean:.2f}; experts: "
        f"{experts}; drawn in {drawn}"
    )


def write_points(faces: Iterable[FacePoints], names: Sequence[str], path: Path) -> Path:
    """A CSV with a row a landmark of each face that was found, in their order: image, name, x, y
    and confidence."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for face in faces:
        if face.points is None:
            continue
        rows = zip(names, face.points.tolist(), face.confidence.tolist(), strict=True)
        for name, (x, y), confidence in rows:
            writer.writerow([face.given, name, f"{x:.3f}", f"{y:.3f}", f"{confidence:.4f}"])
    return write_text(path, printable(out.getvalue()))


def draw_points(face: FacePoints, folder: Path, taken: set[Path]) -> Path:
    """Writes the photograph with its box and points into ``folder``; returns the file.

    Points are green, red where the map says nothing. taken: files that must not be written over,
    the photographs and the pictures so far; the new one is added.
    """
    picture = load_image(face.given)
    draw = ImageDraw.Draw(picture)
    x0, y0, x1, y1 = face.box
    side = max(x1 - x0, y1 - y0)
    draw.rectangle((x0, y0, x1, y1), outline=BOX, width=max(1, round(side / 200)))
    radius = max(2, round(side / 100))  # smaller circles are not round
    for (x, y), confidence in zip(face.points.tolist(), face.confidence.tolist(), strict=True):
        column, row = round(x), round(y)
        circle = (column - radius, row - radius, column + radius, row + radius)
        draw.ellipse(circle, fill=FOUND if confidence >= EMPTY else LOST, outline=(0, 0, 0))
    path = _free(folder, Path(face.given).stem, taken)
    taken.add(path.resolve())
    picture.save(path)
    return path


def _free(folder: Path, stem: str, taken: set[Path]) -> Path:
    number = 1
    while True:
        path = folder / f"{stem}{'' if number == 1 else f'-{number}'}{DRAWN}"
        if path.resolve() not in taken:
            return path
        number += 1
