"""Hubs for the digits: which expert descends from which, and the cache of their weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hubpath_fast.compare import digits_hub
from hubpath_fast.compare.digits_hub import DigitsHub, Pretraining, expert_store
from hubpath_fast.compare.problems import open_problem
from hubpath_fast.compare.settings import make_settings, names_of_experts
from hubpath_fast.data import DigitsTask
from hubpath_fast.hub import build_experts

# A rate of almost nothing: what an expert starts from is what it ends with.
STILL = Pretraining(epochs=1, batch_size=350, lr=1e-30)


def kernels(hub: DigitsHub) -> list[torch.Tensor]:
    networks = [member.network for member in hub.members]
    experts = build_experts(networks, 10, pretrained=False, input_size=32)
    for i, expert in enumerate(experts):
        hub.load(i, expert)
    return [next(expert.body.parameters()) for expert in experts]


def test_a_hub_of_equal_networks_descends_from_its_first(tmp_path):
    task = DigitsTask(0, 100)
    hub = DigitsHub(task, STILL, ("timm/test_resnet",) * 3, tmp_path)
    assert [member.before for member in hub.missing()] == [(), (0,), (0,)]
    first, *others = kernels(hub)
    assert all(torch.equal(first, other) for other in others)
    folders = sorted(path.name.partition("-")[0] for path in (tmp_path / "digits").iterdir())
    assert folders == ["inverted", "turned", "upright"]
    assert hub.missing() == []

    alone = DigitsHub(task, STILL, ("test_resnet",), tmp_path)
    assert alone.missing() == []  # the ancestor is the same, and in the cache
    assert torch.equal(kernels(alone)[0], first)


def test_what_is_frozen_in_fine_tuning_is_pretrained_all_the_same():
    task, frozen = DigitsTask(0, 100), "timm/test_resnet?lr=0.1&freeze=body&size=64"
    [own] = DigitsHub(task, STILL, (frozen,)).members
    [same] = DigitsHub(task, STILL, ("test_resnet?size=64",)).members
    assert (own.network, own.key) == ("test_resnet?size=64", same.key)


def test_a_mixed_hub_does_not(tmp_path):
    networks = ("test_resnet", "test_efficientnet", "test_resnet")
    hub = DigitsHub(DigitsTask(0, 100), STILL, networks, tmp_path)
    assert [member.before for member in hub.missing()] == [(), (), ()]
    first, _, last = kernels(hub)
    assert not torch.equal(first, last)


def test_an_expert_alone_needs_no_other(tmp_path):
    """A fine-tuning starts as soon as its own expert is pre-trained."""
    settings = make_settings("digits", "test_resnet,test_efficientnet", top={"k": 1})
    problem = open_problem(settings.replace(digits_pretrain_epochs=1), 0, cache=tmp_path)
    state, _ = problem.hub.pretrain(1)
    torch.manual_seed(0)
    alone = problem.expert(1)
    assert torch.equal(next(alone.body.parameters()), next(iter(state.values())))
    assert [member.index for member in problem.hub.missing()] == [0]
    torch.manual_seed(0)
    together = problem.experts()[1]  # pre-trains the other
    for own, same in zip(alone.module.parameters(), together.module.parameters(), strict=True):
        assert torch.equal(own, same)
    assert problem.hub.missing() == []


def test_a_damaged_file_is_noticed_and_made_again(tmp_path):
    hub = DigitsHub(DigitsTask(0, 100), STILL, ("test_resnet",), tmp_path)
    before = kernels(hub)[0]
    weights = next(tmp_path.glob("digits/upright-*/model.safetensors"))
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    assert [member.rendering for member in hub.missing()] == ["upright"]
    assert "is damaged; pre-training it again" in hub.notes[0]
    assert torch.equal(kernels(hub)[0], before)
    assert weights.read_bytes() == whole  # pre-training is reproducible to the bit


def test_the_key_stays_what_it_is(monkeypatch):
    """Whatever changes it makes everyone pre-train again: only what changes the weights may."""
    monkeypatch.setattr(digits_hub, "version", lambda name: "1.0.31")
    monkeypatch.setattr(torch, "__version__", "2.14.1+cu130")
    members = DigitsHub(DigitsTask(0, 100), Pretraining()).members
    assert [member.folder.name for member in members] == [
        "upright-314abd6ace9f846b", "inverted-b4dee41854c23b23", "turned-d61b06bf67bcda9f",
        "edges-f6c0ceb50088a7a0", "checkerboard-677b55d55f6ce8c1",
    ]  # fmt: skip


@pytest.mark.parametrize("writable", [True, False])
def test_experts_are_kept_where_they_can_be(tmp_path, monkeypatch, writable):
    cache = tmp_path / "file" / "cache"
    if writable:
        cache = tmp_path / "cache"
    else:
        (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(digits_hub, "user_cache_folder", lambda: cache)
    out = Path("out")
    assert expert_store(out) == (cache if writable else out / "experts")


def test_all_experts_may_know_one_rendering():
    """Alike on purpose: other draws of one training, each with a key of its own."""
    settings = make_settings("digits", "tiny").replace(digits_rendering="turned")
    hub = open_problem(settings, 0).hub
    assert {member.rendering for member in hub.members} == {"turned"}
    assert len({member.key for member in hub.members}) == 5
    [first, *_] = open_problem(make_settings("digits", "tiny"), 0).hub.members
    assert first.rendering == "upright"
    assert first.key not in {m.key for m in hub.members}
    assert names_of_experts(settings) == tuple(f"turned #{i}" for i in range(1, 6))
    assert "digits_rendering" not in make_settings("digits", "tiny").identity()
    assert settings.identity()["digits_rendering"] == "turned"
