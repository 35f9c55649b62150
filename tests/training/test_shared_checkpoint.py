"""Ranks write one checkpoint, which is what one process writes; any number of them reads it."""

import errno
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.checkpoint_files import all_weights
from support.meta import on_meta
from support.processes import connected, run_ranks
from support.thread_ranks import run_threads
from torch import nn

import hubpath_fast as hp
from hubpath_fast.checkpoints import CheckpointError, Written, load_config, write
from hubpath_fast.parallel import Ranks
from hubpath_fast.training import TrainerConfig, build_optimizer, default_groups, load_state, resume
from hubpath_fast.training.checkpoint import expert_labels, model_entries, save_checkpoint
from hubpath_fast.training.optimizer import group_names
from hubpath_fast.training.optimizer_files import count_updates
from hubpath_fast.training.resume import load_run

CLASSES = 4
PARTS = {key: {} for key in ("run", "random", "window", "watch", "interval")}
# Experts 0 and 1 share a layer: they have one owner. (dp, ep): owners of the 5 experts.
LAYOUTS = {
    (1, 2): (1, 1, 0, 1, 0),
    (1, 3): (2, 2, 0, 1, 0),
    (1, 4): (1, 1, 0, 3, 0),  # rank 2 has none
    (2, 1): (0, 0, 0, 0, 0),
    (2, 2): (0, 0, 1, 1, 0),
}


