"""Experts that rest in files: results are those of all in memory, to the bit, whoever comes first;
what cannot come and go is refused, by name."""

import copy
import os

import pytest
import torch
from support.models import M, batch, build, conv_expert, train
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.executors.resident import read_room
from hubpath_fast.executors.resident.resident import Resident
from hubpath_fast.resting import release, rests
from hubpath_fast.training import TrainerConfig
from hubpath_fast.training.optimizer import build_optimizer, default_groups, start_moments


def resident(room, inner="sequential", seed=0):
    model = build(executor="sequential", seed=seed)
    model.executor = ResidentExecutor(room, inner)
    return model


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def saved(tmp_path):
    build(executor="sequential").save_pretrained(tmp_path / "hub")
    return tmp_path / "hub"


def opened(folder, room=None):
    modules = {index: conv_expert() for index in range(M)}
    modules["generator"] = hp.PathwayGenerator(M, width=4)
    return hp.from_pretrained(folder, modules=modules, room=room)


def test_predictions_are_those_of_all_in_memory_whatever_leaves():
    mine, all_in_memory = resident(2).eval(), build(executor="sequential").eval()
    with torch.no_grad():
        for step in range(6):
            x, _ = batch(n=3, seed=step)
            eps = torch.randn(3, M, generator=torch.Generator().manual_seed(step))
            assert torch.equal(mine(x, eps=100 * eps), all_in_memory(x, eps=100 * eps))
    report = mine.executor_report()
    assert report.executor == "resident"
    assert report.hits > 0
    assert report.bytes_out > 0
    assert report.misses * min(each.place.nbytes for each in mine.executor._residents.values()) <= (
        report.bytes_in
    )
    assert "found their expert in memory" in str(report)


def test_training_with_dropout_is_that_of_all_in_memory():
    # Dropout draws from one generator: experts must be called in their order.
    expected = train(build(executor="sequential"), 4)
    mine = resident(M)
    assert same(train(mine, 2), train(build(executor="sequential"), 2))
    mine = resident(M)
    mine.eval()
    with torch.no_grad():
        mine(batch(n=1)[0])  # some are in memory, and would be run first
    assert same(train(mine.train(), 4), expected)


def test_frozen_bodies_need_no_room_for_all_that_are_asked():
    def freeze(model):
        for expert in model.experts:
            for part in expert[:-1]:
                part.requires_grad_(False)
        return model

    mine, expected = freeze(resident(3)), freeze(build(executor="sequential"))
    assert same(train(mine, 4), train(expected, 4))
    assert mine.executor_report().misses > M


def test_more_trained_experts_than_fit_are_refused_before_any_runs():
    model = resident(2)
    called = []
    for expert in model.experts:
        expert.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(ValueError, match=r"room: expected at least [\d,]+ bytes, which the 4 exp"):
        model(batch()[0])
    assert not called


def test_moments_are_made_where_the_parameters_rest_and_are_those_of_torch():
    def step(model, begin=lambda optimizer: optimizer):
        optimizer = begin(torch.optim.AdamW(model.parameters(), fused=True))
        torch.manual_seed(1)
        for seed in range(3):
            x, y = batch(seed=seed)
            optimizer.zero_grad()
            hp.HubPathwayLoss()(model(x, target=y), y).total.backward()
            optimizer.step()
        return optimizer.state_dict()["state"]

    model = resident(M)
    mine, theirs = step(model, start_moments), step(build(executor="sequential"))
    assert mine.keys() == theirs.keys()
    for number, state in theirs.items():
        assert same(mine[number], state)
    weights = [s["exp_avg"] for s in mine.values()]
    assert sum(map(rests, weights)) == sum(len(list(e.parameters())) for e in build().experts)


@pytest.mark.parametrize("write", ["in place", "by its data", "trained"])
def test_what_is_written_to_a_saved_files_memory_is_kept(tmp_path, write):
    model = opened(saved(tmp_path), room=2)
    with torch.no_grad():
        model(batch()[0])
    weight = model.experts[0][6].weight
    before = weight.detach().clone()
    expected = before + 1
    if write == "in place":
        with torch.no_grad():
            weight += 1
    elif write == "by its data":
        weight.data.copy_(expected)
    else:
        weight.grad = torch.full_like(weight, -1)
        torch.optim.SGD([weight], lr=1.0, fused=True).step()
    for each in model.executor._residents.values():
        each.place.wanted = False
    release(model.parameters())
    assert torch.equal(weight, expected)
    assert torch.equal(opened(tmp_path / "hub").experts[0][6].weight, before)


