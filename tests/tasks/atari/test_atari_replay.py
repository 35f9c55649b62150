"""The replay against a list of all steps ever added, of which every window is looked up in turn."""

from __future__ import annotations

import copy
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from support.replays import SHAPE, Steps, filled

from hubpath_fast.tasks.atari import PrioritizedReplay

CASES = {  # capacity, history, n_step, (terminated, truncated), steps
    "n longer than history, the ring not full": (90, 4, 6, (0.05, 0.05), 80),
    "n shorter than history": (70, 4, 2, (0.1, 0.1), 60),
    "episodes shorter than n and than history": (40, 5, 20, (0.3, 0.2), 100),
    "one long episode, three times round": (30, 4, 7, (0.0, 0.0), 100),
    "round a small ring, short episodes": (17, 4, 5, (0.15, 0.15), 120),
    "a ring smaller than a window": (6, 4, 20, (0.15, 0.15), 120),
    "a ring smaller than a state": (3, 5, 1, (0.1, 0.1), 60),
    "single steps, single frames, a ring of one": (1, 1, 1, (0.5, 0.3), 30),
    "single steps": (40, 1, 1, (0.2, 0.2), 100),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_window_is_what_a_plain_loop_finds(case):
    capacity, history, n, ends, count = case
    replay = PrioritizedReplay(capacity, SHAPE, history, n, gamma=0.9)
    steps, seen = Steps(count, ends), 0
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        steps.add_to(replay)
        assert len(replay) == min(step + 1, capacity)
        stored = range(max(0, step + 1 - capacity), step + 1)
        windows = {s % capacity: steps.window(s, replay) for s in stored}
        known = {slot for slot, window in windows.items() if window}
        # No priority was changed, so that all have the same.
        expected = torch.zeros(capacity, dtype=torch.float64)
        expected[sorted(known)] = 1 / max(1, len(known))
        torch.testing.assert_close(replay.probabilities(), expected, rtol=1e-15, atol=0)
        if not known:
            continue
        batch = replay.sample(3 * len(known), 0.5, generator)
        # The parts are a third of a window wide, so that each holds or touches every one.
        assert set(batch.indices.tolist()) == known
        for row, slot in enumerate(batch.indices.tolist()):
            state, action, total, discount, after = windows[slot]
            assert np.array_equal(batch.states[row], state)
            assert batch.actions[row] == action
            assert batch.returns[row] == np.float32(total)
            assert batch.discounts[row] == np.float32(discount)
            assert np.array_equal(batch.next_states[row], after)
            seen += 1
    assert seen > count / 2


def test_types_and_shapes_of_a_batch():
    replay = PrioritizedReplay(50, SHAPE, history=3, n_step=2)
    steps = Steps(0, (0.1, 0.1))
    for _ in range(30):
        steps.add_to(replay)
    batch = replay.sample(5, 0.4, torch.Generator())
    assert {name: (value.dtype, tuple(value.shape)) for name, value in vars(batch).items()} == {
        "indices": (torch.int64, (5,)),
        "states": (torch.uint8, (5, 3, *SHAPE)),
        "actions": (torch.int64, (5,)),
        "returns": (torch.float32, (5,)),
        "discounts": (torch.float32, (5,)),
        "next_states": (torch.uint8, (5, 3, *SHAPE)),
        "weights": (torch.float32, (5,)),
    }


def test_frames_and_tensors_that_were_added_may_change_afterwards():
    replay = PrioritizedReplay(10, SHAPE, history=1, n_step=1)
    frame, after = torch.full(SHAPE, 7, dtype=torch.uint8), np.full(SHAPE, 9, np.uint8)
    replay.add(frame, 0, 0.0, False, True, after)
    frame.zero_()
    after[:] = 0
    batch = replay.sample(1, 1.0, torch.Generator())
    assert (batch.states == 7).all()
    assert (batch.next_states == 9).all()
    batch.states.zero_()
    batch.actions.fill_(5)
    again = replay.sample(1, 1.0, torch.Generator())
    assert (again.states == 7).all()
    assert again.actions.tolist() == [0]


def test_a_step_that_is_both_is_terminal_and_needs_no_frame_after_it():
    replay = PrioritizedReplay(10, SHAPE)
    replay.add(np.ones(SHAPE, np.uint8), 0, 1.0, True, True)
    batch = replay.sample(1, 1.0, torch.Generator())
    assert batch.discounts.tolist() == [0.0]
    assert not batch.next_states.any()


def test_probabilities_are_the_losses_to_the_exponent():
    for exponent in (0.0, 0.5, 0.7, 1.0):
        replay = PrioritizedReplay(8, SHAPE, history=1, n_step=1, exponent=exponent)
        for _ in range(6):
            replay.add(np.ones(SHAPE, np.uint8), 0, 0.0, False, False)
        assert replay.probabilities().tolist() == [0.2] * 5 + [0.0] * 3
        losses = torch.tensor([4.0, 0.25, 9.0], dtype=torch.float64)
        replay.update(torch.tensor([0, 2, 4]), losses)
        masses = [4.0**exponent, 1.0, 0.25**exponent, 1.0, 9.0**exponent, 0.0, 0.0, 0.0]
        expected = [mass / sum(masses) for mass in masses]
        assert replay.probabilities().tolist() == pytest.approx(expected, rel=1e-15)


def test_new_steps_have_the_highest_priority_so_far():
    replay = PrioritizedReplay(8, SHAPE, history=1, n_step=1)

    def add(count: int) -> None:
        for _ in range(count):
            replay.add(np.ones(SHAPE, np.uint8), 0, 0.0, False, False)

    add(3)
    replay.update(torch.tensor([0]), torch.tensor([0.25]))  # below the first priority, 1
    add(1)
    assert replay.probabilities()[:3].tolist() == [0.2, 0.4, 0.4]
    replay.update(torch.tensor([1]), torch.tensor([16.0]))
    replay.update(torch.tensor([1]), torch.tensor([1.0]))  # the highest so far stays 4
    add(2)
    # Steps 0..2 were there before, step 3 waited for the next; step 4 is new, step 5 waits.
    assert (replay.probabilities() * 8).tolist() == pytest.approx(
        [0.5 * 8 / 7.5, 8 / 7.5, 8 / 7.5, 8 / 7.5, 4 * 8 / 7.5, 0, 0, 0]
    )


@pytest.mark.parametrize(("batch", "draws"), [(1, 4000), (8, 1000)])
def test_draws_have_their_probabilities_and_never_fall_on_what_cannot_be_drawn(batch, draws):
    replay, _ = filled()
    expected = replay.probabilities().numpy()
    forbidden = expected == 0
    assert 5 < forbidden.sum() < 35
    generator = torch.Generator().manual_seed(3)
    found = np.zeros(len(expected))
    for _ in range(draws):
        indices = replay.sample(batch, 0.5, generator).indices.numpy()
        found += np.bincount(indices, minlength=len(expected))
    assert not found[forbidden].any()
    wanted = draws * batch * expected[~forbidden]
    statistic = ((found[~forbidden] - wanted) ** 2 / wanted).sum()
    freedom = (~forbidden).sum() - 1
    spread = 4 * math.sqrt(2 * freedom)  # of chi-square: four standard deviations
    assert statistic < freedom + spread
    if batch == 1:  # independent draws; those from parts of the line vary less
        assert statistic > freedom - spread


def test_one_window_is_drawn_from_each_part_of_the_line():
    replay = PrioritizedReplay(9, SHAPE, history=1, n_step=1)
    for _ in range(9):
        replay.add(np.ones(SHAPE, np.uint8), 0, 0.0, False, False)
    generator = torch.Generator()
    for _ in range(50):  # eight windows of equal mass, four parts of two each
        indices = replay.sample(4, 0.5, generator).indices
        assert (indices // 2).tolist() == [0, 1, 2, 3]


def test_weights_are_the_inverse_probabilities_over_the_largest_of_the_batch():
    replay, _ = filled()
    probabilities = replay.probabilities()
    for beta in (0.0, 0.4, 1.0):
        batch = replay.sample(16, beta, torch.Generator().manual_seed(5))
        weights = (len(replay) * probabilities[batch.indices]) ** -beta
        expected = weights / weights.max()
        assert batch.weights.max() == 1
        torch.testing.assert_close(batch.weights, expected.float(), rtol=3e-7, atol=0)
        assert (len(batch.weights.unique()) > 2) == (beta > 0)


def test_windows_overwritten_since_they_were_drawn_keep_the_priority_of_new_ones():
    replay = PrioritizedReplay(4, SHAPE, history=1, n_step=1)
    steps = Steps(0, (0.0, 0.0))
    for _ in range(5):
        steps.add_to(replay)
    drawn = torch.arange(4)  # slot 0 holds the newest, which waits for its next state
    replay.update(drawn, torch.full((4,), 81.0))
    steps.add_to(replay)
    # Now slot 0 can be drawn, by its priority of a new step, 1; slot 1 holds the newest.
    expected = torch.tensor([1.0, 0.0, 9.0, 9.0], dtype=torch.float64) / 19
    torch.testing.assert_close(replay.probabilities(), expected, rtol=1e-15, atol=0)


def test_a_priority_of_zero_can_be_raised_again():
    replay = PrioritizedReplay(4, SHAPE, history=1, n_step=1)
    for _ in range(3):
        replay.add(np.ones(SHAPE, np.uint8), 0, 0.0, False, False)
    replay.update(torch.tensor([0, 1]), torch.tensor([0.0, 0.0]))
    with pytest.raises(ValueError, match=r"no window of its 3 steps .* a priority above 0"):
        replay.sample(1, 0.5, torch.Generator())
    replay.update(torch.tensor([1]), torch.tensor([1.0]))
    assert replay.probabilities().tolist() == [0, 1, 0, 0]


def test_of_equal_indices_the_last_counts():
    replay = PrioritizedReplay(4, SHAPE, history=1, n_step=1)
    for _ in range(3):
        replay.add(np.ones(SHAPE, np.uint8), 0, 0.0, False, False)
    replay.update(torch.tensor([0, 0]), torch.tensor([9.0, 4.0]))
    assert replay.probabilities()[:2].tolist() == pytest.approx([2 / 3, 1 / 3])


@pytest.mark.parametrize("count", [0, 3, 25, 100])
def test_a_restored_replay_goes_on_as_the_saved_one(count, tmp_path):
    if count:
        replay, steps = filled(count)
    else:
        replay, steps = PrioritizedReplay(40, SHAPE, n_step=3), Steps(0, (0.1, 0.1))
    twin = copy.deepcopy(steps)
    torch.save(replay.state_dict(), tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    other, _ = filled(77, seed=9)  # whatever was in it
    other.load_state_dict(saved)
    assert len(other) == len(replay)
    assert torch.equal(other.probabilities(), replay.probabilities())
    replays = (replay, other)
    generators = [torch.Generator().manual_seed(4) for _ in replays]
    for _ in range(90):
        for made, added in zip(replays, (steps, twin), strict=True):
            added.add_to(made)
        if not replay.probabilities().any():
            continue
        one, two = (r.sample(7, 0.6, g) for r, g in zip(replays, generators, strict=True))
        for name, value in vars(one).items():
            assert torch.equal(value, getattr(two, name)), name
        for made in replays:
            made.update(one.indices, one.returns.abs() + 0.1)
        assert torch.equal(other.probabilities(), replay.probabilities())
    one, two = (made.state_dict() for made in replays)
    assert one.keys() == two.keys()
    assert all(torch.equal(one["items"][name], two["items"][name]) for name in one["items"])
    assert torch.equal(one["priorities"], two["priorities"])


def test_a_saved_state_does_not_change_with_the_replay():
    replay, steps = filled()
    state = replay.state_dict()
    before = state["items"]["frames"].clone(), state["priorities"].clone()
    for _ in range(30):
        steps.add_to(replay)
    replay.update(torch.arange(40), torch.full((40,), 3.0))
    assert torch.equal(state["items"]["frames"], before[0])
    assert torch.equal(state["priorities"], before[1])


def change(path: str, value):
    """A state in which one entry is another."""

    def changed(state: dict) -> dict:
        *names, last = path.split("/")
        inner = state
        for name in names:
            inner = inner[name]
        inner[last] = value(inner[last]) if callable(value) else value
        return state

    return changed


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: {}, "state: .*damaged .*lacks 'items'"),
        (change("settings", lambda s: {"n_step": 3}), "capacity: the saved replay has None"),
        (lambda state: None, "state: .*damaged"),
        (lambda state: state | {"items": {}}, "state: .*damaged .*lacks 'frames'"),
        (change("settings/n_step", 5), "n_step: the saved replay has 5, this one 3"),
        (change("settings/capacity", 41), "capacity: the saved replay has 41, this one 40"),
        (change("settings", None), "state: .*damaged"),
        (change("count", 1000.5), "state: .*damaged"),
        (change("count", 39), "state: .*damaged .*priorities"),
        (change("open", 61), "state: .*damaged .*counters"),
        (change("highest", math.nan), "state: .*damaged .*counters"),
        (change("priorities", lambda p: p[1:]), "state: .*damaged .*priorities"),
        (change("priorities", lambda p: -p), "state: .*damaged .*negative"),
        (change("priorities", lambda p: p / 0), "state: .*damaged .*finite"),
        (change("priorities", lambda p: p.float()), "state: .*damaged .*priorities"),
        (change("items/frames", lambda f: f[1:]), "state: .*damaged .*do not fit"),
        (change("items/frames", lambda f: f.int()), "state: .*damaged .*do not fit"),
        (change("items/frames", lambda f: f[:, :1]), "state: .*damaged .*do not fit"),
        (change("items/rewards", lambda r: r[:-1]), "state: .*damaged .*do not fit"),
        (change("items/ages", lambda a: a + 4), "state: .*damaged .*do not fit"),
        (change("items/after", lambda a: a[1:]), "state: .*damaged .*do not fit"),
        (change("items/after", lambda a: a.int()), "state: .*damaged .*do not fit"),
        (change("items/ends", lambda e: e * 0), "state: .*damaged .*do not fit"),
    ],
)
def test_a_damaged_state_is_refused_and_leaves_an_empty_replay(spoil, message):
    replay, _ = filled()
    with pytest.raises(ValueError, match=message):
        replay.load_state_dict(spoil(replay.state_dict()))
    assert len(replay) == 0
    assert not replay.probabilities().any()
    with pytest.raises(ValueError, match="no window of its 0 steps"):
        replay.sample(1, 0.5, torch.Generator())


