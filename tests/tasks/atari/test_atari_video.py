"""The GIF of a game: what each frame shows, and where."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.follow import Follow

from hubpath_fast.tasks.atari.play import play_episodes
from hubpath_fast.tasks.atari.video import (
    AREA,
    BAR,
    EDGE,
    EXPERTS,
    GAIN,
    GUTTER,
    LOSS,
    STRIP,
    TRACK,
    WIDTH,
    Drawing,
    Palette,
    Video,
)


class Hub(torch.nn.Module):
    """Expects 1 of action b and 0 of others; asks two of three experts, the second ever more."""

    num_actions = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("atoms", torch.tensor([-1.0, 0.0, 1.0]))
        self.asked = 0

    def forward(self, states):
        chances = torch.tensor([[0.25, 0.5, 0.25]]).repeat(4, 1)
        chances[1] = torch.tensor([0.1, 0.3, 0.6])
        return chances.log()[None]

    def expert_weights(self, states):
        self.asked += 1
        return torch.tensor([[0.5, 0.04 * self.asked, 0.0]])


def watched(policy=None, env=None, most=500, names=("src-a", "src-b")) -> Video:
    env = env or Follow()
    video = Video(policy, "follow, a hub of two", env.action_names, names, most)
    play_episodes(policy, env, 1, torch.Generator().manual_seed(0), 0.0, on_step=video)
    return video


def rgb(color):
    return tuple(bytes.fromhex(color[1:]))


def colors(drawing, step):
    return drawing.palette.colors[drawing.draw(step)]


def is_color(picture, color):
    return (picture == np.array(rgb(color))).all(axis=-1)


def test_the_file_holds_each_step_in_its_own_colours(tmp_path):
    """Twelve steps at 15 a second, then a rest; read back by Pillow, screens are as they were."""
    video = watched(Hub())
    path = video.save(tmp_path / "new" / "out.gif")
    gif, drawing = Image.open(path), Drawing(video)
    assert gif.n_frames == 12
    assert drawing.scale == 40  # of 8 x 8 pixels
    times = []
    for step in range(12):
        gif.seek(step)
        times.append(gif.info["duration"])
        picture = np.asarray(gif.convert("RGB"))
        assert np.array_equal(picture, colors(drawing, step))
        screen = picture[drawing.top : drawing.top + 320, EDGE : EDGE + 320]
        assert np.array_equal(screen, np.full((320, 320, 3), 10 * step))
    assert times == [70] * 11 + [1500]
    assert gif.info["loop"] == 0
    assert video.notes == []
    assert sorted(p.name for p in path.parent.iterdir()) == ["out.gif"]


def test_returns_of_the_chosen_action():
    """Three bars of action b: 130 pixels for the likeliest, others in proportion; a line at 0.5."""
    video = watched(Hub())
    drawing = Drawing(video)
    picture = colors(drawing, 0)
    plot = is_color(picture, BAR)[
        drawing.top + 40 : drawing.top + 230, drawing.right : WIDTH - EDGE
    ]
    third = plot.shape[1] // 3
    heights = [int(plot[:, third * i + 5].sum()) for i in range(3)]
    assert heights == [round(130 * share / 0.6) for share in (0.1, 0.3, 0.6)]
    ink = (picture[drawing.top + 54, drawing.right : WIDTH - EDGE] < 60).all(axis=-1)
    assert np.flatnonzero(ink).tolist() == [round(third / 2 + 0.75 * 2 * third)]


def test_weights_over_time_and_now():
    """A column a step: expert 1 half, expert 2 growing, the third never, the rest left empty."""
    video = watched(Hub())
    drawing = Drawing(video)
    assert drawing.names == ["src-a", "src-b", "expert 2"]
    left, right = EDGE + GUTTER, WIDTH - EDGE
    for step in (0, 5, 11):
        picture = colors(drawing, 1)
        column = round(left + (step + 0.2) * (right - left) / 12)  # beside the cursor
        area = picture[drawing.below : drawing.below + AREA, column]
        shares = [is_color(area, color).sum() / AREA for color in (EXPERTS[0], EXPERTS[1], TRACK)]
        assert shares == pytest.approx([0.5, 0.04 * (step + 1), 0.5 - 0.04 * (step + 1)], abs=0.013)
        assert is_color(area, EXPERTS[0])[-1]
    bars = colors(drawing, 9)[drawing.top + 200 : drawing.below - 20, drawing.right :]
    long = [is_color(bars, color).sum(axis=1).max() for color in EXPERTS[:3]]
    assert long[1] / long[0] == pytest.approx(0.8, abs=0.02)
    assert long[2] == 0


def test_a_large_hub_has_room():
    """Of twelve experts the last one's weight stands above the timeline, whose colour repeats."""

    class Large(Hub):
        def expert_weights(self, states):
            return torch.eye(12)[-1:]

    drawing = Drawing(watched(Large()))
    picture = colors(drawing, 0)
    rows = np.flatnonzero(is_color(picture[:, drawing.right :], EXPERTS[11 % 8]).sum(axis=1) > 150)
    beside = rows[rows < drawing.below]
    assert len(beside) == 10
    assert drawing.below - 30 < beside[-1] < drawing.below - 10
    assert is_color(picture[drawing.below : drawing.below + AREA, EDGE + GUTTER], EXPERTS[3]).all()


