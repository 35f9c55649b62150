"""Experts that come to a device, on a stand-in whose copies are late: results are those of all that
are there, to the bit, and no more of its memory is taken than the room and two experts."""

import copy

import pytest
import torch
from support import large_hub
from support.models import M, batch, build, train
from support.stand_in_device import LateTransfers, on_stand_in
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors import ResidentExecutor
from hubpath_fast.executors.resident.resident import on_host
from hubpath_fast.resting import own_tensors


def pair(room, monkeypatch, change=lambda model: model, inner="auto"):
    """The same model twice: with experts that come to the stand-in, and with all there; and it."""
    mine, expected = change(build("sequential")), change(build("sequential"))
    mine.executor = ResidentExecutor(room, inner)
    return mine, expected, on_stand_in(mine, monkeypatch)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def largest(model):
    return max(sum(-(-t.nbytes // 64) * 64 for t in own_tensors(e)) for e in model.experts)


def freeze_bodies(model):
    for expert in model.experts:
        expert[:-1].requires_grad_(False)
    return model


def test_predictions_are_those_of_all_on_the_device_in_the_memory_of_the_room(monkeypatch):
    mine, expected, device = pair(2, monkeypatch)
    mine.eval(), expected.eval()
    sizes = [3, 1, 24, 2, 1, 3]
    with torch.inference_mode():
        for step, n in enumerate(sizes):
            x, _ = batch(n=n, seed=step)
            eps = 100 * torch.randn(n, M, generator=torch.Generator().manual_seed(step))
            assert torch.equal(mine(x, eps=eps), expected(x, eps=eps))
    report = mine.executor_report()
    assert report.hits > 0
    assert report.misses > M
    assert device.peak <= 4 * largest(mine)
    # Nothing was written there, so nothing came back.
    copied = sum(-(-t.nbytes // 64) * 64 for t in own_tensors(mine.experts[0]))
    assert device.copied == report.misses * copied
    assert report.seconds_running > 0
    assert "copies to the device took" in str(report)


def test_trained_experts_are_those_that_were_there_all_along(monkeypatch):
    mine, expected, _ = pair(M, monkeypatch)
    assert same(train(mine, 4), train(expected, 4))


def test_experts_that_leave_between_updates_take_their_momentum_along(monkeypatch):
    mine, expected, device = pair(3, monkeypatch, without_dropout_in_few)
    found = [few_experts(model, steps=12) for model in (mine, expected)]
    assert same(*found)
    assert mine.executor_report().misses > M
    footprint = 3 * largest(mine)  # with gradients, which the stand-in does not count, and momentum
    assert device.peak <= (3 + 2) * footprint


def without_dropout_in_few(model):
    for expert in model.experts:
        expert[3].p = 0.0
    return model


def few_experts(model, steps, make=None):
    """Parameters, buffers and an optimizer's state after steps of two samples, on two experts."""
    make = make or (lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9))
    optimizer = make(model.parameters())
    torch.manual_seed(1)
    for step in range(steps):
        x, y = batch(n=2, seed=step)
        eps = torch.zeros(2, M)
        eps[:, [step % M, (step // 2 + 1) % M]] = 1000
        optimizer.zero_grad()
        hp.HubPathwayLoss()(model(x, target=y, eps=eps), y).total.backward()
        optimizer.step()
    state = {
        f"{i} {key}": value
        for i, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
        if isinstance(value, torch.Tensor)
    }
    return {**model.state_dict(), **state}


@pytest.mark.parametrize("fused", [False, True])
def test_any_optimizer_finds_its_state_where_the_parameters_are(fused, monkeypatch):
    mine, expected, _ = pair(3, monkeypatch, without_dropout_in_few)

    def adamw(params):
        return torch.optim.AdamW(params, lr=0.01, fused=fused)

    assert same(*(few_experts(model, 8, adamw) for model in (mine, expected)))


def test_frozen_bodies_leave_before_the_backward_pass(monkeypatch):
    mine, expected, _ = pair(3, monkeypatch, freeze_bodies)
    assert same(train(mine, 4), train(expected, 4))
    assert mine.executor_report().misses > M


def test_what_the_backward_pass_needs_of_frozen_parts_outlives_their_leaving(monkeypatch):
    def freeze_heads(model):
        for expert in model.experts:
            expert[-1].requires_grad_(False)
        return model

    mine, expected, _ = pair(M, monkeypatch, freeze_heads)
    assert same(train(mine, 3), train(expected, 3))
    # Predictions that are differentiated by the samples, of experts that have all left.
    mine, expected, _ = pair(2, monkeypatch, lambda m: m.eval().requires_grad_(False))
    gradients = []
    for model in (mine, expected):
        x = batch()[0].requires_grad_()
        out = model(x)
        if model is mine:
            for resident in model.executor._residents.values():
                resident.place.home()
            for parameter in model.experts.parameters():
                parameter.data.zero_()  # at home: what was recorded is elsewhere
        out.square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


def test_what_is_to_get_gradients_stays_while_others_are_asked(monkeypatch):
    mine, expected, _ = pair(3, monkeypatch, without_dropout_in_few)

    def ask(model, experts):
        eps = torch.zeros(4, M)
        eps[:, experts] = 1000
        return model(batch(n=4)[0], eps=eps).prediction

    gradients = []
    for model in (mine, expected):
        first = ask(model, [0, 1])
        with torch.no_grad():
            ask(model, [2, 3])
        first.square().sum().backward()
        with torch.no_grad():
            ask(model, [2, 3])
        ask(model, [1, 0]).sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert same(*gradients)


def test_staging_memory_is_written_to_once_its_last_copy_is_done(monkeypatch):
    transfers, found = LateTransfers(monkeypatch), []
    for value in range(5):
        there = transfers.memory(8)
        with transfers.staging(8) as staging:
            transfers.bring(there, staging.fill_(value))
        found.append(there)
    last = transfers.memory(1)
    transfers.use(last, transfers.bring(last, torch.zeros(1, dtype=torch.uint8)))
    assert [t.tolist() for t in found] == [[value] * 8 for value in range(5)]


def test_more_trained_experts_than_fit_are_refused_before_any_runs(monkeypatch):
    mine, _, device = pair(2, monkeypatch)
    with pytest.raises(ValueError, match=r"room: expected at least [\d,]+ bytes, which the 4 exp"):
        mine(batch()[0])
    assert device.peak == 0


def test_what_is_written_at_home_or_there_is_kept(monkeypatch):
    mine, expected, _ = pair(2, monkeypatch)
    mine.eval(), expected.eval()
    x = batch()[0]
    with torch.no_grad():
        for _ in range(2):  # some experts are there, others not
            for model in (mine, expected):
                for parameter in model.experts.parameters():
                    parameter.mul_(1.5)
            assert torch.equal(mine(x), expected(x))
    assert same(mine.state_dict(), expected.state_dict())


def test_a_copy_and_a_model_with_changed_parts_have_their_own(monkeypatch):
    mine, expected, _ = pair(M, monkeypatch)
    train(mine, 1), train(expected, 1)
    copied = copy.deepcopy(mine)
    kept = {name: t.clone() for name, t in mine.state_dict().items()}
    copied.executor = "sequential"
    for expert in copied.experts:
        expert._forward_pre_hooks.clear()
    train(copied, 1)
    assert same(mine.state_dict(), kept)
    for model in (mine, expected):
        torch.manual_seed(0)
        model.experts[1][6] = nn.Linear(32, 6)
        model.double()
    x = batch()[0].double()
    with torch.no_grad():
        assert torch.equal(mine.eval()(x), expected.eval()(x))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_runs_from_a_saved_hub_are_those_of_all_there_killed_and_resumed(
    optimizer, tmp_path, monkeypatch
):
    folder = large_hub.save_hub(tmp_path / "hub", 6)

    def opened(room):
        model = large_hub.open_hub(folder, room)
        if room is not None:
            devices.append(on_stand_in(model, monkeypatch))
        return model

    devices = []
    mine = opened(4)
    assert large_hub.predict(mine) == large_hub.predict(opened(None))
    misses = mine.executor_report().misses
    assert devices[0].staged >= misses > 0, "from the files' memory copies go through staging"
    few = large_hub.FEW
    expected = large_hub.train(opened(None), tmp_path / "all", few, optimizer)
    large_hub.train(opened(4), tmp_path / "mine", few, optimizer, killed=large_hub.KILLED_AT)
    found = large_hub.train(opened(4), tmp_path / "mine", few, optimizer, resume=True)
    assert found == expected


def test_saving_leaves_no_memory_of_the_device_with_what_was_saved(tmp_path, monkeypatch):
    mine, expected, device = pair(M, monkeypatch)
    train(mine, 2), train(expected, 2)
    assert device.taken > 0
    mine.save_pretrained(tmp_path / "hub")
    assert device.taken == 0
    assert same(train(mine, 2), train(expected, 2))


def test_graphs_which_hold_addresses_are_refused():
    with pytest.raises(ValueError, match=r"inner: expected .*, got 'graphs', which hold the addr"):
        ResidentExecutor(2, inner="graphs")


def test_copies_in_another_precision_do_not_outlive_an_experts_stay(monkeypatch):
    mine, expected, _ = pair(2, monkeypatch)
    mine.eval(), expected.eval()
    x, weight = batch()[0], mine.experts[0][6].weight
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mine(x)
        weight.mul_(2)
        expected.experts[0][6].weight.mul_(2)
        assert torch.equal(mine(x), expected(x))


def test_a_file_that_was_removed_is_named_and_leaves_nothing_on_the_device(tmp_path, monkeypatch):
    folder = large_hub.save_hub(tmp_path / "hub", 4)
    model = large_hub.freeze_bodies(large_hub.open_hub(folder, 4))
    device = on_stand_in(model, monkeypatch)
    model.executor.settle(model.experts)
    for resident in model.executor._residents.values():
        resident.place._trained.leave_files()  # as if it had been trained
    for path in (folder / "experts").iterdir():
        path.unlink()
    with pytest.raises(OSError, match=r"experts\[\d\] .* removed"):
        large_hub.predict(model)
    device.finish()
    assert device.taken == 0


def test_an_expert_that_fails_leaves_the_others_as_they_are(monkeypatch):
    mine, expected, _ = pair(2, monkeypatch)
    mine.eval(), expected.eval()

    def fail(*_):
        raise RuntimeError("out of luck")

    failing = mine.experts[1].register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="out of luck"):
            mine(batch()[0])
        failing.remove()
        assert torch.equal(mine(batch()[0]), expected(batch()[0]))


def test_a_tensor_of_the_host_stays_there_when_its_model_moves():
    """With the meta device in place of CUDA's: it has no values to bring back."""
    weight = nn.Parameter(torch.ones(8, 3, 3, 3).to(memory_format=torch.channels_last))
    assert on_host(lambda t: t.to("meta"), weight) is weight
    assert on_host(lambda t: t.double(), weight).dtype == torch.float64
    with pytest.raises(NotImplementedError):  # another layout: all of it would go there and back
        on_host(lambda t: t.to("meta").contiguous(), weight)