class Tied(nn.Module):
    """An expert with one parameter under two names, and one that is another's memory."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.three = nn.Linear(8, 8)
        self.three.weight.data = self.one.weight.data
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.fc(self.three(self.two(self.one(x.flatten(1)))))


class Constant(nn.Module):
    """An expert without a tensor."""

    def forward(self, x):
        return torch.ones(len(x), CLASSES)


class Scores(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.Linear(8, 10)

    def forward(self, x):
        return self.heads(x.flatten(1)).chunk(2, dim=1)


def build(seed=0):
    torch.manual_seed(seed)
    shared = nn.Conv2d(2, 3, 2)
    experts = [
        nn.Sequential(shared, nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, CLASSES)),
        nn.Sequential(shared, nn.Flatten(), nn.Linear(3, CLASSES)),
        Tied(),
        Constant(),
        nn.Sequential(
            nn.Conv2d(2, 5, 2).requires_grad_(False), nn.Flatten(), nn.Linear(5, CLASSES)
        ),
    ]
    experts[4].to(memory_format=torch.channels_last)
    return hp.HubPathway(experts, Scores(), k=2, num_outputs=CLASSES)


def with_optimizer(model, name):
    config = TrainerConfig(steps=10, optimizer=name)
    optimizer = build_optimizer(model, default_groups(model, config), config)
    count_updates(model, optimizer)
    return model, optimizer


def train(model, optimizer):
    torch.manual_seed(3)
    for _ in range(3):
        optimizer.zero_grad(set_to_none=True)
        out = model(torch.randn(12, 2, 2, 2))
        hp.HubPathwayLoss()(out, torch.randint(0, CLASSES, (12,))).total.backward()
        optimizer.step()


def change(model, optimizer):
    """All values, in place, alike in one process and on ranks."""
    done = set()
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            place = tensor.data_ptr()
            if tensor.is_floating_point() and not tensor.is_meta and place not in done:
                tensor.mul_(1.25)
                done.add(place)
        for state in optimizer.state.values():
            for value in state.values():
                value.mul_(1.5)


def save(folder, model, optimizer, ranks=Ranks(), previous=None):
    state = {**PARTS, "groups": group_names(model, optimizer)}
    labels = expert_labels(model, None)
    return save_checkpoint(
        folder, model, state, model_entries(model), labels, optimizer, previous, ranks
    )


def load(folder, model, optimizer, ranks=Ranks()):
    return load_run(folder, model, optimizer, expert_labels(model, None), ranks)


def on_ranks(layout, name, function):
    """``function(model, optimizer, ranks)`` on each rank, with a model of other values."""

    def run(ranks):
        model = build(seed=9).distribute(ranks, LAYOUTS[layout]).train()
        return function(*with_optimizer(model, name), ranks)

    return run_threads(run, *layout)


class Whole(NamedTuple):
    """A checkpoint of one process, of a model that has trained, and which optimizer it had."""

    folder: Path
    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer


@pytest.fixture(params=["adamw", "sgd"])
def whole(request, tmp_path):
    model, optimizer = with_optimizer(build(), request.param)
    train(model, optimizer)
    save(tmp_path / "whole", model, optimizer)
    return Whole(tmp_path / "whole", request.param, model, optimizer)


def assert_same(folder, expected):
    assert all_weights(folder) == all_weights(expected)
    assert load_config(folder) == load_config(expected)
    one, two = (load_state(f) for f in (folder, expected))
    assert one == two
    assert (folder / "model.safetensors.index.json").read_bytes() == (
        expected / "model.safetensors.index.json"
    ).read_bytes()


def raised(found, kind):
    assert all(isinstance(error, kind) for error in found), found
    return [str(error) for error in found]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_read_what_one_process_wrote_and_write_what_it_would(tmp_path, whole, layout):
    folder, _, model, optimizer = whole

    def run(own, its_optimizer, ranks):
        assert group_names(own, its_optimizer) == group_names(model, optimizer)
        assert model_entries(own) == model_entries(model)
        load(folder, own, its_optimizer, ranks)
        assert not any(p.is_meta for p in its_optimizer.state)
        change(own, its_optimizer)
        save(tmp_path / "ranks", own, its_optimizer, ranks)
        return [on_meta(expert) for expert in own.experts]

    found = on_ranks(layout, whole.name, run)
    assert [sum(there) for there in found] == [
        sum(owner != rank % layout[1] for i, owner in enumerate(LAYOUTS[layout]) if i != 3)
        for rank in range(layout[0] * layout[1])
    ]
    change(model, optimizer)
    save(tmp_path / "one", model, optimizer)
    assert_same(tmp_path / "ranks", tmp_path / "one")


def test_a_run_goes_on_on_other_numbers_of_ranks(tmp_path, whole):
    folder, name, model, optimizer = whole
    for layout in ((1, 2), (1, 1), (1, 3), (2, 2)):
        following = tmp_path / str(layout)

        def run(own, its_optimizer, ranks, start=folder, end=following):
            load(start, own, its_optimizer, ranks)
            change(own, its_optimizer)
            save(end, own, its_optimizer, ranks)

        if layout == (1, 1):
            run(*with_optimizer(build(seed=4), name), Ranks())
        else:
            assert not any(on_ranks(layout, whole.name, run))
        change(model, optimizer)
        folder = following
    save(tmp_path / "one", model, optimizer)
    assert_same(folder, tmp_path / "one")


def test_ranks_link_to_the_files_of_experts_that_have_not_changed(tmp_path, whole):
    folder = whole.folder

    def run(own, its_optimizer, ranks):
        _, files = load(folder, own, its_optimizer, ranks)
        before = inodes(folder)
        first = save(tmp_path / "first", own, its_optimizer, ranks, files)
        assert inodes(tmp_path / "first") == before
        if not on_meta(own.experts[2]):
            with torch.no_grad():
                own.experts[2].fc.bias.add_(1)
        save(tmp_path / "second", own, its_optimizer, ranks, first)
        now = inodes(tmp_path / "second")
        return sorted(name for name in now if now[name] != before[name])

    changed = ["experts/02-Tied.safetensors", "optimizer/02-Tied.safetensors"]
    assert on_ranks((2, 2), whole.name, run) == [changed] * 4


def inodes(folder):
    """But for the file of the expert without tensors, which loading does not look at."""
    found = [path for path in folder.rglob("*.safetensors") if "Constant" not in path.name]
    return {str(path.relative_to(folder)): path.stat().st_ino for path in found}


@pytest.mark.parametrize("rank", [0, 1])
def test_where_one_rank_has_no_room_all_fail_and_the_last_checkpoint_is_whole(
    tmp_path, whole, monkeypatch, rank
):
    folder = whole.folder
    before, write_tensors = all_weights(folder), write.write_tensors
    owned = {0: "02-Tied", 1: "00-"}[rank]

    def full(path, *arguments):
        if owned in path.name:
            raise OSError(errno.ENOSPC, "no room")
        return write_tensors(path, *arguments)

    monkeypatch.setattr(write, "write_tensors", full)

    def run(own, its_optimizer, ranks):
        load(folder, own, its_optimizer, ranks)
        change(own, its_optimizer)
        save(folder, own, its_optimizer, ranks, Written())

    found = on_ranks((1, 2), whole.name, run)
    texts = raised(found, OSError)
    assert found[rank].errno == errno.ENOSPC
    for text in texts:
        assert text.count("cannot save: No space left on device (") == 1, text
        assert text.count("the previous checkpoint is whole") == 1
    assert found[1 - rank].errno == errno.ENOSPC
    assert found[1 - rank].strerror.startswith(f"rank {rank}, saving: ")
    assert all_weights(folder) == before
    assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_a_folder_that_cannot_be_replaced_is_an_error_of_all_ranks(tmp_path, whole, monkeypatch):
    (tmp_path / "file").write_text("")
    found = on_ranks((1, 3), whole.name, lambda m, o, ranks: save(tmp_path / "file", m, o, ranks))
    assert all("is a file" in text for text in raised(found, ValueError))

    def refused(*_):
        raise PermissionError(errno.EACCES, "no right")

    monkeypatch.setattr("hubpath_fast.checkpoints.folders._rename", refused)
    found = on_ranks((1, 3), whole.name, lambda m, o, ranks: save(whole.folder, m, o, ranks))
    assert all("cannot save: Permission denied" in text for text in raised(found, OSError))


def test_a_file_that_one_rank_finds_damaged_ends_all(whole, monkeypatch):
    folder, load_weights, seen = whole.folder, resume.load_weights, threading.local()

    def damaged(*arguments):
        if getattr(seen, "bad", False):
            raise CheckpointError("experts/01-Sequential.safetensors is truncated")
        return load_weights(*arguments)

    monkeypatch.setattr(resume, "load_weights", damaged)

    def run(own, its_optimizer, ranks):
        seen.bad = ranks.rank == 2
        load(folder, own, its_optimizer, ranks)

    found = on_ranks((1, 3), whole.name, run)
    texts = raised(found, ValueError)
    assert isinstance(found[2], CheckpointError)
    assert all("01-Sequential.safetensors is truncated" in text for text in texts)
    assert texts[0].startswith(f"rank 2, loading {folder}: ")


def test_weights_of_another_dtype_are_found_on_every_rank(tmp_path, whole):
    other = build()
    other.experts[0][3] = nn.Linear(3, CLASSES).double()
    save(tmp_path / "other", *with_optimizer(other, whole.name))
    found = on_ranks(
        (1, 2), whole.name, lambda m, o, ranks: load(tmp_path / "other", m, o, Ranks())
    )
    for text in raised(found, CheckpointError):
        assert "experts.0.3.bias is float64 [4] in the file, float32 [4] in the model" in text


def rank_main(rank, folder):
    """On processes: reads, writes elsewhere, and then the first rank cannot write."""
    ranks = connected("ep")
    model = build(seed=9).distribute(ranks, LAYOUTS[1, 2]).train()
    model, optimizer = with_optimizer(model, "adamw")
    load(folder / "whole", model, optimizer, ranks)
    change(model, optimizer)
    written = save(folder / "ranks", model, optimizer, ranks)
    (folder / "file").touch()
    with pytest.raises(ValueError, match="is a file") as failed:
        save(folder / "file", model, optimizer, ranks)
    return sorted(written.records), str(failed.value)


def test_processes_write_what_one_would(tmp_path):
    model, optimizer = with_optimizer(build(), "adamw")
    train(model, optimizer)
    save(tmp_path / "whole", model, optimizer)
    (first, text), (second, other) = run_ranks(rank_main, 2, tmp_path / "run", tmp_path)
    change(model, optimizer)
    save(tmp_path / "one", model, optimizer)
    assert_same(tmp_path / "ranks", tmp_path / "one")
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(all_weights(tmp_path / "one"))
    assert text.startswith("folder: ")
    assert other.startswith("rank 0, saving: folder: ")
