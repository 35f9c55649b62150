"""An agent's step on one thread of a CPU, against its parts, and the hub's against one network's.

    python -m bench.atari [--game seaquest] [--seconds 60] [--clock wall] [--out FILE]

A step is: act, play 4 frames, store, draw a batch of 32, update the network, write priorities. Its
parts are a step of the game, and what a plain loop that is written here does in a step: draw the
policy's noise, act, draw the target's, update, on the same state and batch each time. So "step /
its parts" says what an agent adds to them: replay, stacks of frames, log, and whatever its acting
and its update have beyond the plain ones. Both of these are timed alone, too, and then each draws
the policy's noise for itself, the bare ones as the agent's.

All are timed in turns, in one process, as agents run them: on one thread, where denormal numbers
are zero. The columns say the fifth, the median and the fastest; ratios are of medians, since a step
of the game has no usual length. ``--clock cpu`` counts the process's own seconds, which other
processes disturb less.

Without the extra [atari] there is no game: its step then costs nothing, which the output says.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hubpath_fast.devices import flushed_denormals
from hubpath_fast.tasks.atari.agent import Agent
from hubpath_fast.tasks.atari.distribution import (
    categorical_loss,
    double_q_target,
    expected_values,
    greedy_actions,
    make_atoms,
)
from hubpath_fast.tasks.atari.environments import make_env
from hubpath_fast.tasks.atari.hub import HubPolicy
from hubpath_fast.tasks.atari.learn import Batch
from hubpath_fast.tasks.atari.network import RainbowNetwork
from hubpath_fast.tasks.atari.noisy import draw_noise
from hubpath_fast.tasks.atari.policy import Policy, SinglePolicy
from hubpath_fast.tasks.atari.settings import AtariSettings

from . import jsonl, records
from .timing import Times, interleaved

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
FIRST_UPDATE = 400  # steps: enough to draw whole windows from
STEPS = 100_000
SCRATCH, HUB, ROUTED = "scratch", "hub K=2", "hub K=1"

# (what is compared, as a quotient of sums of rows; the goal, at most or at least)
RATIOS = {
    "step / its parts": ((f"{SCRATCH}: step",), ("game", "bare act and update"), 1.15),
    "hub K=2 / scratch, step": ((f"{HUB}: step",), (f"{SCRATCH}: step",), 2.2),
    "hub K=2 / scratch, update": ((f"{HUB}: update",), (f"{SCRATCH}: update",), 2.2),
    "hub K=2 / scratch, act": ((f"{HUB}: act",), (f"{SCRATCH}: act",), None),
    "hub K=1 / scratch, step": ((f"{ROUTED}: step",), (f"{SCRATCH}: step",), None),
    "act / bare act": ((f"{SCRATCH}: act",), ("bare act",), None),
    "update / bare update": ((f"{SCRATCH}: update",), ("bare update",), None),
    "replay / step": (("replay",), (f"{SCRATCH}: step",), 0.05),
}
RATES = {f"{SCRATCH}: step": 45, f"{HUB}: step": 20}  # a second, on an idle core


class NoGame:
    """In place of a game where there is no emulator: random screens that were made before."""

    num_actions, history, frame_shape = 18, 4, (84, 84)
    action_names = tuple(map(str, range(18)))

    def __init__(self, game: str, why: str):
        self.game, self.why = game, why
        self._screens = np.random.default_rng(0).integers(0, 256, (64, 84, 84), np.uint8)
        self._steps = 0

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        return self._screens[:4], {"lives": 1, "life_lost": False}

    def step(self, action: int) -> tuple:
        self._steps += 1
        first = self._steps % 60
        info = {"lives": 1, "life_lost": self._steps % 200 == 0}
        return self._screens[first : first + 4], 0.0, False, False, info


def make_game(name: str) -> Any:
    """``NoGame`` without the emulator. ValueError for a game that the emulator does not have."""
    try:
        return make_env(name, 0, True)
    except ValueError as error:
        if not isinstance(error.__cause__, ImportError):
            raise
        return NoGame(name, str(error))


def make_agent(policy: Policy, env: Any, folder: Path) -> Agent:
    """One that has played up to its first update."""
    settings = AtariSettings(
        game=env.game, method="scratch", steps=STEPS, learn_start=FIRST_UPDATE, eval_episodes=0
    )
    agent = Agent(settings, folder, policy, env, lambda seed: env, [])
    while agent.progress.step < FIRST_UPDATE:
        agent.step()
    return agent


class BareLoop:
    """The same acting and update without anything around them: what an agent is held against."""

    def __init__(self, num_actions: int, atoms: torch.Tensor, settings: AtariSettings):
        self.online, self.target = (RainbowNetwork(num_actions) for _ in range(2))
        self.atoms, self.settings, self.noise = atoms, settings, torch.Generator()
        parameters = self.online.parameters()
        self.adam = torch.optim.Adam(parameters, settings.lr, eps=settings.adam_eps, fused=True)

    def new_noise(self) -> None:
        """The policy's, under which it acts and then learns."""
        draw_noise(self.online, self.noise)

    def update(self, batch: Batch) -> None:
        draw_noise(self.target, self.noise)
        with torch.no_grad():
            following = self.online(batch.next_states), self.target(batch.next_states)
            limits = self.settings.v_min, self.settings.v_max
            target = double_q_target(*following, batch.returns, batch.discounts, *limits)
        task = categorical_loss(self.online(batch.states), batch.actions, target)
        self.adam.zero_grad()
        (batch.weights * task).mean().backward()
        nn.utils.clip_grad_norm_(self.online.parameters(), self.settings.clip_norm)
        self.adam.step()

    @torch.no_grad()
    def act(self, state: torch.Tensor) -> int:
        return int(greedy_actions(expected_values(self.online(state), self.atoms)))


