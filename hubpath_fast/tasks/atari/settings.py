"""Of a run on a game: those of Data-Efficient Rainbow (van Hasselt et al., 2019), and the hub's."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ...fields import Settings, setting

HUB, SCRATCH, FINETUNE = "hub", "scratch", "finetune"
KNOWLEDGE_FLOW, ZOO_TUNING = "knowledge-flow", "zoo-tuning"
PATHWAY_NOISE = ("update", "act", "all")  # where routing is noisy, see ``HubPolicy``
METHODS = (SCRATCH, FINETUNE, HUB, KNOWLEDGE_FLOW, ZOO_TUNING)
LEAST_HUB = 2  # sources that a method needs which combines them


@dataclass(frozen=True, kw_only=True)
class AtariSettings(Settings):
    """See ``hubpath atari fit``. Steps are of 4 frames each; one update a step."""

    game: str = setting(help="that is played, as `hubpath atari games` lists them")
    method: str = setting(HUB, "how it is learned", choices=METHODS)
    hub: tuple[str, ...] = setting((), "folders of the runs whose policies are the sources")
    steps: int = setting(100_000, "of the game; after learn_start each has an update", low=1)
    seed: int = setting(0, "of weights, game, noise and replay", low=0)
    k: int = setting(2, "experts that are asked about a state", low=1)
    heads: str = setting(
        "new", "of the sources: new ones, or kept where the actions are the same",
        choices=("new", "keep"),
    )  # fmt: skip
    explore: float = setting(0.5, "weight of the exploration loss", low=0)
    renormalize: bool = setting(False, "divide the K weights by their sum (not in the paper)")
    pathway_noise: str = setting(
        "update", "where routing is noisy: in the loss of an update, also in acting, everywhere",
        choices=PATHWAY_NOISE,
    )  # fmt: skip

    learn_start: int = setting(1_600, "steps before the first update", low=1)
    target_every: int = setting(2_000, "steps between copies to the target network", low=1)
    n_step: int = setting(20, "rewards that a return sums", low=1)
    gamma: float = setting(0.99, "discount of a step", low=0, high=1)
    batch_size: int = setting(32, "transitions of an update", low=1)
    lr: float = setting(1e-4, "of Adam", above=0)
    adam_eps: float = setting(1.5e-4, "of Adam", above=0)
    clip_norm: float = setting(10.0, "largest norm of the gradient", above=0)
    exponent: float = setting(0.5, "of priorities", low=0)
    beta: float = setting(
        0.4, "exponent of the importance weights at the first update; 1 at the last", low=0, high=1
    )

    hidden: int = setting(256, "units of each noisy hidden layer", low=1)
    atoms: int = setting(51, "returns that a distribution is over", low=2)
    v_min: float = setting(-10.0, "least of them")
    v_max: float = setting(10.0, "largest of them")
    noise_std: float = setting(0.1, "of the noisy layers at the start, over sqrt(inputs)", low=0)
    patches: tuple[int, ...] = setting((5, 5), "sides of the two patch layers", low=1)
    widths: tuple[int, ...] = setting((32, 64), "channels of the two patch layers", low=1)

    eval_every: int = setting(10_000, "steps between evaluations", low=1)
    eval_episodes: int = setting(10, "of each, for the curve", low=0)
    final_episodes: int = setting(100, "after the last step, for tables", low=1)
    save_every: int = setting(10_000, "steps between checkpoints", low=1, free=True)
    log_every: int = setting(200, "steps between lines of the log", low=1)
    device: str = setting("cpu", "cpu, cuda, cuda:1, ...", free=True)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)

    def check(self) -> None:
        if self.v_min >= self.v_max:
            raise ValueError(f"v_min: expected less than v_max {self.v_max}, got {self.v_min}")
        for name in ("patches", "widths"):
            if len(getattr(self, name)) != 2:
                raise ValueError(f"{name}: expected two, got {list(getattr(self, name))}")
        if self.steps <= self.learn_start:
            raise ValueError(
                f"steps: expected more than the {self.learn_start} before the first update, got "
                f"{self.steps}; ask for more, or --set learn_start=..."
            )
        if self.learn_start < self.batch_size:
            raise ValueError(
                f"learn_start: expected at least the batch_size of {self.batch_size}, got "
                f"{self.learn_start}"
            )
        _check_hub(self)


def _check_hub(settings: AtariSettings) -> None:
    count, method = len(settings.hub), settings.method
    wanted = {SCRATCH: (0, 0), FINETUNE: (1, 1), HUB: (1, None)}.get(method, (LEAST_HUB, None))
    if count < wanted[0] or (wanted[1] is not None and count > wanted[1]):
        exactly = "" if wanted[1] is not None else "at least "
        raise ValueError(
            f"hub: the method {method} takes {exactly}{_sources(wanted[0])}, got {count}"
            + (f" ({', '.join(settings.hub)})" if count else "; --hub RUN,RUN names them")
        )
    if method == HUB and settings.k > count:
        raise ValueError(f"k: expected at most the {_sources(count)} of the hub, got {settings.k}")


def _sources(count: int) -> str:
    return f"{count} source{'s' * (count != 1)}"
