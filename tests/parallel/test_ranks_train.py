"""Training on several ranks is that of one process on the same global batches, in float64: after
ten steps parameters, statistics, losses and the gradients' norm agree to 1e-10.

Each rank sums its own samples first, so that results differ by the order of sums alone, some 1e-16
a step. After ten that is below 1e-13 with SGD, and more with AdamW, which divides by the size of
gradients.
"""

from typing import NamedTuple

import pytest
import torch
from support.processes import connected, run_ranks
from support.records import assert_records_close
from support.shared_runs import Hub, build, history_of, make, state_of

SGD = {"optimizer": "sgd", "momentum": 0.9, "lr_expert": 0.05, "lr_router": 0.05, "lr_head": 0.05}
ADAMW = {"optimizer": "adamw", "lr_expert": 0.003, "weight_decay": 0.1}
ONE_TAKES_ALL, TWO_TAKE_ALL = (9.0, 0.0, 0.0, 0.0), (9.0, 9.0, 0.0, 0.0)
PLAIN = {"batch_norm": False}  # replicas see their own samples' batch statistics


class Case(NamedTuple):
    ranks: int
    layout: str
    hub: Hub
    settings: dict


CASES = {
    "ep, BatchNorm, SGD, clipped": Case(2, "ep", Hub(), SGD | {"clip_norm": 0.5}),
    "ep, AdamW, three micro-batches": Case(2, "ep", Hub(), ADAMW | {"accumulate": 3}),
    "ep, a router with BatchNorm": Case(2, "ep", Hub(router_norm=True), SGD | {"accumulate": 3}),
    "ep, all experts active": Case(2, "ep", Hub(k=4), SGD | {"clip_norm": 0.5}),
    "ep, one expert takes all": Case(2, "ep", Hub(k=1, bias=ONE_TAKES_ALL), ADAMW),
    "ep, a rank without rows": Case(2, "ep", Hub(bias=TWO_TAKE_ALL), SGD | {"clip_norm": 0.5}),
    "dp, SGD, clipped": Case(2, "dp", Hub(**PLAIN), SGD | {"clip_norm": 0.5}),
    "dp, AdamW, three micro-batches": Case(2, "dp", Hub(**PLAIN), ADAMW | {"accumulate": 3}),
    "dp, experts without rows": Case(2, "dp", Hub(bias=TWO_TAKE_ALL, **PLAIN), ADAMW),
    "dp, experts with rows on one replica": Case(
        2, "dp", Hub(8, 1, **PLAIN), ADAMW | {"batch_size": 4, "clip_norm": 0.5}
    ),
    "2x2, SGD, clipped, three micro-batches": Case(
        4, "2x2", Hub(5, **PLAIN), SGD | {"clip_norm": 0.5, "accumulate": 3}
    ),
    "2x2, AdamW, experts without rows": Case(4, "2x2", Hub(bias=TWO_TAKE_ALL, **PLAIN), ADAMW),
    "ep of four, BatchNorm": Case(4, "ep", Hub(6, 1), SGD | {"accumulate": 3, "clip_norm": 0.5}),
    "ep, a rank that owns nothing": Case(
        4, "ep", Hub(3, owners=(0, 1, 3)), ADAMW | {"clip_norm": 0.5}
    ),
    "2x2, a router with BatchNorm": Case(
        4, "2x2", Hub(router_norm=True, **PLAIN), SGD | {"accumulate": 3, "clip_norm": 0.5}
    ),
    "dp of four, all experts active": Case(4, "dp", Hub(3, 3, **PLAIN), SGD),
}


def train(case, ranks, out):
    model = build(case.hub, ranks)
    result = make(model, out, ranks, **case.settings).fit()
    return state_of(model), history_of(result)


def rank_main(rank, names, folder):
    found = {}
    for i, name in enumerate(names):
        ranks = connected(CASES[name].layout)
        found[name] = train(CASES[name], ranks, folder / str(i))
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    results = {}
    for ranks in (2, 4):
        names = [name for name, case in CASES.items() if case.ranks == ranks]
        folder = tmp_path_factory.mktemp("ranks")
        for each in run_ranks(rank_main, ranks, folder, names, folder):
            for name, value in each.items():
                results.setdefault(name, []).append(value)
    return results


@pytest.mark.parametrize("name", CASES)
def test_ten_steps_on_ranks_are_those_of_one_process(found, name, tmp_path):
    state, history = train(CASES[name], connected(), tmp_path)
    assert len(history) == 10
    seen = set()
    for own_state, own_history in found[name]:
        for key, value in own_state.items():
            torch.testing.assert_close(value, state[key], rtol=0, atol=1e-10, msg=key)
            seen.add(key)
        assert_records_close(own_history, history, 1e-10)
    assert seen == set(state)


def test_all_ranks_have_the_same_router_and_history_to_the_bit(found):
    for name, each in found.items():
        (first, history), *others = each
        for state, its_history in others:
            assert its_history == history, name
            for key in first.keys() & state.keys():
                assert torch.equal(first[key], state[key]), (name, key)
