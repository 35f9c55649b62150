import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from support.training import pathway, single
from support.waiting import wait_until
from torch import nn

from hubpath_fast.checkpoints import (
    CheckpointError,
    errors,
    find_checkpoint,
    folders,
    load_config,
    load_weights,
    tensor_file,
    write,
)
from hubpath_fast.training.checkpoint import load_state, save_checkpoint

CONFIG = {"trainer": {"steps": 3, "milestones": [1, 2]}, "run": {"hub": "tiny"}}


def save(folder, model, step=1):
    save_checkpoint(folder, model, {"step": step, "tensor": torch.arange(3)}, CONFIG)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))


def test_what_is_saved_is_what_is_loaded_with_shared_and_strided_tensors(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last)
            self.one = nn.Linear(5, 5)
            self.two = nn.Linear(5, 5)
            self.two.weight = self.one.weight
            block = torch.randn(4, 5)
            self.register_buffer("top", block[:2])
            self.register_buffer("middle", block[1:3])  # overlaps top
            self.register_buffer("empty", torch.empty(0))
            self.register_buffer("empty_too", torch.empty(0))
            self.register_buffer("short", torch.randn(3).bfloat16())

    torch.manual_seed(0)
    model, other = Tied(), Tied()
    save(tmp_path / "last", model)
    load_weights(other, tmp_path / "last")
    assert same(model.state_dict(), other.state_dict())
    assert other.two.weight is other.one.weight
    assert other.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert load_state(tmp_path / "last")["step"] == 1
    assert CONFIG.items() <= load_config(tmp_path / "last").items()
    with safe_open(tmp_path / "last/model.safetensors", framework="pt") as file:
        assert "two.weight" not in file.keys()  # noqa: SIM118 (written once)
    assert sorted(os.listdir(tmp_path)) == ["last"]
    assert sorted(os.listdir(tmp_path / "last")) == [
        "config.json", "model.safetensors", "state.pt",
    ]  # fmt: skip


def no_room(*_args, **_kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Crash(BaseException):
    """The process ends here: nothing after this point runs."""


CALLS = {
    "write_tensors": (write, "write_tensors"),
    "torch.save": (torch, "save"),
    "Path.write_text": (Path, "write_text"),
    "os.fsync": (os, "fsync"),
    "os.replace": (os, "replace"),
}


def fail_at(monkeypatch, call, nth, error):
    """Have the ``nth`` call of one of the functions that write fail."""
    owner, name = CALLS[call]
    original, seen = getattr(owner, name), []

    def wrapped(*args, **kwargs):
        seen.append(call)
        if len(seen) == nth:
            error()
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


@pytest.mark.parametrize(
    ("call", "nth"),
    [(c, 1) for c in CALLS] + [("os.fsync", n) for n in (2, 3, 4)] + [("os.replace", 2)],
)
def test_no_room_at_any_write_leaves_the_previous_checkpoint_and_nothing_else(
    tmp_path, monkeypatch, call, nth
):
    old, new = single(0), single(1)
    save(tmp_path / "last", old)
    with monkeypatch.context() as patch:
        fail_at(patch, call, nth, no_room)
        with pytest.raises(OSError, match=r"No space left .*the previous checkpoint is whole") as e:
            save(tmp_path / "last", new, step=2)
    assert e.value.errno == errno.ENOSPC
    assert "make room and resume" in str(e.value)
    assert os.listdir(tmp_path) == ["last"]
    loaded = single(2)
    load_weights(loaded, tmp_path / "last")
    assert same(loaded.state_dict(), old.state_dict())
    assert load_state(tmp_path / "last")["step"] == 1
    save(tmp_path / "last", new, step=2)
    assert load_state(tmp_path / "last")["step"] == 2


def test_a_first_save_without_room_leaves_nothing(tmp_path, monkeypatch):
    fail_at(monkeypatch, "torch.save", 1, no_room)
    with pytest.raises(OSError, match="there is no earlier one"):
        save(tmp_path / "last", single())
    assert os.listdir(tmp_path) == []
    assert find_checkpoint(tmp_path / "last") is None


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a disk without room")
def test_the_system_error_is_found_under_torchs_and_safetensors_own(tmp_path, monkeypatch):
    """Both wrap it: torch in a RuntimeError about positions, safetensors in text."""
    full = Path("/dev/full")
    for writer in (
        lambda: torch.save({"x": torch.zeros(100000)}, open(full, "wb", buffering=0)),  # noqa: SIM115
        lambda: (_ for _ in ()).throw(errors.SafetensorError("I/O error: full (os error 28)")),
    ):
        with pytest.raises(Exception) as info:
            writer()
        assert errors.errno_of(info.value) == errno.ENOSPC
    assert errors.errno_of(RuntimeError("os error 28")) is None


@pytest.mark.parametrize(
    ("call", "nth", "survivor"),
    [("write_tensors", 1, 1), ("os.fsync", 2, 1), ("os.replace", 1, 1), ("os.replace", 2, 1),
     ("os.fsync", 5, 2)],
)  # fmt: skip
def test_a_crash_at_any_moment_leaves_a_whole_checkpoint(
    tmp_path, monkeypatch, call, nth, survivor
):
    models = {1: single(1), 2: single(2)}
    save(tmp_path / "last", models[1])

    def crash():
        # What the next process finds: the disk as it is now, before any cleaning up.
        shutil.copytree(tmp_path, tmp_path.with_suffix(".found"))
        raise Crash

    with monkeypatch.context() as patch:
        fail_at(patch, call, nth, crash)
        with pytest.raises(Crash):
            save(tmp_path / "last", models[2], step=2)
    found = tmp_path.with_suffix(".found") / "last"
    assert load_state(found)["step"] == survivor
    loaded = single(3)
    load_weights(loaded, found)
    assert same(loaded.state_dict(), models[survivor].state_dict())
    save(found, models[2], step=3)  # and the next save goes well and tidies up
    assert os.listdir(found.parent) == ["last"]
    assert load_state(found)["step"] == 3


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt", "config.json"])
@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_a_truncated_file_is_named(tmp_path, name, share):
    save(tmp_path / "last", single())
    path = tmp_path / "last" / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole)) if share < 0.99 else len(whole) - 3])
    readers = {
        "model.safetensors": lambda folder: load_weights(single(), folder),
        "state.pt": load_state,
        "config.json": load_config,
    }
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is truncated or damaged"):
        readers[name](tmp_path / "last")
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(path))} is missing"):
        readers[name](tmp_path / "last")


