"""Predictions of a hub beside a single expert's: checked, then timed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict

import torch
from torch import Tensor, nn

from . import step_rows, timing
from .children import Write, first_line
from .step_models import Preset
from .step_rows import Setting

GRAPH_WARM_UPS = 4  # the third prediction of a size is captured
TOLERANCE = {True: 2e-2, False: 1e-4}  # by autocast: bfloat16 keeps 8 bits, float32 sums in turn


def checked(
    hubs: Mapping[str, tuple[Setting, nn.Module]], expected: Tensor, n: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """(functions that predict n samples, why there is none), by row. expected: the reference's."""
    functions, notes = {}, {}
    for name, (setting, model) in hubs.items():
        function = step_rows.predict(setting, model, n)
        try:
            for _ in range(GRAPH_WARM_UPS if name.startswith("graphs") else 1):
                found = function()
        except Exception as error:
            notes[name] = first_line(error)
            continue
        if (found - expected).norm() <= TOLERANCE[setting.amp] * expected.norm():
            functions[name] = function
        else:
            notes[name] = "not timed: it differs from the reference"
    return functions, notes


@torch.no_grad()
def spread(setting: Setting) -> None:
    """Lets scores differ by sample, about an equal mean for each expert.

    At a generator's start all are equal, and every sample would go to the first experts.
    """
    head = setting.generator.clean
    nn.init.normal_(head.weight)
    clean, _ = setting.generator.eval()(setting.x)
    head.bias -= clean.mean(dim=0)
    setting.generator.train()


def measure(
    write: Write,
    preset: Preset,
    px: int,
    executors: Sequence[str],
    batches: Sequence[int],
    device: str,
    seconds: float,
) -> None:
    """Times predictions of one expert, of the reference, and of a hub by each executor.

    Each waits for the device: how long who asks has to wait. ``to_single``: over the expert's.
    """
    setting = step_rows.make(preset, px, device, n=max(batches))
    spread(setting)
    hubs = {name: (setting, step_rows.hub_of(setting, name)) for name in executors}
    plain = {"single 0": setting.experts[0], "reference": step_rows.reference_hub(setting)}
    for n in batches:
        functions = {name: step_rows.predict(setting, model, n) for name, model in plain.items()}
        ours, notes = checked(hubs, functions["reference"](), n)
        shape = {"px": px, "N": n, "M": len(setting.experts), "K": preset.k}
        for name, note in notes.items():
            write(f"{name}, N={n}", ok=False, note=note, **shape)
        each = seconds / len(batches) / 2
        times = timing.interleaved(functions | ours, device, each, calls=1)
        single = times["single 0"].p50
        for name, found in times.items():
            ratio = found.p50 / single
            text = f"{found.p50 * 1e3:.2f} ms, {ratio:.2f} x one expert"
            write(f"{name}, N={n}", text=text, to_single=ratio, **shape, **asdict(found))
