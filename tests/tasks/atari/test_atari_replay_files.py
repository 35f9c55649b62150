"""The files of a replay: what is written, what a crash or damage does, and that nothing is lost."""

from __future__ import annotations

import copy
import errno
import functools
import io
import json
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from support.replays import SHAPE, Steps, filled

from hubpath_fast import files as files_module
from hubpath_fast.tasks.atari import PrioritizedReplay, replay_files
from hubpath_fast.tasks.atari.replay_files import ReplayFiles
from hubpath_fast.training import CheckpointError


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(replay_files, "STEPS", 16)


def through_a_checkpoint(manifest: dict, folder: Path) -> dict:
    torch.save(manifest, folder / "state.pt")
    return torch.load(folder / "state.pt", weights_only=True)


def assert_equal(one: PrioritizedReplay, two: PrioritizedReplay) -> None:
    """To the bit, and both go on alike."""
    states = [copy.deepcopy(made.state_dict()) for made in (one, two)]
    items = [state.pop("items") for state in states]
    priorities = [state.pop("priorities") for state in states]
    assert states[0] == states[1]
    assert torch.equal(*priorities)
    assert items[0].keys() == items[1].keys()
    for name in items[0]:
        assert torch.equal(items[0][name], items[1][name]), name
        assert items[0][name].dtype == items[1][name].dtype
    assert torch.equal(one.probabilities(), two.probabilities())
    drawn = [vars(made.sample(9, 0.5, torch.Generator().manual_seed(1))) for made in (one, two)]
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])


def empty() -> PrioritizedReplay:
    return PrioritizedReplay(40, SHAPE, n_step=3)