@pytest.mark.parametrize("what", ["removed", "replaced"])
def test_a_file_that_is_not_what_was_opened_is_named_with_its_expert(tmp_path, what):
    folder = saved(tmp_path)
    model = opened(folder, room=2)
    for path in sorted((folder / "experts").iterdir()):
        if what == "removed":
            path.unlink()
        else:
            os.utime(path, ns=(1, 1))
    with torch.no_grad(), pytest.raises(OSError, match=rf"experts\[\d\] .* {what}"):
        model(batch()[0])


def test_a_disk_without_room_is_an_error_that_says_what_to_do(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="set TMPDIR to a larger disk"):
        resident(2)(batch()[0])


def test_copies_and_changed_parts_rest_for_themselves():
    model = resident(M)
    before = train(model, 1)
    copied = copy.deepcopy(model)
    assert not any(map(rests, copied.parameters()))
    kept = {name: tensor.clone() for name, tensor in before.items()}
    train(copied, 2)
    assert same(model.state_dict(), kept)
    model.experts[1][6] = nn.Linear(32, 6)
    model.to(memory_format=torch.channels_last)
    expected = copy.deepcopy(model)
    expected.executor = "sequential"
    assert same(train(model, 2), train(expected, 2))
    assert rests(model.experts[1][6].weight)


def test_parameters_that_experts_share_stay_in_memory_and_one():
    def tie(model):
        model.experts[1][6].weight = model.experts[0][6].weight
        return model

    mine, expected = tie(resident(M)), tie(build(executor="sequential"))
    assert same(train(mine, 3), train(expected, 3))
    assert mine.experts[1][6].weight is mine.experts[0][6].weight
    assert not rests(mine.experts[0][6].weight)


def test_threads_run_those_that_fit_at_once():
    mine, expected = resident(3, inner="threads"), build(executor="sequential")
    mine.eval()
    expected.eval()
    with torch.no_grad():
        assert torch.equal(mine(batch()[0]), expected(batch()[0]))
    assert "around threads" in str(mine.executor_report())


@pytest.mark.parametrize(
    ("room", "read"),
    [("8GB", (8 * 10**9, None)), ("1.5 GiB", (3 * 2**29, None)), ("500MB", (500 * 10**6, None)),
     ("96B", (96, None)), (4, (None, 4)), ("4", (None, 4))],
)  # fmt: skip
def test_room_is_bytes_or_experts(room, read):
    assert read_room(room) == read


@pytest.mark.parametrize("room", [0, -1, True, "", "8", "0GB", "8 apples", 2.5, None])
def test_other_rooms_are_refused(room):
    if room == "8":
        assert read_room(room) == (None, 8)
        return
    with pytest.raises(ValueError, match="room: expected bytes such as '8GB'"):
        read_room(room)


def model_with(experts=None, **options):
    experts = experts or [conv_expert() for _ in range(M)]
    return hp.HubPathway(experts, hp.PathwayGenerator(M, width=4), k=2, **options)


def test_a_room_below_k_experts_is_refused_with_bytes():
    size = sum(t.nbytes for t in (*conv_expert().parameters(), *conv_expert().buffers()))
    with pytest.raises(ValueError, match=rf"room: expected at least {2 * size:,} bytes, k=2 times"):
        model_with(executor="resident", room=f"{2 * size - 1}B")
    with pytest.raises(ValueError, match="room: expected at least k=2 experts, got 1"):
        model_with(executor="resident", room=1)
    model_with(executor="resident", room=f"{2 * size}B")


def test_room_and_executor_belong_together():
    with pytest.raises(ValueError, match="room: executor='resident' needs one"):
        model_with(executor="resident")
    with pytest.raises(ValueError, match="room: is of executor='resident', got 2 with 'auto'"):
        model_with(room=2)


