"""The settings of a run as a page: ``python -m hubpath_fast.runs.describe > docs/settings.md``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import MISSING

from ..data.settings import DataSettings
from ..fields import Setting
from ..hub.settings import ModelSettings
from ..tasks.atari.settings import AtariSettings
from ..tasks.landmarks.settings import LandmarkSettings
from ..tasks.settings import LossSettings
from ..training import TrainerConfig
from .config import CLASSIFICATION, FitConfig
from .presets import DEFAULTS

PARTS: dict[str, Sequence[Setting]] = {
    "Data": DataSettings.settings(),
    "Model": ModelSettings.settings(),
    "Losses": LossSettings.settings(),
    "Training": TrainerConfig.settings(),
    "Landmarks": LandmarkSettings.settings(),
    "Run": [
        known
        for known in FitConfig.settings()
        if known.name in FitConfig.__annotations__ and known.inner is None
    ],
    "Atari": [known for known in AtariSettings.settings() if known.default is not MISSING],
}
HEAD = """# Settings of a run

<!-- Made from the fields by `python -m hubpath_fast.runs.describe > docs/settings.md`. -->

`hubpath fit --set KEY=VALUE` sets any of them, as often as it is given; `--print-config` shows
them all as JSON, which `--config FILE` reads. Those of the training lie in `trainer` there, and
`--set` takes `decay=0.2` as well as `trainer.decay=0.2`; those of `hubpath landmarks fit` likewise
in `landmarks`. Values are JSON or plain text:
`flip=false`, `milestones=[60,120]`, `executor=graphs`, `workers=null`. Runs on games have
settings of their own, which stand last here.

What hangs on another setting moves along unless it is given, too: with `steps` the milestones and
`eval_every` (a tenth of them), with `lr_expert` the rates of heads and router: 3 and 10 times it,
or in the proportion that a preset or a `--config` file has them.

A run may be resumed with other values of the settings marked *free*: they change no result but by
rounding; `fallback` decides after the training what the run keeps.

Without a preset, `--config` or a run to resume, `hubpath fit` and `hubpath compare` begin with
{begin} in place of the defaults below
(why: [results.md](results.md#routing-that-pays)). Presets and files of settings mean those. With
`k=1` the router is not supervised, and `compare` on the digits has settings of its own:
`head_init=null`, `explore=1.0`.
"""


def page() -> str:
    """docs/settings.md."""
    begin = " and ".join(
        f"`{name}={json.dumps(value)}`" for name, value in DEFAULTS[CLASSIFICATION].items()
    )
    return HEAD.format(begin=begin) + "".join(
        f"\n## {title}\n\n| setting | default | may be | |\n|---|---|---|---|\n"
        + "".join(map(_row, part))
        for title, part in PARTS.items()
    )


def _row(known: Setting) -> str:
    default = "" if known.default == () else f"`{json.dumps(known.default)}`"
    text = f"{known.help} *(free)*" if known.free else known.help
    return f"| `{known.name}` | {default} | {known.allowed()} | {text} |\n"


if __name__ == "__main__":
    print(page(), end="")
