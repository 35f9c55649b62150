"""A face beside its mirror image, each landmark with its number: wrong pairs are seen at once."""

from __future__ import annotations

import io
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ...files import write_bytes
from .faces import Face
from .geometry import crop_matrix, transform_points
from .layouts import LandmarkLayout
from .windows import MARGIN, cut, find_place, read_crop

SIDE = 720  # pixels of each of the two pictures
HEAD = 34  # of the line above them
FIRST, SECOND, ALONE = (255, 196, 0), (0, 200, 255), (120, 255, 120)
DARK = (20, 20, 20)


def draw_pair(face: Face, layout: LandmarkLayout, file: Path) -> Path:
    """Writes a PNG: the crop of a face as networks see it, and the same mirrored, its pairs swapped
    as in training. Landmarks of a pair have two colours, which change places with the pairs.

    Raises OSError if it cannot be written.
    """
    image = face.pixels()
    window = cut(image, find_place(face, SIDE, 1.5, image.shape[2], image.shape[1]))
    mirrored = torch.tensor([False, layout.flip is not None])
    center = torch.tensor([face.center] * 2, dtype=torch.float64)
    scale = torch.tensor([face.scale] * 2, dtype=torch.float64)
    matrices = crop_matrix(center, scale, torch.zeros(2), SIDE, MARGIN, mirrored)
    points = transform_points(matrices, face.points.expand(2, -1, -1))
    titles = [f"{face.image} (line {face.line})", "mirrored: which change places is not known"]
    pictures = 1
    if layout.flip is not None:
        points[1] = points[1][list(layout.flip)]
        titles[1], pictures = (
            "mirrored, as in training: numbers lie as on the left, or pairs are wrong",
            2,
        )
    sheet = Image.new("RGB", (2 * SIDE, SIDE + HEAD), "white")
    for i in range(2):
        left = i * SIDE
        ImageDraw.Draw(sheet).text((left + 8, 8), titles[i], fill="black", font=_font(16))
        if i < pictures:
            crop = read_crop(window, matrices[i], SIDE, face.origin)
            picture = Image.fromarray(crop.permute(1, 2, 0).contiguous().numpy())
            _draw_points(picture, points[i].tolist(), layout)
            sheet.paste(picture, (left, HEAD))
    data = io.BytesIO()
    sheet.save(data, format="PNG")
    return write_bytes(file, data.getvalue())


def _draw_points(picture: Image.Image, points: list[list[float]], layout: LandmarkLayout) -> None:
    pen, font = ImageDraw.Draw(picture), _font(13 if len(points) < 100 else 10)
    flip = range(len(points)) if layout.flip is None else layout.flip
    for number, ((x, y), other) in enumerate(zip(points, flip, strict=True)):
        colour = ALONE if number == other else FIRST if number < other else SECOND
        pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour, outline=DARK)
        pen.text(
            (x + 5, y - 7), str(number), fill=colour, font=font, stroke_width=1, stroke_fill=DARK
        )


def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.load_default(size)
    except TypeError:  # Pillow before 10.1 has one size
        return ImageFont.load_default()
