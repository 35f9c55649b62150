"""A replay's steps in files that are only ever added: a checkpoint writes what is new.

Steps never change once they are stored; only priorities and counters do. So the steps go into
chunks of at most ``STEPS``, and what changes goes, with the chunks' names and checksums, into the
manifest that the run's checkpoint keeps. The checkpoint decides what counts: a chunk that its
manifest does not name, from a save that was cut short, is nothing.

A chunk is a line of JSON (format, first step, count, shape of a frame, bytes and SHA-256 of what
follows) and one zlib stream: the frames, each but the first as its difference (exclusive or) from
the one before, which makes it smaller and faster to write; ``COLUMNS`` of the steps, one after
another; and the frames after those that are truncated.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints import CheckpointError
from ...files import remove_leftovers, sync, write_bytes
from .replay import PrioritizedReplay
from .ring import COLUMNS, TRUNCATED

FORMAT = "hubpath-replay-1"
STEPS = 5_000  # of a chunk, at most: 28 MB of packed frames at a time in memory
SUFFIX = ".chunk"
READ_ERRORS = (ValueError, KeyError, TypeError, AttributeError, IndexError, zlib.error)


class ReplayFiles:
    """The chunks of one run's replay, in a folder of their own, which nothing else writes to."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._chunks: list[dict[str, Any]] = []  # written so far and still of use
        self._lineage: object = None  # of the replay that they are of

    def save(self, replay: PrioritizedReplay) -> dict[str, Any]:
        """Writes the steps that are in no chunk yet, synced to the disk.

        No file that is there is changed or removed, so that the last checkpoint stays whole; once
        the next one is, call ``tidy``.

        Returns:
            The manifest, plain types and tensors, for ``load``.

        Raises:
            OSError: with its errno, such as ENOSPC; nothing of this save is left.
        """
        chunks = self._chunks if replay.lineage is self._lineage else []
        chunks = [chunk for chunk in chunks if _stop(chunk) > replay.oldest]
        start, written = _stop(chunks[-1]) if chunks else replay.oldest, []
        try:
            while start < replay.count:
                count = min(STEPS, replay.count - start)
                data = _encoded(start, replay.items(start, start + count))
                digest = hashlib.sha256(data).hexdigest()
                # Named by its contents: a chunk of another history never takes its place.
                name = f"{start:09d}-{digest[:16]}{SUFFIX}"
                if not (self.folder / name).exists():
                    written.append(name)
                chunk = {"name": name, "start": start, "count": count}
                write_bytes(self.folder / name, data)
                chunks.append(chunk | {"bytes": len(data), "sha256": digest})
                start += count
            if written:
                sync(self.folder)
                sync(self.folder.parent)
        except BaseException as error:
            for name in written:
                with contextlib.suppress(OSError):
                    (self.folder / name).unlink()
            if not isinstance(error, OSError):
                raise
            number = error.errno or errno.EIO
            raise OSError(
                number,
                f"cannot save the replay: {os.strerror(number)}; the last checkpoint is "
                "whole: make room and resume",
                str(self.folder),
            ) from error
        self._chunks, self._lineage = chunks, replay.lineage
        return {"format": FORMAT, "chunks": list(chunks), "state": replay.small_state()}

    def load(self, replay: PrioritizedReplay, manifest: Mapping[str, Any]) -> None:
        """Makes the replay equal to the saved one, to the bit. No file is changed.

        Raises:
            CheckpointError: a chunk is missing, cut short, damaged or of another run, by its name;
                or the manifest does not fit the replay, which is empty then.
        """
        replay.clear()
        try:
            if manifest["format"] != FORMAT:
                raise ValueError(f"its format is {manifest['format']!r}, this one reads {FORMAT!r}")
            chunks = [dict(chunk) for chunk in manifest["chunks"]]
            state = manifest["state"]
            oldest = state["count"] - len(state["priorities"])
            replay.restore(state, self._parts(chunks, oldest))
        except CheckpointError:
            raise
        except READ_ERRORS as error:
            reason = f"its manifest lacks {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"the replay of {self.folder.parent}: {reason}") from error
        self._chunks, self._lineage = chunks, replay.lineage

    def tidy(self, manifest: Mapping[str, Any]) -> None:
        """Deletes what a manifest does not name: chunks that were overwritten in the replay, and
        what saves left that were cut short. Only where its checkpoint is on the disk."""
        named = {chunk["name"] for chunk in manifest["chunks"]}
        for path in self.folder.glob(f"*{SUFFIX}"):
            if path.name not in named:
                path.unlink(missing_ok=True)
        remove_leftovers(self.folder)

    def _parts(self, chunks: list[dict[str, Any]], oldest: int) -> Iterator[dict[str, np.ndarray]]:
        """The steps of the chunks from the oldest stored on."""
        for chunk in chunks:
            path = self.folder / chunk["name"]
            items = _decoded(path, self._read(path, chunk))
            yield _without_first(items, max(0, oldest - chunk["start"]))

    def _read(self, path: Path, chunk: Mapping[str, Any]) -> bytes:
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise _unusable(path, "is missing") from None
        except OSError as error:
            raise _unusable(path, f"cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() == chunk["sha256"]:
            return data
        if len(data) < chunk["bytes"]:
            raise _unusable(path, f"is cut short: {len(data)} of {chunk['bytes']} bytes")
        other = _header(data) is not None
        raise _unusable(path, "is of another run" if other else "is damaged")


def _stop(chunk: Mapping[str, Any]) -> int:
    return chunk["start"] + chunk["count"]


def _unusable(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path} {what}; the replay cannot be resumed without it: restore the file from a copy, or "
        "start the run anew with another --out"
    )