FRAME = np.ones(SHAPE, np.uint8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((FRAME.astype(np.float32), 0, 0.0, False, False), "frame: expected uint8.*float32"),
        ((FRAME[:1], 0, 0.0, False, False), r"frame: expected uint8 \[2, 3\], got uint8 \[1, 3\]"),
        ((FRAME[None], 0, 0.0, False, False), "frame: expected uint8"),
        ((FRAME, 0, math.nan, False, False), "reward: expected a finite number, got nan"),
        ((FRAME, 0, 0.0, False, True), "next_frame: expected the frame after a truncated step"),
        ((FRAME, 0, 0.0, False, True, FRAME[:1]), "next_frame: expected uint8"),
    ],
)
def test_a_refused_step_changes_nothing(arguments, message):
    replay, steps = filled()
    before = replay.state_dict()
    with pytest.raises(ValueError, match=message):
        replay.add(*arguments)
    after = replay.state_dict()
    assert after["count"] == before["count"] == len(steps.frames)
    assert torch.equal(after["items"]["frames"], before["items"]["frames"])
    assert torch.equal(after["priorities"], before["priorities"])


@pytest.mark.parametrize(
    ("indices", "losses", "message"),
    [
        ([0, 1], [1.0, -0.5], "losses: expected finite numbers, none negative, got -0.5 for .* 1"),
        ([0, 1], [1.0, math.nan], "losses: .*got nan for index 1"),
        ([0, 1], [math.inf, 1.0], "losses: .*got inf for index 0"),
        ([0, 1], [1.0], "losses: expected one for each of 2 indices"),
        ([0, 40], [1.0, 1.0], "indices: expected slots below 40, got 40"),
        ([0, -1], [1.0, 1.0], "indices: expected slots below 40, got -1"),
        ([0.0, 1.0], [1.0, 1.0], "indices: expected int64"),
        ([[0, 1]], [[1.0, 1.0]], "indices: expected int64"),
    ],
)
def test_refused_losses_change_no_priority(indices, losses, message):
    replay, _ = filled()
    before = replay.probabilities()
    with pytest.raises(ValueError, match=message):
        replay.update(torch.tensor(indices), torch.tensor(losses))
    assert torch.equal(replay.probabilities(), before)


