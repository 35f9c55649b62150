"""``hubpath add``: one more pre-trained model joins a trained hub.

Its score and its head are fitted, see ``runs.calibrate``; its body and all that the hub has learned
stay as they are, and so does every prediction of an image that it does not get. Without other data,
images are the run's validation split, since on its training images the hub is too sure of itself to
be helped. With images of a kind that the newcomer is for, these are held out from the hub in any
case, and the run's training images are what the newcomer has to leave alone. No image that anything
was fitted or chosen on is reported on.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.other import read_other
from ..data.splits import Split, stratified_split
from ..files import write_json
from ..hub import build_experts
from ..hub.errors import HubError
from ..hub.expert import Expert
from ..hub.origin import expert_origin
from ..hub.registry import find
from ..hub.spec import ExpertSpec, read_specs
from ..model import HubPathway, add_newcomer
from ..model.newcomers import check_extendable
from ..pretrained.save import check_free
from ..runs.answers import check_memory
from ..runs.build import eval_batches
from ..runs.calibrate import CHOSEN, REPORTED, Calibrated, Seen, apply, calibrate, see
from ..runs.config import CLASSIFICATION
from ..runs.data import open_to_score
from ..runs.folder import Run, open_run
from ..runs.measure import predict
from ..training.random_state import seed_all

ADD = "add.json"
STEPS = 500
OWN, GIVEN = "the run's", "given by --data"


@dataclass(frozen=True)
class Group:
    """Images of one origin: to fit on, to choose on and to report on; no image is in two.
    reported: what the last ones are called."""

    name: str
    fit: Split
    choose: Split
    report: Split
    reported: str


def add(
    run: str | Path,
    name: str,
    out: str | Path,
    data: str | Path | None = None,
    device: str = "cpu",
    data_root: str | Path | None = None,
    steps: int = STEPS,
    pretrained: bool = True,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Adds an expert to a run's hub, and saves the larger hub; the run stays as it is.

    Args:
        run: the folder of a run of ``hubpath fit``.
        name: of the expert, see ``hub.build_experts``.
        out: the folder of the larger hub, which ``from_pretrained`` opens; new or empty, or a saved
            hub.
        data: a folder of images that the newcomer is for, CLASS/IMAGE with classes of the run (see
            ``read_other``): half of them are fitted on, a quarter is chosen on, and a quarter is
            reported on; of the run's own, training, validation and test images. None: two thirds
            of the run's validation images are fitted on, and a third is chosen on.
        data_root: where the run's own data lies now.
        steps: of the fit.
        pretrained: False: random weights.
        tell: is told what is being done.

    Returns what ``add.json`` in ``out`` holds: "expert", "label", "groups" (each with name, images,
    before, after and share, the part of them that the newcomer gets), "fit_images",
    "choose_images", "loss", "steps", "seconds", and "unchanged": of the images that it does not
    get, how many there are, and the largest change of a probability.

    Raises:
        ValueError: no run, or one without validation images; a hub that cannot be extended; a name
            that is unknown or in the hub already; a newcomer that makes nothing better.
    """
    opened = open_run(run, device, CLASSIFICATION)
    if opened.folder is None:
        raise ValueError(
            f"{run} is a saved hub, which has no images of its own; give the run that it was "
            "saved from"
        )
    check_free(Path(out))
    opened.check_apart(out)
    check_extendable(opened.model)
    if steps < 1:
        raise ValueError(f"steps: expected an integer of at least 1, got {steps}")
    [spec] = specs = read_specs([name])
    _check_new(opened.model, spec)
    groups = _groups(opened, data, data_root)
    began = time.perf_counter()
    seed_all(opened.config.trainer.seed)
    task, size = opened.task, opened.image_size
    [expert] = build_experts(specs, task.num_outputs, pretrained, size, task=task)
    before = [_predicted(opened, group.report, device)[0] for group in groups]
    found = _join(opened, expert, groups, device, steps, tell)
    result = {
        "expert": str(spec),
        "label": opened.names[-1],
        "groups": [],
        "fit_images": sum(len(group.fit) for group in groups),
        "choose_images": sum(len(group.choose) for group in groups),
        "loss": {"before": found.before, "after": found.after},
        "steps": steps,
        "seconds": time.perf_counter() - began,
    }
    kept, change = 0, 0.0
    for group, old in zip(groups, before, strict=True):
        new, weights = _predicted(opened, group.report, device)
        sent = weights[:, -1] > 0
        kept += int((~sent).sum())
        change = max([change, *(new - old)[~sent].abs().flatten().tolist()])
        targets = torch.tensor(group.report.targets)
        values = [task.scores(said, targets).mean().item() for said in (old, new)]
        of = {"name": group.name, "split": group.reported, "images": len(targets)}
        share = sent.double().mean().item()
        result["groups"].append({**of, "before": values[0], "after": values[1], "share": share})
    result["unchanged"] = {"images": kept, "largest_change": change}
    opened.model.save_pretrained(out)
    write_json(Path(out) / ADD, result)
    return result