def chunks(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("every", [1, 7, 16, 50, 100])
def test_what_is_saved_bit_by_bit_is_restored_whole_at_every_save(tmp_path, every):
    replay, steps = filled(10)
    files = ReplayFiles(tmp_path / "replay")
    for step in range(10, 130):
        steps.add_to(replay)
        replay.update(torch.tensor([step % len(replay)]), torch.tensor([step / 10]))
        if step % every:
            continue
        manifest = through_a_checkpoint(files.save(replay), tmp_path)
        files.tidy(manifest)
        assert chunks(files.folder) == [chunk["name"] for chunk in manifest["chunks"]]
        other = empty()
        ReplayFiles(files.folder).load(other, manifest)
        assert_equal(replay, other)


def test_a_save_writes_what_is_new_and_touches_nothing_else(tmp_path):
    replay, steps = filled(20)
    files = ReplayFiles(tmp_path)
    files.save(replay)
    before = {name: (tmp_path / name).stat() for name in chunks(tmp_path)}
    assert [name.split("-")[0] for name in before] == ["000000000", "000000016"]
    assert files.save(replay)["chunks"] == files.save(replay)["chunks"]  # nothing is new
    assert len(chunks(tmp_path)) == 2
    for _ in range(3):
        steps.add_to(replay)
    new = files.save(replay)["chunks"][-1]
    assert (new["start"], new["count"]) == (20, 3)
    assert len(chunks(tmp_path)) == 3
    for name, status in before.items():
        assert (tmp_path / name).stat().st_ino == status.st_ino
        assert (tmp_path / name).stat().st_mtime_ns == status.st_mtime_ns


def test_a_resumed_replay_appends_to_its_chunks(tmp_path):
    replay, steps = filled(20)
    manifest = through_a_checkpoint(ReplayFiles(tmp_path / "a").save(replay), tmp_path)
    other, files = empty(), ReplayFiles(tmp_path / "a")
    files.load(other, manifest)
    for _ in range(5):
        steps.add_to(other)
    after = files.save(other)["chunks"]
    assert after[:2] == manifest["chunks"]
    assert [(chunk["start"], chunk["count"]) for chunk in after[2:]] == [(20, 5)]


def test_chunks_whose_steps_are_all_overwritten_go_once_the_checkpoint_is_written(tmp_path):
    replay, steps = filled(40)
    files = ReplayFiles(tmp_path)
    first = files.save(replay)
    for _ in range(17):
        steps.add_to(replay)
    second = files.save(replay)
    # The checkpoint on the disk is still the first: all its chunks are there.
    other = empty()
    ReplayFiles(tmp_path).load(other, first)
    assert second["chunks"][0]["start"] == 16
    files.tidy(second)
    assert chunks(tmp_path) == [chunk["name"] for chunk in second["chunks"]]
    with pytest.raises(CheckpointError, match="is missing"):
        ReplayFiles(tmp_path).load(other, first)


def test_more_steps_than_the_replay_holds_may_come_between_two_saves(tmp_path):
    replay, steps = filled(40)
    files = ReplayFiles(tmp_path)
    files.save(replay)
    for _ in range(90):
        steps.add_to(replay)
    manifest = files.save(replay)
    assert [chunk["start"] for chunk in manifest["chunks"]] == [90, 106, 122]
    other = empty()
    ReplayFiles(tmp_path).load(other, manifest)
    assert_equal(replay, other)


def test_an_empty_replay_is_saved_and_restored(tmp_path):
    manifest = through_a_checkpoint(ReplayFiles(tmp_path / "replay").save(empty()), tmp_path)
    other, _ = filled()
    files = ReplayFiles(tmp_path / "replay")
    files.load(other, manifest)
    assert len(other) == 0
    files.tidy(manifest)


def test_what_a_killed_save_left_is_ignored_then_removed(tmp_path):
    replay, steps = filled(20)
    files = ReplayFiles(tmp_path)
    manifest = files.save(replay)
    for _ in range(9):
        steps.add_to(replay)
    lost = files.save(replay)["chunks"][-1]["name"]  # killed before its checkpoint was written
    (tmp_path / f".000000029-00.{replay_files.SUFFIX}.1234{files_module.UNFINISHED}").write_bytes(
        b"{"
    )
    resumed, again = empty(), ReplayFiles(tmp_path)
    again.load(resumed, manifest)
    assert len(resumed) == 20
    steps = Steps(99, (0.1, 0.1))  # it goes on otherwise, as it may on another machine
    for _ in range(9):
        steps.add_to(resumed)
    saved = again.save(resumed)
    assert lost in chunks(tmp_path)
    again.tidy(saved)
    assert chunks(tmp_path) == [chunk["name"] for chunk in saved["chunks"]]
    assert lost not in chunks(tmp_path)
    other = empty()
    ReplayFiles(tmp_path).load(other, saved)
    assert_equal(resumed, other)


def test_a_replay_with_another_history_gets_chunks_of_its_own(tmp_path):
    """Also the same object, cleared or restored from elsewhere: the files would be of both."""
    replay, _ = filled(30)
    files = ReplayFiles(tmp_path)
    first = files.save(replay)
    other, _ = filled(30, seed=5)
    replay.load_state_dict(other.state_dict())
    second = files.save(replay)
    assert not {c["name"] for c in first["chunks"]} & {c["name"] for c in second["chunks"]}
    for manifest in (first, second):
        found = empty()
        ReplayFiles(tmp_path).load(found, manifest)
    assert_equal(found, other)


DAMAGE = {
    "a flipped bit of the frames": (lambda data: flipped(data, len(data) - 40), "is damaged"),
    "a flipped bit of the header": (lambda data: flipped(data, 20), "is damaged"),
    "a flipped bit at the end": (lambda data: flipped(data, len(data) - 1), "is damaged"),
    "cut short": (lambda data: data[:-1], r"is cut short: \d+ of \d+ bytes"),
    "empty": (lambda data: b"", r"is cut short: 0 of \d+ bytes"),
    "something appended": (lambda data: data + b"0", "is damaged"),
    "zeros, as after a power cut": (lambda data: bytes(len(data)), "is damaged"),
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]


@pytest.mark.parametrize(("spoil", "message"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_chunk_is_named(tmp_path, spoil, message):
    replay, _ = filled(40)
    manifest = ReplayFiles(tmp_path).save(replay)
    path = tmp_path / manifest["chunks"][1]["name"]
    path.write_bytes(spoil(path.read_bytes()))
    other, _ = filled()
    with pytest.raises(CheckpointError, match=message) as info:
        ReplayFiles(tmp_path).load(other, manifest)
    assert str(path) in str(info.value)
    assert "restore the file from a copy, or start the run anew" in str(info.value)
    assert len(other) == 0


def test_a_missing_chunk_and_one_of_another_run_are_named(tmp_path):
    replay, _ = filled(40)
    manifest = ReplayFiles(tmp_path / "mine").save(replay)
    theirs, _ = filled(40, seed=8)
    other = ReplayFiles(tmp_path / "theirs").save(theirs)
    mine, foreign = (tmp_path / folder / made["chunks"][2]["name"]
                     for folder, made in (("mine", manifest), ("theirs", other)))  # fmt: skip
    mine.write_bytes(foreign.read_bytes() + b"")
    with pytest.raises(CheckpointError, match=f"{mine.name} is (of another run|cut short)"):
        ReplayFiles(tmp_path / "mine").load(empty(), manifest)
    mine.unlink()
    with pytest.raises(CheckpointError, match=f"{mine.name} is missing"):
        ReplayFiles(tmp_path / "mine").load(empty(), manifest)
    mine.mkdir()
    with pytest.raises(CheckpointError, match=f"{mine.name} cannot be read: Is a directory"):
        ReplayFiles(tmp_path / "mine").load(empty(), manifest)


def test_a_whole_chunk_of_another_run_is_told_from_a_damaged_one(tmp_path):
    replay, _ = filled(40)
    manifest = ReplayFiles(tmp_path).save(replay)
    longer, shorter = sorted(
        (tmp_path / chunk["name"] for chunk in manifest["chunks"]),
        key=lambda path: path.stat().st_size, reverse=True,
    )[:2]  # fmt: skip
    shorter.write_bytes(longer.read_bytes())
    with pytest.raises(CheckpointError, match=f"{shorter.name} is of another run"):
        ReplayFiles(tmp_path).load(empty(), manifest)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda manifest: {}, "lacks 'format'"),
        (lambda manifest: None, "replay of"),
        (
            lambda manifest: manifest | {"format": "hubpath-replay-0"},
            "format is 'hubpath-replay-0'",
        ),
        (lambda manifest: manifest | {"chunks": manifest["chunks"][1:]}, "replay of"),
        (lambda manifest: manifest | {"chunks": manifest["chunks"][:-1]}, "steps up to 32 of 40"),
        (lambda manifest: manifest | {"chunks": [{}]}, "replay of"),
        (lambda manifest: manifest | {"state": {}}, "replay of"),
    ],
)
def test_a_damaged_manifest_is_refused(tmp_path, spoil, message):
    replay, _ = filled(40)
    manifest = ReplayFiles(tmp_path).save(replay)
    other, _ = filled()
    with pytest.raises(CheckpointError, match=message):
        ReplayFiles(tmp_path).load(other, spoil(manifest))
    assert len(other) == 0


