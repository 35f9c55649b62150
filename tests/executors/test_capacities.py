"""The rules by which captured sizes are chosen: counts of rows in, sizes out."""

import itertools

import pytest

from hubpath_fast.executors.graphs.capacities import (
    CAPTURE_ROWS,
    MIN_SEEN,
    RECENT,
    RECENT_ROWS,
    CapacitySizes,
    SeenSizes,
    bucket,
    ladder_size,
)


def captured_with(sizes, counts, samples=48, graphs=()):
    """The graphs that there are after steps in which the expert has had those counts."""
    graphs = list(graphs)
    for count in counts:
        sizes.step(count, samples)
        for size in sizes.wanted(count, graphs) if count else []:
            graphs.append(size)
            sizes.captured(size)
    return graphs


def test_the_ladder_rises_by_4_then_by_an_eighth():
    sizes = sorted({ladder_size(count) for count in range(1, 1025)})
    assert sizes[:16] == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 45, 50, 56, 63, 70, 78]
    assert all(b == a * 9 // 8 for a, b in itertools.pairwise(sizes[7:]))
    assert all(count <= ladder_size(count) for count in range(1, 1025))
    assert all(ladder_size(count) <= count * 1.125 for count in range(33, 1025))


def test_predictions_have_the_same_ladder_and_sizes_1_and_2():
    assert [bucket(count) for count in range(1, 8)] == [1, 2, 4, 4, 8, 8, 8]
    assert all(bucket(count) == ladder_size(count) for count in range(3, 1025))


def test_after_three_steps_sizes_around_the_mean_are_captured_largest_first():
    # A mean of 19 of 48 has a deviation of 3.39 rows: 11.5 to 26.5 around it.
    assert captured_with(CapacitySizes(), [18, 20]) == []
    assert captured_with(CapacitySizes(), [18, 20, 19]) == [28, 24, 20, 16, 12]


def test_the_group_that_is_here_has_a_size_too_unless_it_is_above_the_largest():
    # A mean of 21 has a deviation of 3.44 rows: 13.4 to 28.6 around it.
    assert captured_with(CapacitySizes(), [30, 29, 4]) == [32, 28, 24, 20, 16, 4]
    assert captured_with(CapacitySizes(), [15, 14, 34]) == [32, 28, 24, 20, 16]


def test_no_size_is_above_the_batch_and_where_all_samples_come_nothing_is_padded():
    assert captured_with(CapacitySizes(), [48, 48, 48]) == [48]
    assert captured_with(CapacitySizes(), [47, 46, 48]) == [48, 45]
    assert captured_with(CapacitySizes(), [3, 2, 3], samples=6) == [6, 4]


def test_an_expert_without_rows_so_far_gets_what_a_rare_one_needs():
    sizes = CapacitySizes()
    for _ in range(20):
        sizes.step(0, 48)
    assert sizes.ahead(0) == [4]


def test_sizes_that_only_groups_too_small_for_a_replay_would_take_are_left_out():
    sizes = CapacitySizes()
    sizes.least = 9
    assert captured_with(sizes, [10, 10, 10]) == [20, 16, 12]
    sizes = CapacitySizes()
    sizes.least = 9
    sizes.step(0, 48)
    assert sizes.ahead(0) == [12]


def test_a_step_without_rows_adds_no_size_to_those_around_the_mean():
    sizes = CapacitySizes()
    for count in [24] * 9 + [0]:
        sizes.step(count, 48)
    assert sizes.ahead(0) == [32, 28, 24, 20, 16]
    assert sizes.ahead(3) == [32, 28, 24, 20, 16, 4]


@pytest.mark.parametrize(("count", "size"), [(1, 16), (16, 16), (17, 28), (28, 28), (29, None)])
def test_a_group_is_replayed_in_the_next_size_that_there_is(count, size):
    assert CapacitySizes().place(count, [28, 16]) == size


def test_a_group_above_the_largest_size_runs_eagerly():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [10, 10, 10])
    assert max(graphs) == 20
    sizes.step(25, 48)
    assert sizes.wanted(25, graphs) == []
    assert sizes.place(25, graphs) is None


