"""Image files byte by byte, of kinds that Pillow reads but does not write."""

from __future__ import annotations

import struct
import zlib

TIFF_START = 8  # of the directory: right after the header


def png(path, width, depth, colour, row, *chunks):
    """One row of pixels. colour: 0 grey, 2 RGB, 3 palette, 4 and 6 with alpha. chunks: (name,
    bytes), before the pixels."""

    def chunk(name, data):
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts))
    return path


def tiff(path, width, row, bits, photometric=1, sample_format=1, order="<", extra=None):
    """One row of pixels of one channel, or of two with ``extra`` (1: the second is alpha that the
    first is multiplied by, 2: alpha as usual). photometric: 0: zero is white."""
    channels = 1 if extra is None else 2
    tags = {256: width, 257: 1, 258: bits, 259: 1, 262: photometric, 273: None, 277: channels,
            278: 1, 279: len(row), 339: sample_format}  # fmt: skip
    if extra is not None:
        tags |= {338: extra}
        tags.pop(339)
    pixels = TIFF_START + 2 + 12 * len(tags) + 4
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", TIFF_START)
    out += struct.pack(order + "H", len(tags))
    for tag, value in sorted(tags.items()):
        values = [bits] * channels if tag == 258 else [pixels if value is None else value]
        out += struct.pack(order + "HHI", tag, 3, len(values))
        out += struct.pack(order + "HH", *values, *[0] * (2 - len(values)))
    path.write_bytes(out + struct.pack(order + "I", 0) + row)
    return path


def gif(path, size, frame, colour, palette, transparent=None):
    """A still image of one colour that covers ``frame`` (left, top, width, height) of ``size``.

    colour and transparent: positions in ``palette``, 4 colours.
    """
    left, top, width, height = frame
    out = b"GIF89a" + struct.pack("<HHBBB", *size, 0x81, 0, 0) + bytes(sum(palette, ()))
    if transparent is not None:
        out += b"\x21\xf9\x04\x01\0\0" + bytes([transparent]) + b"\0"
    codes = [4, colour] * (width * height) + [5]  # clear before each pixel: codes stay of 3 bits
    packed = sum(code << 3 * i for i, code in enumerate(codes))
    data = packed.to_bytes((3 * len(codes) + 7) // 8, "little")
    out += b"\x2c" + struct.pack("<HHHHB", left, top, width, height, 0)
    path.write_bytes(out + b"\x02" + bytes([len(data)]) + data + b"\0;")
    return path