def test_ticks_and_cursor():
    """Rewards at two steps; lives are lost at every fourth, the last one among them."""

    class Seldom(Follow):
        def step(self, action):
            obs, _, *rest = super().step(action)
            return obs, float(self.steps in (2, 7)), *rest

    drawing = Drawing(watched(None, Seldom()))
    picture = colors(drawing, 8)
    left, width = EDGE + GUTTER, WIDTH - 2 * EDGE - GUTTER

    def steps(color, row):
        line = is_color(picture[drawing.ticks + row * STRIP + 6], color)
        return sorted({int((x - left) * 12 / width) for x in np.flatnonzero(line)})

    assert steps(GAIN, 0) == [1, 6]
    assert steps(LOSS, 1) == [3, 7, 11]
    at = left + int(8.5 * width / 12)
    assert (picture[drawing.below : drawing.ticks + 2 * STRIP, at] < 60).all()
    assert not (picture[drawing.below : drawing.ticks + 2 * STRIP, at + 3] < 60).all()


def test_random_play_has_neither_returns_nor_weights():
    drawing = Drawing(watched())
    assert drawing.weights is None
    right = colors(drawing, 0)[drawing.top : drawing.below, drawing.right :]
    assert not is_color(right, BAR).any()
    assert drawing.page.shape[0] < Drawing(watched(Hub())).page.shape[0]


def test_a_longer_game_is_cut_and_says_so(tmp_path):
    video = watched(Hub(), most=5)
    assert video.notes == ["the video shows the first 5 of the game's 12 steps"]
    assert Image.open(video.save(tmp_path / "cut.gif")).n_frames == 5


def test_screens_of_more_colours_than_there_are_places():
    """What has no place gets the nearest colour that has one; frequent ones keep theirs."""
    random = np.random.default_rng(0)
    screen = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    screen[:20] = (200, 72, 72)
    palette = Palette([screen])
    found = palette.colors[palette.indices(screen)]
    assert (found[:20] == (200, 72, 72)).all()
    ours, true = found[20:].reshape(-1, 3).astype(int), screen[20:].reshape(-1, 3).astype(int)
    places = palette.colors[palette._first :].astype(int)
    best = ((true[:, None] - places) ** 2).sum(axis=-1).min(axis=1)
    assert np.array_equal(((ours - true) ** 2).sum(axis=-1), best)
    assert len(np.unique(palette.indices(screen))) > 200


def test_screens_of_the_emulator_keep_their_colours():
    pytest.importorskip("ale_py", reason="the Atari emulator is in the extra [atari]")
    from hubpath_fast.tasks.atari import make_env

    env = make_env("seaquest", seed=0, training=False, max_steps=60)
    video = Video(None, "seaquest, random play", env.action_names)
    play_episodes(None, env, 1, torch.Generator().manual_seed(0), on_step=video)
    drawing = Drawing(video)
    assert drawing.scale == 2
    for step in (0, 59):
        screen = colors(drawing, step)[drawing.top : drawing.top + 420, EDGE : EDGE + 320]
        assert np.array_equal(screen[::2, ::2], video.frames[step].screen)
        assert np.array_equal(screen[::2, ::2], screen[1::2, 1::2])


@pytest.mark.parametrize("title", ["x" * 300, "猫 \udce9", ""])
def test_titles_that_are_too_long_or_odd(title, tmp_path):
    env = Follow(limit=2)
    video = Video(None, title, env.action_names)
    play_episodes(None, env, 1, torch.Generator().manual_seed(0), on_step=video)
    assert Image.open(video.save(tmp_path / "out.gif")).size[0] == WIDTH


def test_what_cannot_be_written(tmp_path):
    video = watched()
    with pytest.raises(ValueError, match=r"video: expected a name that ends in .gif, got .*mp4"):
        video.save(tmp_path / "out.mp4")
    with pytest.raises(ValueError, match="no step was played"):
        Video(None, "none", ()).save(tmp_path / "out.gif")
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        video.save(tmp_path / "file" / "out.gif")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