def functions(env: Any, folder: Path) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    actions, atoms = env.num_actions, make_atoms(51, -10, 10)
    networks = [RainbowNetwork(actions) for _ in range(5)]
    policies = {
        SCRATCH: SinglePolicy(networks[0], atoms),
        HUB: HubPolicy(networks[1:3], atoms, 2),
        ROUTED: HubPolicy(networks[3:], atoms, 1),
    }
    agents = {
        name: make_agent(policy, make_game(env.game), folder / str(i))
        for i, (name, policy) in enumerate(policies.items())
    }
    scratch = agents[SCRATCH]
    batch = scratch.replay.sample(32, 0.4, torch.Generator())
    batch = Batch(*(getattr(batch, name) for name in Batch._fields))
    state, bare = batch.states[:1], BareLoop(actions, atoms, scratch.settings)
    made = {
        "game": game_step(env), "replay": replay_step(scratch),
        "bare act": acting(bare, state), "bare update": updating(bare, batch),
        "bare act and update": acting_and_updating(bare, state, batch),
    }  # fmt: skip
    for name, agent in agents.items():
        made |= {
            f"{name}: step": agent.step, f"{name}: act": acting(agent.learner, state),
            f"{name}: update": updating(agent.learner, batch),
        }  # fmt: skip
    return made


def game_step(env: Any) -> Callable[[], object]:
    random = np.random.default_rng(0)
    env.reset()

    def step() -> None:
        _, _, terminated, truncated, _ = env.step(int(random.integers(env.num_actions)))
        if terminated or truncated:
            env.reset()

    return step


def replay_step(agent: Agent) -> Callable[[], object]:
    """What a step does with the replay; on the agent's own, so that it fills as the agent's."""
    replay, generator = agent.replay, torch.Generator()
    frame, losses = np.zeros(agent.frames.shape, np.uint8), torch.rand(32)

    def step() -> None:
        replay.add(frame, 0, 0.0, False, False)
        found = replay.sample(32, 0.4, generator)
        replay.update(found.indices, losses)

    return step


def acting(learner: Any, state: torch.Tensor) -> Callable[[], object]:
    def act() -> None:
        learner.new_noise()
        learner.act(state)

    return act


def updating(learner: Any, batch: Batch) -> Callable[[], object]:
    def update() -> None:
        learner.new_noise()
        learner.update(batch)

    return update


def acting_and_updating(learner: Any, state: torch.Tensor, batch: Batch) -> Callable[[], object]:
    def act_and_update() -> None:
        learner.new_noise()
        learner.act(state)
        learner.update(batch)

    return act_and_update


def ratios(times: dict[str, Times]) -> dict[str, float]:
    def total(names: tuple[str, ...]) -> float:
        return sum(times[name].p50 for name in names)

    return {name: total(over) / total(under) for name, (over, under, _) in RATIOS.items()}


def verdicts(times: dict[str, Times]) -> list[tuple[str, bool]]:
    """Lines about each ratio and rate, and whether it misses its goal."""
    lines = []
    for name, value in ratios(times).items():
        goal = RATIOS[name][2]
        said = "" if goal is None else f"goal at most {goal:g}"
        lines.append((f"{name:<28}{value:>8.3f}   {said}", goal is not None and value > goal))
    for name, goal in RATES.items():
        rate = 1 / times[name].p50
        lines.append((f"{name + 's a second':<28}{rate:>8.1f}   goal at least {goal}", rate < goal))
    return [(line + "  missed" * missed, missed) for line, missed in lines]


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(
        prog="python -m bench.atari", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--game", default="seaquest", help="as `hubpath atari games` lists them")
    parser.add_argument("--seconds", type=float, default=60.0, help="of all rounds")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--out", type=Path, help="append the row to this file, as a JSON line")
    args = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    try:
        env = make_game(args.game)
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Denormals as `hubpath atari fit` has them.
    with tempfile.TemporaryDirectory() as folder, flushed_denormals():
        made = functions(env, Path(folder))
        times = interleaved(
            made, seconds=args.seconds, min_rounds=3, max_rounds=2_000, calls=1,
            clock=CLOCKS[args.clock],
        )  # fmt: skip
    if isinstance(env, NoGame):
        print(f"no game is played: {env.why}")
    print(f"{records.device_name('cpu')}, 1 thread, {args.clock} clock; ms a call")
    print(f"{'':<28}{'p20':>8}{'median':>8}{'least':>8}")
    for name, t in times.items():
        print(f"{name:<28}{1e3 * t.p20:>8.2f}{1e3 * t.p50:>8.2f}{1e3 * t.best:>8.2f}")
    lines = verdicts(times)
    print("\n".join(line for line, _ in lines))
    print(f"{sum(missed for _, missed in lines)} goals are missed")
    row = {
        "game": env.game, "clock": args.clock, "rounds": next(iter(times.values())).rounds,
        "ratios": ratios(times),
        "seconds": {name: [t.p20, t.p50, t.p80, t.best] for name, t in times.items()},
        **records.environment("cpu"),
    }  # fmt: skip
    if args.out is not None:
        jsonl.write(args.out, [row])
    return row


if __name__ == "__main__":
    main()