def test_a_replay_of_other_settings_is_refused(tmp_path):
    manifest = ReplayFiles(tmp_path).save(filled(40)[0])
    with pytest.raises(CheckpointError, match="n_step: the saved replay has 3, this one 4"):
        ReplayFiles(tmp_path).load(PrioritizedReplay(40, SHAPE, n_step=4), manifest)


class Full(io.FileIO):
    """A file on a disk on which ``room`` bytes are left."""

    room = 0

    def write(self, data) -> int:
        if len(data) > Full.room:
            super().write(memoryview(data)[: Full.room])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        Full.room -= len(data)
        return super().write(data)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.99])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_nothing_of_the_new(
    tmp_path, monkeypatch, share
):
    replay, steps = filled(20)
    files, saved = ReplayFiles(tmp_path / "replay"), empty()
    manifest, before = files.save(replay), chunks(tmp_path / "replay")
    ReplayFiles(files.folder).load(saved, manifest)
    for _ in range(16 * 2 + 4):
        steps.add_to(replay)
    needed = ReplayFiles(tmp_path / "other").save(replay)["chunks"][-3:]
    assert [chunk["start"] for chunk in needed] == [16, 32, 48]
    monkeypatch.setattr(files_module, "open", lambda path, mode: Full(path, "x"), raising=False)
    Full.room = int(share * sum(chunk["bytes"] for chunk in needed))
    with pytest.raises(OSError, match="cannot save the replay: No space left") as info:
        files.save(replay)
    assert info.value.errno == errno.ENOSPC
    assert info.value.filename == str(files.folder)
    assert chunks(files.folder) == before
    found = empty()
    ReplayFiles(files.folder).load(found, manifest)
    assert_equal(found, saved)
    Full.room = 10**9  # room was made: the next save has all that the last one did not write
    ReplayFiles(files.folder).load(found, files.save(replay))
    assert_equal(found, replay)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