def _check_new(model: HubPathway, spec: ExpertSpec) -> None:
    """Raises ValueError for a network that is in the hub already."""
    name = find(spec).name
    for origin in model.origin.experts:
        if origin.spec is not None and _known_as(ExpertSpec.parse(origin.spec)) == name:
            raise ValueError(
                f"name: {name} is in the hub already, as {origin.label}; expected another of "
                "`hubpath hub list`, or a file of weights"
            )


def _known_as(spec: ExpertSpec) -> str | None:
    """The whole name of a network; None where its source knows it no longer."""
    try:
        return find(spec).name
    except HubError:
        return None


def _groups(opened: Run, data: str | Path | None, data_root: str | Path | None) -> list[Group]:
    config, folder = opened.config, opened.folder
    splits = open_to_score(folder, config, data_root)
    if not len(splits.validation):
        raise ValueError(
            f"{folder.path} holds out no validation images, on which a newcomer is fitted; fit it "
            "again with --validation 0.1"
        )
    seed = config.trainer.seed
    held, test, reported = splits.validation, splits.test, "test"
    if splits.test_is_validation:
        held, test = _drawn(held, REPORTED, seed, "newcomer reported")
        reported = "held back"
    if data is None:
        groups = [Group(OWN, *_drawn(held, CHOSEN, seed, "newcomer chosen"), test, reported)]
    else:
        given, back = _drawn(
            read_other(Path(data), opened.classes).images, REPORTED, seed, "newcomer reported"
        )
        parts = _drawn(given, CHOSEN, seed, "newcomer chosen")
        groups = [
            # What the hub knows best is what the newcomer has to leave alone; and many are needed
            # to tell it apart from the images given.
            Group(OWN, splits.train, held, test, reported),
            Group(GIVEN, *parts, back, "held back"),
        ]
    for group in groups:
        if not all(len(part) for part in (group.fit, group.choose, group.report)):
            raise ValueError(
                f"data: the images {group.name} are too few to fit, choose and report on; expected "
                "at least 3 of a class"
            )
    return groups


def _drawn(split: Split, share: float, seed: int, word: str) -> tuple[Split, Split]:
    kept, held = stratified_split(split.targets, share, seed, word)
    return split.subset(kept), split.subset(held)


def _predicted(opened: Run, split: Split, device: str) -> tuple[Tensor, Tensor]:
    batches = eval_batches(split, opened.config, opened.image_size, device=device)
    amp = opened.config.trainer.amp
    return predict(opened.model, opened.task, batches, device, amp)


def _join(
    opened: Run,
    expert: Expert,
    groups: Sequence[Group],
    device: str,
    steps: int,
    tell: Callable[[str], None],
) -> Calibrated:
    """Fits the newcomer and puts it into the model; nothing is changed where it is of no use."""
    model, config, on = opened.model, opened.config, torch.device(device)
    module = expert.module.to(on).eval()
    if config.channels_last:
        module.to(memory_format=torch.channels_last)
    images = torch.tensor(expert.mean), torch.tensor(expert.std)
    parts: dict[str, list[Seen]] = {"fit": [], "choose": []}
    for name, found in parts.items():
        for group in groups:
            split = getattr(group, name)
            tell(f"asking all experts about {len(split)} images {group.name}, to {name} on")
            batches = eval_batches(split, config, opened.image_size, device=device)
            room = functools.partial(check_memory, images=len(split))
            try:
                seen, head = see(model, module, images, batches, on, config.trainer.amp, room)
            except ValueError as error:
                if not str(error).startswith("warm_up: "):
                    raise
                reason = str(error).removeprefix("warm_up: ").partition(";")[0]
                raise ValueError(f"name: {expert.name} cannot be fitted: {reason}") from error
            found.append(seen)
    tell(f"fitting the score and the head of {expert.name}, {steps} steps")
    whole = {name: _together(found) for name, found in parts.items()}
    seed = config.trainer.seed
    found = calibrate(whole["fit"], whole["choose"], head.layer, opened.task, steps, seed)
    if found is None:
        raise ValueError(
            f"name: {expert.name} makes nothing better on the {len(whole['choose'])} held-out "
            "images to choose on, so nothing was saved; give images that it is for by --data, or "
            "another model"
        )
    origin = expert_origin(expert, opened.image_size)
    add_newcomer(model, module, expert.mean, expert.std, origin)
    apply(model, head.layer, found)
    return found


def _together(parts: Sequence[Seen]) -> Seen:
    first = parts[0].answers
    clean, outputs, targets = (
        torch.cat([getattr(part.answers, name) for part in parts])
        for name in ("clean", "outputs", "targets")
    )
    answers = type(first)(clean, outputs, targets, first.k, first.renormalize, first.aggregator)
    kept = (torch.cat([getattr(p, n) for p in parts]) for n in ("features", "inputs", "before"))
    group = torch.cat([torch.full((len(part),), i) for i, part in enumerate(parts)])
    return Seen(answers, *kept, group)