class Outside(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer = conv_expert()
        if kind == "tensor":
            self.seen = torch.zeros(3)
        elif kind == "list":
            self.seen = [torch.zeros(3)]

    def forward(self, x):
        return self.layer(x)


class Extra(Outside):
    def get_extra_state(self):
        return {}

    def set_extra_state(self, state):
        pass


@pytest.mark.parametrize(
    ("expert", "what"),
    [(Outside("tensor"), "the tensor seen"), (Outside("list"), "the tensor seen"),
     (Extra("none"), r"get_extra_state\(\)")],
)  # fmt: skip
def test_state_outside_parameters_and_buffers_is_refused_with_its_expert(expert, what):
    experts = [conv_expert() for _ in range(M - 1)] + [nn.Sequential(expert)]
    with pytest.raises(ValueError, match=rf"experts\[3\] .*, in 0 \(\w+\): {what}"):
        model_with(experts, executor="resident", room=2)


def cut_off(tmp_path):
    for file in (tmp_path / "hub" / "experts").iterdir():
        os.truncate(file, 0)


@torch.inference_mode()
def predict(model):
    return model(batch()[0])


@pytest.mark.parametrize("what", ["run", "again", "save"])
def test_a_file_that_was_cut_off_is_an_error_and_not_the_end_of_the_process(tmp_path, what):
    """Also of an expert that is in memory, and after an attempt that failed."""
    model = opened(saved(tmp_path), room=M)
    predict(model)
    cut_off(tmp_path)
    for _ in range(2 if what == "again" else 1):
        with pytest.raises(OSError, match="was replaced or changed while its model is in use"):
            predict(model) if what != "save" else model.save_pretrained(tmp_path / "other")


def test_a_hub_can_be_saved_over_the_folder_that_it_was_opened_from(tmp_path):
    model = opened(saved(tmp_path), room=2)
    before = predict(model)
    model.save_pretrained(tmp_path / "hub")
    assert torch.equal(predict(model), before)
    assert torch.equal(predict(opened(tmp_path / "hub", room=2)), before)


def test_a_room_of_some_experts_is_of_their_parameters_in_predictions():
    model = resident(M)
    x, y = batch()
    optimizer = torch.optim.AdamW(model.parameters())
    start_moments(optimizer)
    hp.HubPathwayLoss()(model.train()(x), y).total.backward()
    optimizer.step()
    optimizer.zero_grad()
    largest = max(sum(t.nbytes for t in (*e.parameters(), *e.buffers())) for e in model.experts)
    predict(model.eval())
    assert model.executor_report().room == M * largest


def test_a_prediction_that_records_gradients_is_told_how_to_record_none(tmp_path):
    size = max(sum(t.nbytes for t in e.state_dict().values()) for e in build().experts)
    model = opened(saved(tmp_path), room=f"{2 * size}B")
    with pytest.raises(ValueError, match=r"predict within torch.inference_mode\(\)"):
        model(batch()[0])
    assert all(resident.place.files for resident in model.executor._residents.values())


def test_an_expert_that_is_larger_than_the_room_cannot_join():
    model = build(executor="sequential")
    size = max(sum(t.nbytes for t in (*e.parameters(), *e.buffers())) for e in model.experts)
    model.executor = ResidentExecutor(f"{2 * size}B")
    predict(model.eval())
    model.experts[0] = nn.Sequential(model.experts[0], nn.Linear(size, 1)).eval()
    with pytest.raises(ValueError, match="room: expected at least"):
        predict(model)


def test_a_new_optimizer_takes_the_place_of_the_one_before():
    model = resident(M)
    x, y = batch()
    model.executor.settle(model.experts)
    sizes, config = [], TrainerConfig()
    for _ in range(3):
        optimizer = build_optimizer(model, default_groups(model, config), config)
        hp.HubPathwayLoss()(model.train()(x), y).total.backward()
        optimizer.step()
        optimizer.zero_grad()
        del optimizer
        sizes.append([r.place.state_nbytes for r in model.executor._residents.values()])
    assert sizes[0] == sizes[1] == sizes[2]


def test_backward_through_frozen_layers_is_counted_as_a_use():
    expert = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 64), nn.Linear(64, 64))
    expert.requires_grad_(False)
    expert[0].requires_grad_(True)
    assert Resident(expert, set(), (), None).touched_again
    expert[0].requires_grad_(False)
    expert[2].bias.requires_grad_(True)
    assert not Resident(expert, set(), (), None).touched_again