def test_a_disk_that_is_full_by_the_systems_word(tmp_path, monkeypatch):
    replay, _ = filled(20)
    full = functools.partial(open, "/dev/full", "wb")
    monkeypatch.setattr(files_module, "open", lambda path, mode: full(), raising=False)
    with pytest.raises(OSError, match="cannot save the replay: No space left") as info:
        ReplayFiles(tmp_path).save(replay)
    assert info.value.errno == errno.ENOSPC
    assert chunks(tmp_path) == []


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "replay").write_text("a file")
    with pytest.raises(OSError, match=r"cannot save the replay: (File exists|Not a directory)"):
        ReplayFiles(tmp_path / "replay").save(filled(20)[0])


def test_all_is_on_the_disk_before_save_returns(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        os, "fsync", lambda number: synced.append(os.readlink(f"/proc/self/fd/{number}"))
        if os.path.exists("/proc/self/fd") else synced.append("")
    )  # fmt: skip
    folder = tmp_path / "run" / "replay"
    ReplayFiles(folder).save(filled(20)[0])
    if not all(synced):
        pytest.skip("the system does not name open files")
    parts, folders = synced[:2], synced[2:]
    assert all(Path(part).parent == folder for part in parts)
    assert folders == [str(folder), str(folder.parent)]


def test_a_chunk_can_be_read_without_this_package(tmp_path):
    """Its header says what is in it, and the frames are differences from frame to frame."""
    replay, steps = filled(16, seed=4)
    name = ReplayFiles(tmp_path).save(replay)["chunks"][0]["name"]
    head, payload = (tmp_path / name).read_bytes().split(b"\n", 1)
    header = json.loads(head)
    assert header["format"] == "hubpath-replay-1"
    assert (header["start"], header["count"], header["frame_shape"]) == (0, 16, list(SHAPE))
    assert header["bytes"] == len(payload)
    raw = zlib.decompress(payload)
    size = 16 * 6
    changes = np.frombuffer(raw, np.uint8, size).reshape(16, *SHAPE)
    assert np.array_equal(np.bitwise_xor.accumulate(changes), np.stack(steps.frames))
    assert np.frombuffer(raw, "<i8", 16, size).tolist() == steps.actions
    assert np.frombuffer(raw, "<f8", 16, size + 128).tolist() == steps.rewards
    ends = [
        1 if t else 2 if c else 0 for t, c in zip(steps.terminated, steps.truncated, strict=True)
    ]
    assert list(raw[size + 256 : size + 272]) == ends
    after = [frame for frame, end in zip(steps.after, ends, strict=True) if end == 2]
    assert after
    assert raw[size + 272 + 128 :] == np.stack(after).tobytes()
