"""The small games: their rules in situations made by hand, what they show, and exact states."""

import io
import itertools
import random
import statistics

import numpy as np
import pytest
import torch

from hubpath_fast.tasks.atari.small_games import GAMES, NAMES, make_small_game
from hubpath_fast.tasks.atari.small_games.board import (
    BUTTONS,
    DANGER,
    DOWN,
    FIRE,
    GOOD,
    LEFT,
    LIVES,
    NOTHING,
    PLAYER,
    RIGHT,
    UP,
)
from hubpath_fast.tasks.atari.small_games.cross import COLUMN, LANES, TOP
from hubpath_fast.tasks.atari.small_games.medley import ORDERS


def begun(name, training=False, **more):
    game = make_small_game(name, 0, training, **more)
    game.reset()
    return game


def board(game, **state):
    """The game with its board as given."""
    vars(game).update(state)
    return game


def plane(frame, kind):
    """bool [10, 10] of one kind, by the definition of a frame."""
    return frame[kind // 2 :: 2, kind % 2 :: 2] == 255


def squares(frame, kind):
    return [tuple(square) for square in np.argwhere(plane(frame, kind)).tolist()]


def outcome(game, button):
    """(points, lives after it, whether one was lost)"""
    _, points, _, _, info = game.step(button)
    return points, info["lives"], info["life_lost"]


class TestCatch:
    @pytest.mark.parametrize(("column", "caught"), [(3, False), (4, True), (6, True), (7, False)])
    def test_a_stone_is_caught_by_three_squares(self, column, caught):
        game = board(begun("catch"), paddle=5, stones=[[8, column]], wait=3)
        assert outcome(game, NOTHING) == ((1, 3, False) if caught else (0, 2, True))
        assert game.stones == []

    def test_the_paddle_moves_before_the_stone_lands_and_stays_on_the_board(self):
        game = board(begun("catch"), paddle=5, stones=[[8, 3]], wait=3)
        assert outcome(game, LEFT) == (1, 3, False)
        for button, end in ((LEFT, 1), (RIGHT, 8)):
            for _ in range(9):
                board(game, stones=[]).step(button)
            assert game.paddle == end

    @pytest.mark.parametrize("button", [NOTHING, UP, DOWN, FIRE])
    def test_other_buttons_do_nothing(self, button):
        game = board(begun("catch"), paddle=5, stones=[], wait=3)
        game.step(button)
        assert (game.paddle, game.stones) == (5, [])

    def test_a_stone_falls_a_row_a_step_and_comes_every_six(self):
        game = begun("catch")
        tops = []
        for _ in range(13):
            before = [[row + 1, column] for row, column in game.stones if row < 8]
            game.step(NOTHING)
            new = [stone for stone in game.stones if stone not in before]
            assert [stone for stone in game.stones if stone in before] == before
            tops.append(len(new))
            assert all(row == 0 for row, _ in new)
        assert tops == [1, 0, 0, 0, 0, 0] * 2 + [1]


class TestCross:
    def lanes(self, *taken):
        """Lanes with cars on (row, column)."""
        made = [[0] * 10 for _ in LANES]
        for row, column in taken:
            made[LANES.index(row)][column] = 1
        return made

    def test_a_road_is_a_point_once_and_the_top_leads_to_the_bottom(self):
        game = board(begun("cross"), lanes=self.lanes())
        assert [outcome(game, UP)[0] for _ in range(8)] == [0, 1] * 4
        assert game.row == 9
        walk = [UP, UP, DOWN, DOWN, UP, UP, UP, UP]
        assert [outcome(game, button)[0] for button in walk] == [0, 1, 0, 0, 0, 0, 0, 1]
        assert game.lives == LIVES

    def test_cars_go_in_turn_to_the_right_and_to_the_left_and_round(self):
        game = board(begun("cross"), lanes=self.lanes((2, 9), (4, 0), (6, 3), (8, 3)))
        game.step(NOTHING)
        assert game.lanes == self.lanes((2, 0), (4, 9), (6, 4), (8, 2))

    @pytest.mark.parametrize(("column", "hit"), [(COLUMN, False), (COLUMN + 1, True)])
    def test_the_walker_is_hit_by_a_car_that_comes_to_his_square(self, column, hit):
        # Cars of row 8 go to the left: one that stood in front of him has left when he steps there.
        game = board(begun("cross"), lanes=self.lanes((8, column)))
        assert outcome(game, UP) == ((0, 2, True) if hit else (0, 3, False))
        assert game.row == (9 if hit else 8)

    def test_who_waits_on_a_road_is_hit_and_begins_at_the_bottom(self):
        game = board(begun("cross"), lanes=self.lanes((6, COLUMN - 2)), row=7, best=7)
        assert outcome(game, UP) == (0, 3, False)
        assert outcome(game, NOTHING) == (0, 2, True)
        assert (game.row, game.best) == (9, 9)

    @pytest.mark.parametrize("button", [NOTHING, LEFT, RIGHT, FIRE])
    def test_other_buttons_do_nothing(self, button):
        game = begun("cross")
        game.step(button)
        assert game.row == 9

    def test_lanes_have_two_cars_with_gaps(self):
        game = make_small_game("cross", 0)
        for _ in range(200):
            game.reset()
            for lane in game.lanes:
                text = "".join(map(str, lane))
                runs = sorted(
                    len(run)
                    for run in (text[text.index("0") :] + text[: text.index("0")]).split("0")
                    if run
                )
                assert runs == [2, 2]

    def test_the_walker_stays_between_bottom_and_top(self):
        game = board(begun("cross"), lanes=self.lanes())
        game.step(DOWN)
        assert game.row == 9
        board(game, row=TOP + 1, best=TOP + 2).step(UP)
        assert game.row == 9


class TestKeep:
    @pytest.mark.parametrize(("row", "kept"), [(3, False), (4, True), (6, True), (7, False)])
    def test_a_ball_is_kept_by_three_squares(self, row, kept):
        game = board(begun("keep"), keeper=5, balls=[[row, 2]], wait=3)
        assert outcome(game, NOTHING) == ((1, 3, False) if kept else (0, 2, True))
        assert game.balls == []

    def test_the_keeper_moves_before_the_ball_is_there_and_stays_on_the_board(self):
        game = board(begun("keep"), keeper=5, balls=[[3, 2]], wait=3)
        assert outcome(game, UP) == (1, 3, False)
        for button, end in ((UP, 1), (DOWN, 8)):
            for _ in range(10):
                board(game, balls=[]).step(button)
            assert game.keeper == end

    @pytest.mark.parametrize("button", [NOTHING, LEFT, RIGHT, FIRE])
    def test_other_buttons_do_nothing(self, button):
        game = board(begun("keep"), keeper=5, balls=[], wait=3)
        game.step(button)
        assert (game.keeper, game.balls) == (5, [])

    def test_a_ball_comes_every_six_steps_a_column_a_step(self):
        game = begun("keep")
        columns = []
        for _ in range(13):
            game.step(NOTHING)
            columns.append([column for _, column in game.balls])
        assert columns[:6] == [[9], [8], [7], [6], [5], [4]]
        assert columns[6:] == [[3, 9], [2, 8], [7], [6], [5], [4], [3, 9]]


class TestFrames:
    def test_the_planes_show_the_board(self):
        game = board(begun("catch"), paddle=5, stones=[[2, 7], [6, 1]])
        frame = game._frame()
        assert (frame.shape, frame.dtype) == ((20, 20), np.uint8)
        assert squares(frame, PLAYER) == [(9, 4), (9, 5), (9, 6)]
        assert squares(frame, GOOD) == [(2, 7), (6, 1)]
        assert frame.sum() == 255 * 5

        game = board(begun("cross"), row=3, lanes=TestCross().lanes((2, 9), (8, 0)))
        assert squares(game._frame(), PLAYER) == [(3, COLUMN)]
        assert squares(game._frame(), DANGER) == [(2, 9), (8, 0)]
        assert game._frame().sum() == 255 * 3

        game = board(begun("keep"), keeper=4, balls=[[6, 2], [0, 9]])
        assert squares(game._frame(), PLAYER) == [(3, 1), (4, 1), (5, 1)]
        assert squares(game._frame(), GOOD) == [(0, 9), (6, 2)]
        assert squares(game._frame(), DANGER) == [(row, 0) for row in range(10)]
        assert game._frame().sum() == 255 * 15

    @pytest.mark.parametrize("name", NAMES)
    def test_an_observation_is_the_last_two_frames_with_zeros_before_the_first(self, name):
        game = begun(name)
        first, info = game.reset()
        assert (first.shape, first.dtype) == ((game.history, *game.frame_shape), np.uint8)
        assert not first[0].any()
        assert first[1].any()
        assert info["lives"] == LIVES
        assert info["life_lost"] is False
        second = game.step(0)[0]
        assert np.array_equal(second[0], first[1])
        third = game.step(0)[0]
        assert np.array_equal(third[0], second[1])
        assert not first[0].any()

    def test_a_lost_life_clears_the_stack_in_training_alone_and_the_game_goes_on(self):
        for training in (True, False):
            game = board(begun("catch", training), paddle=1, stones=[[8, 9], [5, 5]], wait=5)
            obs, points, terminated, truncated, info = game.step(NOTHING)
            assert info["life_lost"]
            assert (points, terminated, truncated) == (0, False, False)
            assert obs[0].any() != training
            assert obs[1].any()
            obs, *_, info = game.step(NOTHING)
            assert obs[0].any()
            assert info == {"lives": 2, "life_lost": False, "game": "catch"}
            assert game.stones == [[7, 5]]

    def test_the_picture_shows_squares_in_their_colours(self):
        picture = board(begun("catch"), paddle=5, stones=[[2, 7]]).render()
        assert (picture.shape, picture.dtype) == ((160, 160, 3), np.uint8)
        assert picture[9 * 16 + 8, 5 * 16 + 8].tolist() == [86, 180, 233]
        assert picture[2 * 16 + 8, 7 * 16 + 8].tolist() == [240, 228, 66]
        assert picture[8, 8].tolist() == [24, 28, 34]
        assert picture[0, 8].tolist() == picture[16, 8].tolist() == [36, 41, 49]


class TestEpisodes:
    def test_three_lost_lives_end_the_game(self):
        game = board(begun("catch"), paddle=1, stones=[[8, 9], [7, 9], [6, 9]], wait=9)
        ends = [game.step(NOTHING)[2:4] for _ in range(3)]
        assert ends == [(False, False), (False, False), (True, False)]
        with pytest.raises(ValueError, match="the episode is over"):
            game.step(NOTHING)

    def test_the_limit_of_steps_truncates(self):
        game = board(begun("cross", max_steps=3), lanes=TestCross().lanes())
        assert [game.step(NOTHING)[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]
        with pytest.raises(ValueError, match="the episode is over"):
            game.step(NOTHING)

    def test_a_game_lost_in_its_last_step_is_terminal(self):
        game = board(begun("catch", max_steps=1), paddle=1, stones=[[8, 9]], wait=3, lives=1)
        assert game.step(NOTHING)[2:4] == (True, False)

    @pytest.mark.parametrize("name", NAMES)
    def test_wrong_buttons_and_names_are_refused(self, name):
        game = begun(name)
        for action in (-1, 6):
            with pytest.raises(ValueError, match=rf"action: expected 0\.\.5, got {action}"):
                game.step(action)
        with pytest.raises(ValueError, match="game: expected one of catch, cross, keep, medley"):
            make_small_game("pong", 0)


def play(game, steps, draw):
    """All that is seen of that many steps of random play."""
    seen = []
    for _ in range(steps):
        obs, points, terminated, truncated, info = game.step(draw.randrange(6))
        seen.append((obs.tobytes(), points, terminated, truncated, str(info)))
        if terminated or truncated:
            obs, info = game.reset()
            seen.append((obs.tobytes(), str(info)))
    return seen


@pytest.mark.parametrize("name", NAMES)
class TestStates:
    def test_the_seed_determines_all_and_another_differs(self, name):
        runs = []
        for seed in (3, 3, 4):
            game = make_small_game(name, seed, training=True)
            game.reset()
            runs.append(play(game, 400, random.Random(1)))
        assert runs[0] == runs[1] != runs[2]
        game.reset(seed=7)
        first = play(game, 200, random.Random(1))
        game.reset(seed=7)
        assert play(game, 200, random.Random(1)) == first

    @pytest.mark.parametrize("before", [0, 1, 57, 333])
    def test_a_restored_game_goes_on_to_the_bit(self, name, before):
        game = make_small_game(name, 5, training=True)
        game.reset()
        draw = random.Random(2)
        play(game, before, draw)
        file = io.BytesIO()
        torch.save(game.state_dict(), file)
        expected = play(game, 300, random.Random(3))
        file.seek(0)
        other = make_small_game(name, 99, training=True)
        other.load_state_dict(torch.load(file, weights_only=True))
        assert play(other, 300, random.Random(3)) == expected

    def test_a_damaged_state_is_refused_and_changes_nothing(self, name):
        game = make_small_game(name, 5)
        game.reset()
        play(game, 20, random.Random(2))
        state = game.state_dict()
        for key in state:
            for wrong in ({k: v for k, v in state.items() if k != key}, {**state, key: None}):
                with pytest.raises(ValueError, match=f"the state of the game {name} is damaged"):
                    game.load_state_dict(wrong)
        assert game.state_dict() == state

    def test_a_state_of_another_game_is_refused(self, name):
        other = begun(next(n for n in NAMES if n != name))
        with pytest.raises(ValueError, match=f"it is one of '{other.name}'"):
            begun(name).load_state_dict(other.state_dict())


@pytest.mark.parametrize("name", [game.name for game in GAMES])
@pytest.mark.parametrize(
    "change", [{"lives": 4}, {"steps": 101}, {"steps": -1}, {"random": [3, 1, 2]}, {"stack": [[0]]}]
)
def test_a_state_with_impossible_values_is_refused(name, change):
    game = begun(name)
    with pytest.raises(ValueError, match="is damaged"):
        game.load_state_dict(game.state_dict() | change)


def test_frames_that_do_not_show_the_board_are_refused():
    game = begun("catch")
    state = game.state_dict()
    state["board"]["paddle"] = 1 + state["board"]["paddle"] % 8
    with pytest.raises(ValueError, match="its frames do not show its board"):
        game.load_state_dict(state)


class TestMedley:
    def test_orders_are_permutations_without_a_button_at_its_place_or_twice_the_same(self):
        assert set(ORDERS) == {game.name for game in GAMES}
        for order in ORDERS.values():
            assert sorted(order) == list(range(6))
            assert all(place != button for place, button in enumerate(order))
        for one, other in itertools.combinations(ORDERS.values(), 2):
            assert all(a != b for a, b in zip(one, other, strict=True))

    def test_a_button_does_what_the_game_of_the_episode_has_there(self):
        medley = begun("medley")
        tried = set()
        while len(tried) < len(GAMES):
            _, info = medley.reset()
            name = info["game"]
            tried.add(name)
            for button in range(len(BUTTONS)):
                twin = make_small_game(name, 0)
                state = medley.game.state_dict()
                twin.load_state_dict(state)
                pressed = medley.step(ORDERS[name].index(button))
                own = twin.step(button)
                assert np.array_equal(pressed[0], own[0])
                assert pressed[1:] == own[1:]
                medley.game.load_state_dict(state)

    def test_episodes_are_drawn_from_all_games_whatever_is_pressed(self):
        orders = []
        for press in (0, 3):
            medley, names = make_small_game("medley", 11), []
            for _ in range(300):
                _, info = medley.reset()
                names.append(info["game"])
                for _ in range(press):
                    medley.step(press)
            orders.append(names)
        assert orders[0] == orders[1]
        # 100 of each are expected, with a standard deviation of 8.
        assert all(70 < orders[0].count(game.name) < 130 for game in GAMES)


@pytest.mark.parametrize(
    ("name", "low", "high"), [("catch", 1.1, 1.6), ("cross", 0.6, 0.9), ("keep", 1.1, 1.6)]
)
def test_random_play_scores_little(name, low, high):
    """Means of 400 games; their standard error is at most 0.08."""
    game, draw, scores = make_small_game(name, 1), random.Random(2), []
    for _ in range(400):
        game.reset()
        score = 0.0
        while True:
            _, points, terminated, truncated, _ = game.step(draw.randrange(6))
            score += points
            if terminated or truncated:
                break
        scores.append(score)
    assert low < statistics.mean(scores) < high