def test_nothing_is_unpickled(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "evil"),))

    save(tmp_path / "last", single())
    torch.save({"step": Evil()}, tmp_path / "last/state.pt")
    with pytest.raises(CheckpointError, match=r"state\.pt is truncated or damaged"):
        load_state(tmp_path / "last")
    assert not (tmp_path / "evil").exists()


def test_another_model_is_named_by_its_first_difference(tmp_path):
    save(tmp_path / "last", single())
    other = single()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match=r"extra\.bias is in the model, not in the file"):
        load_weights(other, tmp_path / "last")
    del other.extra, other.head
    with pytest.raises(CheckpointError, match=r"head\.bias is in the file, not in the model"):
        load_weights(other, tmp_path / "last")
    with pytest.raises(CheckpointError, match=r"float32 .* in the file, float64 .* in the model"):
        load_weights(single().double(), tmp_path / "last")
    with pytest.raises(CheckpointError, match="there is no checkpoint at"):
        load_weights(single(), tmp_path / "best")


@pytest.mark.parametrize("moment", ["between the renames", "after both"])
def test_a_reader_that_is_overtaken_by_a_save_reads_again(tmp_path, monkeypatch, moment):
    """It has looked where the checkpoint is, and finds nothing there any more."""
    last, old = tmp_path / "last", tmp_path / ".last.old"
    save(last, single(), step=1)
    save(tmp_path / "new", single(), step=2)
    if moment == "after both":
        last.rename(old)
    existing = folders.existing

    def overtaken(folder):
        found = existing(folder)
        monkeypatch.setattr(folders, "existing", existing)
        if moment == "after both":
            (tmp_path / "new").rename(last)
            shutil.rmtree(old)
        else:
            last.rename(old)
        return found

    monkeypatch.setattr(folders, "existing", overtaken)
    assert load_state(last)["step"] == (2 if moment == "after both" else 1)


def test_a_checkpoint_that_never_stands_still_is_given_up(tmp_path, monkeypatch):
    save(tmp_path / "last", single())
    versions = iter(range(10**6))
    monkeypatch.setattr(folders, "_version", lambda _: next(versions))
    (tmp_path / "last/state.pt").unlink()
    with pytest.raises(CheckpointError, match="replaced again and again while it is read"):
        load_state(tmp_path / "last")


def test_a_checkpoint_is_read_while_a_run_replaces_it(tmp_path):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path; from training.test_checkpoint import save, single\n"
        "for step in range(1, 100000): save(Path(sys.argv[1]), single(0), step)\n"
    )
    folder, tests = tmp_path / "last", Path(__file__).parents[1]
    writer = subprocess.Popen([sys.executable, "-c", code, str(folder), str(tests)])
    try:
        wait_until(lambda: find_checkpoint(folder) is not None, "the first checkpoint")
        model, steps = single(1), set()

        def read():
            load_weights(model, folder)
            steps.add(load_state(folder)["step"])
            assert CONFIG.items() <= load_config(folder).items()
            return len(steps) == 20

        wait_until(read, "twenty checkpoints")
    finally:
        writer.kill()
        writer.wait()
    assert same(model.state_dict(), single(0).state_dict())


