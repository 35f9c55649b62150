"""Saves write what has changed since the last one, and nothing that has changed is left out."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support.checkpoint_files import all_weights
from support.training import CLASSES, FEATURES, Generator, Stream, assert_same_run, make, pathway
from torch import nn

from hubpath_fast.checkpoints import SavedModel, load_weights, write_model
from hubpath_fast.reference import ReferenceHubPathway
from hubpath_fast.training import load_state
from hubpath_fast.training.checkpoint import save_checkpoint
from hubpath_fast.training.optimizer_files import load_optimizer

SAMPLES = Path(__file__).parents[1] / "data_files"
BIAS = [0.22645403444766998, -0.035068899393081665, -0.18884950876235962]  # of both samples


def inodes(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_ino for p in folder.rglob("*.*") if p.is_file()}


def new_bytes(folder: Path, before: dict[str, int]) -> int:
    known = set(before.values())
    return sum(p.stat().st_size for p in folder.rglob("*.*") if p.stat().st_ino not in known)


def size(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def wide(num_experts: int) -> ReferenceHubPathway:
    torch.manual_seed(0)
    experts = [
        nn.Sequential(nn.Linear(FEATURES, 2048), nn.ReLU(), nn.Linear(2048, CLASSES))
        for _ in range(num_experts)
    ]
    aggregator = nn.Linear(num_experts * CLASSES, CLASSES)
    return ReferenceHubPathway(experts, Generator(num_experts), aggregator, k=2)


def after_each_save(trainer, look) -> None:
    """Has ``look(inodes before)`` called after each save of ``last/``."""
    save, last = trainer._save, trainer.out_dir / "last"

    def looked(name):
        before = inodes(last)
        save(name)
        look(before)

    trainer._save = looked


def test_a_step_of_2_of_64_experts_writes_4_of_64_of_the_bytes_and_one_is_read_alone(tmp_path):
    trainer = make(wide(64), tmp_path, Stream(size=1), steps=151, save_every=150)
    last, shares = tmp_path / "last", []
    after_each_save(trainer, lambda before: shares.append(new_bytes(last, before) / size(last)))
    trainer.fit()
    assert shares[0] == 1
    assert 1 / 64 < shares[1] <= 4 / 64
    opened = SavedModel(last)
    files = {path for name, path in opened.files().items() if name.startswith("experts.7.")}
    whole = sum(path.stat().st_size for path in set(opened.files().values()))
    assert sum(path.stat().st_size for path in files) <= 2 / 64 * whole


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_every_save_of_a_run_holds_what_a_whole_save_would(tmp_path, optimizer):
    """Fused updates do not move torch's counters: a save that believed them would be stale."""
    trainer = make(
        wide(6), tmp_path / "run", Stream(size=1), optimizer=optimizer, steps=8, save_every=1
    )
    linked = []

    def look(before):
        last, whole = trainer.out_dir / "last", tmp_path / "whole"
        save_checkpoint(whole, trainer.model, {}, {}, optimizer=trainer.optimizer)
        assert all_weights(last) == all_weights(whole)
        linked.append(sum(before.get(n) == number for n, number in inodes(last).items()))

    after_each_save(trainer, look)
    trainer.fit()
    assert len(linked) == 8
    # 4 of 6 experts had no row: their weights, and, in sgd, whose momentum all have, its files.
    assert min(linked[1:]) >= (8 if optimizer == "sgd" else 4)


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)) for _ in range(3)
        )
        self.experts[0].requires_grad_(False)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [expert(x) for expert in self.experts]