def _encoded(start: int, items: Mapping[str, np.ndarray]) -> bytes:
    frames = items["frames"]
    changes = frames.copy()
    changes[1:] ^= frames[:-1]
    packer = zlib.compressobj(1)
    parts = [packer.compress(memoryview(changes).cast("B"))]
    for name, dtype in COLUMNS.items():
        parts.append(packer.compress(items[name].astype(dtype).tobytes()))
    parts.append(packer.compress(items["after"].tobytes()))
    payload = b"".join([*parts, packer.flush()])
    header = {
        "format": FORMAT,
        "start": start,
        "count": len(frames),
        "frame_shape": list(frames.shape[1:]),
        "bytes": len(payload),
        "sha256": hashlib.sha256(payload).hexdigest(),
    }
    return json.dumps(header).encode() + b"\n" + payload


def _decoded(path: Path, data: bytes) -> dict[str, np.ndarray]:
    header = _header(data)
    if header is None:
        raise _unusable(path, "is damaged")
    count, shape = header["count"], tuple(header["frame_shape"])
    raw = zlib.decompress(data[data.index(b"\n") + 1 :])
    end = count * int(np.prod(shape))
    frames = np.frombuffer(raw, np.uint8, end).reshape(count, *shape).copy()
    for before, frame in itertools.pairwise(
        frames
    ):  # bitwise_xor.accumulate takes 80 times as long
        frame ^= before
    items = {"frames": frames}
    for name, dtype in COLUMNS.items():
        items[name] = np.frombuffer(raw, dtype, count, end)
        end += items[name].nbytes
    items["after"] = np.frombuffer(raw, np.uint8, offset=end).reshape(-1, *shape)
    return items


def _without_first(items: Mapping[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
    """Items but for those of the first ``count`` steps."""
    truncated = int((items["ends"][:count] == TRUNCATED).sum())
    return {name: values[truncated if name == "after" else count :]
            for name, values in items.items()}  # fmt: skip


def _header(data: bytes) -> dict[str, Any] | None:
    """A chunk's header; None where it is no whole chunk."""
    head, _, payload = data.partition(b"\n")
    try:
        header = json.loads(head)
        whole = header["sha256"] == hashlib.sha256(payload).hexdigest()
        return header if whole and header["format"] == FORMAT else None
    except READ_ERRORS:
        return None