def test_what_a_killed_save_left_is_cleared_away(tmp_path):
    for last, old, kept in ((1, 2, 1), (None, 2, 2)):
        for folder, step in ((tmp_path / "last", last), (tmp_path / ".last.old", old)):
            if step is not None:
                save(folder, single(), step)
        (tmp_path / ".last.new").mkdir()
        (tmp_path / ".last.new" / "model.safetensors").write_bytes(b"half")
        folders.discard_unfinished(tmp_path / "last")
        assert os.listdir(tmp_path) == ["last"]
        assert load_state(tmp_path / "last")["step"] == kept
        shutil.rmtree(tmp_path / "last")


def test_a_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch):
    save(tmp_path / "last", single())

    def refused(*_args, **_kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for owner, name in ((tensor_file, "safe_open"), (torch, "load"), (Path, "read_text")):
        monkeypatch.setattr(owner, name, refused)
    for read in (lambda folder: load_weights(single(), folder), load_state, load_config):
        with pytest.raises(CheckpointError, match=r"cannot be read: Permission denied$"):
            read(tmp_path / "last")


@pytest.mark.parametrize("content", [b"", b"no zip", b"PK\x03\x04 half"])
def test_a_damaged_state_is_told_without_torchs_own_words(tmp_path, content):
    save(tmp_path / "last", single())
    (tmp_path / "last/state.pt").write_bytes(content)
    with pytest.raises(CheckpointError) as info:
        load_state(tmp_path / "last")
    assert str(info.value) == (
        f"{tmp_path / 'last/state.pt'} is truncated or damaged; restore {tmp_path / 'last'} from a "
        "copy, or delete it and resume, which makes it again"
    )
    torch.save([1], tmp_path / "last/state.pt")
    with pytest.raises(CheckpointError, match="truncated or damaged; restore"):
        load_state(tmp_path / "last")


def test_a_link_stays_and_the_folder_that_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    link, target = tmp_path / "run/last", tmp_path / "disk/kept"
    link.symlink_to(target)  # leads nowhere yet
    for step in (1, 2, 3):
        save(link, single(), step)
        assert load_state(target)["step"] == step
        assert link.is_symlink()
        assert os.listdir(tmp_path / "disk") == ["kept"]
        assert os.listdir(tmp_path / "run") == ["last"]
    target.rename(tmp_path / "disk/.kept.old")  # cut short between its two renames
    assert load_state(link)["step"] == 3
    folders.discard_unfinished(link)
    assert load_state(target)["step"] == 3


def test_a_link_that_an_earlier_save_left_is_removed_without_what_it_leads_to(tmp_path):
    save(tmp_path / "other", single(), 1)
    (tmp_path / ".last.old").symlink_to(tmp_path / "other")
    (tmp_path / ".last.new").symlink_to(tmp_path / "other")
    for step in (2, 3):
        save(tmp_path / "last", single(), step)
        assert load_state(tmp_path / "last")["step"] == step
        assert load_state(tmp_path / "other")["step"] == 1
        assert sorted(os.listdir(tmp_path)) == ["last", "other"]


def test_what_cannot_be_replaced_is_refused_and_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for folder, reason in (("/", "mount point"), ("../file", "a file"), (".", "current folder")):
        with pytest.raises(ValueError, match=rf"^folder: .*{re.escape(folder)}' is .*{reason}"):
            save(Path(folder), single())
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "here"]


@pytest.mark.parametrize("file", ["experts/01-expert.safetensors", "state.pt", "config.json"])
@pytest.mark.parametrize("trained", [True, False])
def test_what_is_damaged_is_restored_as_a_whole_and_resumed_only_in_training(
    tmp_path, file, trained
):
    folder = tmp_path / "last"
    save(folder, pathway())
    (folder / file).write_bytes(b"half")
    if not trained:
        (folder / "state.pt").unlink()
    error = errors.damaged(folder / file)
    assert f"restore {folder} from a copy" in str(error)
    assert ("delete it and resume" in str(error)) == trained


def test_a_dtype_that_no_file_holds_is_named_and_the_last_save_stays(tmp_path):
    model = single()
    save(tmp_path / "last", model)
    model.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(TypeError, match=r"^phase is of torch\.complex128, which safetensors"):
        save(tmp_path / "last", model, step=2)
    assert os.listdir(tmp_path) == ["last"]
    assert load_state(tmp_path / "last")["step"] == 1