def zero(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.zero_()


def replaced(model: Frozen) -> None:
    model.experts[1][0].weight.data = torch.zeros(3, 2)


def replayed(model: Frozen) -> None:
    model.experts[0][1].running_mean.data.fill_(3.0)  # ``data`` has a counter of its own
    model.eval()


CHANGES = {
    "a replay writes to a frozen expert's BatchNorm": replayed,
    "a parameter gets other memory": replaced,
    "a parameter is written to": lambda m: zero(m.experts[2][0].bias),
    "a state is loaded": lambda m: m.load_state_dict(Frozen().state_dict()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_saved_whoever_made_it(tmp_path, change):
    torch.manual_seed(0)
    model, other = Frozen(), Frozen()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    written = write_model(tmp_path / "one", model, {})
    CHANGES[change](model)
    write_model(tmp_path / "two", model, {}, previous=written)
    load_weights(other, tmp_path / "two")
    assert all(map(torch.equal, other.state_dict().values(), model.state_dict().values()))


def test_where_links_are_refused_or_their_source_is_another_file_it_is_written(
    tmp_path, monkeypatch
):
    model = Frozen().eval()
    folders = [tmp_path / name for name in ("one", "two", "three", "four")]
    for folder in folders:
        folder.mkdir()
    written = write_model(folders[0], model, {})
    whole = all_weights(folders[0])
    write_model(folders[1], model, {}, previous=written)
    same = [name for name in whole if inodes(folders[0])[name] == inodes(folders[1])[name]]
    assert sorted(same) == sorted(whole)
    files = sorted((folders[0] / "experts").iterdir())
    shutil.copy(files[1], folders[0] / "copy")
    os.replace(folders[0] / "copy", files[2])
    write_model(folders[2], model, {}, previous=written)
    assert all_weights(folders[2]) == whole

    def refused(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refused)
    write_model(folders[3], model, {}, previous=written)
    assert all_weights(folders[3]) == whole


def test_the_first_save_of_a_resumed_run_links_to_what_was_loaded(tmp_path):
    settings = {"steps": 5, "save_every": 2}
    trainer = make(wide(12), tmp_path, Stream(size=1), **settings)
    after_each_save(trainer, lambda _: trainer.stop() if trainer.state.step == 4 else None)
    assert trainer.fit().interrupted
    before = inodes(tmp_path / "last")
    make(wide(12), tmp_path, Stream(size=1), resume=True, **settings).fit()
    after = inodes(tmp_path / "last")
    assert sum(before.get(name) == number for name, number in after.items()) >= 9
    whole = make(wide(12), tmp_path.with_suffix(".whole"), Stream(size=1), **settings)
    whole.fit()
    assert all_weights(tmp_path / "last") == all_weights(whole.out_dir / "last")


def test_samples_of_both_formats_are_read_and_resumed_alike(tmp_path):
    """The same 6 of 12 steps of ``support.training.pathway()``, stored by the version before
    format 1 and by the first with it."""
    trainers = {}
    for number in (0, 1):
        out = tmp_path / str(number)
        shutil.unpack_archive(SAMPLES / f"format_{number}.tar.xz", out, filter="data")
        saved = SavedModel(out / "last")
        saved.verify()
        assert saved.format == number
        assert saved.tensors()["experts.2.body.1.num_batches_tracked"].item() == 6
        assert saved.tensors()["aggregator.bias"].tolist() == BIAS
        trainers[number] = make(pathway(7), out, resume=True)
        assert trainers[number].state.step == 6
        trainers[number].fit()
        assert SavedModel(out / "last").format == 1
    assert_same_run(*trainers.values())
    states = [load_state(tmp_path / str(number) / "last")["optimizer"] for number in (0, 1)]
    assert states[0] == states[1]


def test_the_state_of_a_parameter_that_is_frozen_when_saving_is_kept(tmp_path):
    model, other = pathway(0), pathway(0)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.1) for m in (model, other)]
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizers[0].step()
    model.experts[1].requires_grad_(False)
    save_checkpoint(tmp_path / "last", model, {}, {}, optimizer=optimizers[0])
    state = load_state(tmp_path / "last")["optimizer"]
    load_optimizer(tmp_path / "last", state, other, optimizers[1])
    saved, loaded = (o.state_dict()["state"] for o in optimizers)
    assert saved.keys() == loaded.keys()
    assert len(saved) == len(list(model.parameters()))
    for number, values in saved.items():
        assert all(torch.equal(values[key], loaded[number][key]) for key in values)


def test_a_part_that_has_stayed_as_it_is_is_linked_in_training_mode_too(tmp_path):
    model = Frozen().train()
    model.experts[0].eval()  # its statistics stay
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    written = write_model(tmp_path / "one", model, {})
    model(torch.rand(4, 2))
    model.train()
    write_model(tmp_path / "two", model, {}, previous=written)
    before, after = inodes(tmp_path / "one"), inodes(tmp_path / "two")
    linked = sorted(name for name in before if before[name] == after[name])
    assert linked == ["experts/00-expert.safetensors", "router.safetensors"]


def test_statistics_of_an_expert_with_parameters_that_another_one_trains_are_saved(tmp_path):
    model, other = Frozen(), Frozen()
    model.experts[2][0], other.experts[2][0] = model.experts[1][0], other.experts[1][0]
    model.experts[2][1].requires_grad_(False)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    written = write_model(tmp_path / "one", model, {})
    model.experts[2][1].running_mean.data.fill_(3.0)
    write_model(tmp_path / "two", model, {}, previous=written)
    load_weights(other, tmp_path / "two")
    assert other.experts[2][1].running_mean.tolist() == [3.0] * 3