def test_where_the_mean_has_moved_a_group_above_gets_a_larger_size_with_headroom():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [10, 10, 10])
    # The mean becomes 13.75, of which 1.8 deviations are within 20, then 16: they end at 21.9, and
    # 4.5 at 30.7.
    assert captured_with(sizes, [25], graphs=graphs) == graphs
    assert captured_with(sizes, [25], graphs=graphs) == [*graphs, 32]
    # The group itself may say more than the mean.
    sizes = CapacitySizes()
    captured_with(sizes, [19] * 9, graphs=graphs)
    sizes.step(46, 48)
    assert sizes.wanted(46, graphs) == [48]


def test_groups_above_the_largest_that_come_often_get_a_larger_size_wherever_the_mean_is():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [10] * 25)
    for count in (24, 6, 24, 6, 24, 6):
        assert captured_with(sizes, [count], graphs=graphs) == graphs
    assert captured_with(sizes, [24], graphs=graphs) == [*graphs, 28]


def test_groups_above_the_largest_that_come_rarely_never_get_one():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [10, 10, 10])
    # One in 21 steps, each fading by a fiftieth at every step: 1 / (1 - 0.98^21) = 2.89 at most.
    assert captured_with(sizes, ([10] * 20 + [25]) * 200, graphs=graphs) == graphs


def steps_until_captured(sizes, graphs, count, samples, missing):
    for step in range(1, 10_000):
        if missing in captured_with(sizes, [count], samples, graphs):
            return step
    return None


def test_a_size_whose_lack_costs_much_of_late_is_captured():
    sizes = CapacitySizes()
    captured_with(sizes, [19] * 10)
    # 4 rows are padded at each step, in which what there was fades by a fiftieth.
    expected, lately = 0, 0.0
    while lately < RECENT_ROWS:
        lately = lately * (1 - 1 / RECENT) + 4
        expected += 1
    assert steps_until_captured(sizes, [24, 16], 19, 48, missing=20) == expected == 35


def test_a_size_that_is_rarely_missed_is_captured_when_its_lack_has_paid_for_it():
    sizes, graphs = CapacitySizes(), [24, 16]
    captured_with(sizes, [16] * 10, graphs=graphs)
    missed = 0
    while missed * 4 < CAPTURE_ROWS:
        assert captured_with(sizes, [16, 16, 16], graphs=graphs) == graphs
        found = captured_with(sizes, [19], graphs=graphs)
        missed += 1
    assert missed == 250
    assert found == [24, 16, 20]


def test_what_was_wasted_before_a_capture_pays_for_no_second_one():
    sizes = CapacitySizes()
    captured_with(sizes, [10] * 10)
    # For 10 rows in 24 both 12 and 16 and 20 would have saved some.
    assert steps_until_captured(sizes, [24], 10, 48, missing=12) is not None
    assert captured_with(sizes, [10] * 500, graphs=[24, 12]) == [24, 12]


def test_a_smaller_batch_replays_what_there_is_and_lowers_no_size():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [18, 20, 19])
    sizes.step(6, 17)
    assert sizes.wanted(6, graphs) == []
    assert sizes.place(6, graphs) == 12
    assert sizes.largest == 28


def test_a_larger_batch_has_larger_sizes():
    sizes = CapacitySizes()
    graphs = captured_with(sizes, [18, 20, 19])
    sizes.step(90, 200)
    assert sizes.wanted(90, graphs) == [122]


@pytest.mark.parametrize("make", [CapacitySizes, lambda: SeenSizes(buckets=False)])
def test_dropped_graphs_are_wanted_again_only_after_as_many_steps_as_are_needed(make):
    sizes = make()
    assert captured_with(sizes, [19] * MIN_SEEN)
    sizes.dropped()
    sizes.needed = 2 * MIN_SEEN
    assert captured_with(sizes, [19] * (2 * MIN_SEEN - 1)) == []
    assert captured_with(sizes, [19]) != []


def test_exact_sizes_are_captured_at_their_third_sight_the_largest_seen_with_the_first():
    sizes = SeenSizes(buckets=False)
    assert captured_with(sizes, [9, 5, 6, 5, 6]) == []
    assert captured_with(sizes, [6]) == [9, 6]
    assert captured_with(sizes, [5], graphs=[9, 6]) == [9, 6, 5]
    assert sizes.place(5, [9, 6]) is None


def test_buckets_end_at_the_batch():
    sizes = SeenSizes(buckets=True)
    assert captured_with(sizes, [46, 47, 48]) == [48]
    assert captured_with(sizes, [46], graphs=[48]) == [48]
    assert sizes.place(46, [48, 50]) == 48
    assert sizes.place(40, [48]) is None