def test_slots_that_were_never_filled_are_out_of_range():
    replay = PrioritizedReplay(10, SHAPE, n_step=1)
    replay.add(FRAME, 0, 0.0, True, False)
    with pytest.raises(ValueError, match="indices: expected slots below 1, got 1"):
        replay.update(torch.tensor([1]), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0.5), "batch: expected an integer, at least 1, got 0"),
        ((2.5, 0.5), "batch: expected an integer, at least 1, got 2.5"),
        ((4, -0.1), r"beta: expected a number in 0..1, got -0.1"),
        ((4, 1.1), r"beta: expected a number in 0..1, got 1.1"),
        ((4, math.nan), r"beta: expected a number in 0..1, got nan"),
    ],
)
def test_a_batch_that_cannot_be_drawn(arguments, message):
    replay, _ = filled()
    with pytest.raises(ValueError, match=message):
        replay.sample(*arguments, torch.Generator())


def test_a_generator_is_needed():
    replay, _ = filled()
    with pytest.raises(ValueError, match=r"generator: expected a torch.Generator"):
        replay.sample(4, 0.5, None)


def test_nothing_is_drawn_before_a_window_is_whole():
    replay = PrioritizedReplay(100, SHAPE, n_step=5)
    for count in range(6):
        with pytest.raises(ValueError, match=f"no window of its {count} steps.* n_step = 5 steps"):
            replay.sample(1, 0.5, torch.Generator())
        replay.add(FRAME, 0, 0.0, False, False)
    assert replay.sample(1, 0.5, torch.Generator()).indices.tolist() == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": 0}, "capacity: expected an integer, at least 1, got 0"),
        ({"capacity": -5}, "capacity: expected an integer"),
        ({"capacity": 10.0}, "capacity: expected an integer"),
        ({"capacity": True}, "capacity: expected an integer"),
        ({"capacity": 10**15}, r"capacity: 10{15} frames of \[84, 84\] take .* GiB"),
        ({"frame_shape": (84, 0)}, "frame_shape: expected an integer, at least 1, got 0"),
        ({"history": 0}, "history: expected"),
        ({"n_step": 0}, "n_step: expected"),
        ({"gamma": 1.1}, r"gamma: expected a number in 0..1, got 1.1"),
        ({"gamma": math.nan}, "gamma: expected"),
        ({"exponent": -1}, "exponent: expected a finite number, at least 0, got -1"),
        ({"exponent": math.inf}, "exponent: expected"),
    ],
)
def test_wrong_settings(options, message):
    with pytest.raises(ValueError, match=message):
        PrioritizedReplay(**{"capacity": 10} | options)


def resident() -> int:
    """Bytes of memory that this process has now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not say it")
def test_memory_is_touched_only_as_it_fills():
    before = resident()
    replay = PrioritizedReplay(100_000)  # 706 MB of frames
    for _ in range(50):
        replay.add(np.ones((84, 84), np.uint8), 0, 0.0, False, False)
    replay.sample(8, 0.5, torch.Generator())
    assert resident() - before < 60e6


def test_frames_after_truncations_go_with_their_steps():
    replay = PrioritizedReplay(5, SHAPE)
    for step in range(40):
        replay.add(FRAME, 0, 0.0, False, step % 2 == 0, FRAME)
        kept = replay.items(replay.oldest, replay.count)["after"]
        assert (
            len(kept)
            == len(replay._ring._after)
            == sum(s % 2 == 0 for s in range(replay.oldest, replay.count))
        )
