"""The page of ``hubpath shelf demo``: a section for each command, from the files that it wrote.

Every section begins with what to look at in a sentence. Letters: n test images, M experts of the
hub.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import report
from ..report.figures.elimination import Left, elimination_curve
from ..report.figures.scores import scores_against
from ..report.tables import short_count
from ..shelf.ranking import SCORES, YARDSTICK
from ..tasks import Classification

MEASURE = Classification.metric
SHOWN = 10  # models of the ranking, and experts of the heat map


class ShelfDemo(NamedTuple):
    """A finished demo.

    seed: of the whole. models: on the shelf. rank, compare, prune, added, unfrozen: what the
    commands made. predicted: of the test images from their files. weights: [n, M] of the hub on
    the test images, 0 where an expert is not asked. experts: [M], their labels,
    "RENDERING-NETWORK-STEP". renderings: int64 [n], how each test image is drawn, of
    rendering_names.
    """

    seed: int
    models: int
    rank: Mapping[str, Any]
    compare: Mapping[str, Any]
    prune: Mapping[str, Any]
    added: Mapping[str, Any]
    predicted: Mapping[str, Any]
    unfrozen: Mapping[str, Any]
    weights: Tensor
    experts: Sequence[str]
    renderings: Tensor
    rendering_names: Sequence[str]

    def row(self, name: str) -> Mapping[str, Any]:
        """Of a rival, by its name in compare.json."""
        return next(row for row in self.compare["rows"] if row["name"] == name)


def write_shelf_report(path: Path, demo: ShelfDemo) -> None:
    """Writes one self-contained HTML page."""
    report.write_page(
        path,
        f"A shelf of {demo.models} models",
        [_accuracy(demo), _ranking(demo), _asked(demo), _dropped(demo), _added(demo), _next(demo)],
        subtitle="Snapshots along the pre-training of four tiny networks on each of five "
        f"renderings of handwritten digits, frozen; seed {demo.seed}.",
    )


def _accuracy(demo: ShelfDemo) -> report.Section:
    split, k = demo.compare["split"], demo.compare["k"]
    rows = [
        {
            "name": row["title"],
            "value": None if row["reason"] else row[split]["accuracy"],
            "forwards": row["forwards"],
            "milliseconds": row["ms"],
            "bound": row["bound"],
            "note": row["reason"] or "",
        }
        for row in demo.compare["rows"]
    ]
    hub, static, oracle = (
        demo.row(name)[split]["accuracy"] for name in ("hub", "static", "oracle")
    )
    absent = [f"{row['title']}: {row['reason']}." for row in demo.compare["rows"] if row["reason"]]
    text = (
        f"The routed hub runs {k} models for each image, of {len(demo.experts)} that it took from "
        f"{demo.models}, and is right on {MEASURE.text(hub)} of {demo.compare['images']} {split} "
        f"digits; the best {k} models, the same for all images, are right on "
        f"{MEASURE.text(static)}. On {MEASURE.text(oracle)} some model is right (the oracle, which "
        "nobody can choose).\n\n"
        "All have the same features, the same heads and the same split; all is chosen on "
        "validation images. A method to the right runs more models for each image."
    )
    picture = report.Picture(
        report.measure_against_cost(rows, MEASURE, [row["name"] for row in rows], "image"),
        "Accuracy on the test digits over the models that run for each image.",
        "Scatter plot of accuracy over forwards per image, with the Pareto front",
    )
    return report.Section(
        "How good is it, and what does it cost?",
        text,
        [picture, _rivals(demo, split), *absent],
    )


def _rivals(demo: ShelfDemo, split: str) -> report.Table:
    heads = [
        "", f"{split} {MEASURE.label}", "log-loss", "forwards", "ms per image", "parameters",
        "hub ahead, points", _interval(demo.compare["level"]),
    ]  # fmt: skip
    rows, shown = [], [row for row in demo.compare["rows"] if not row["reason"]]
    for row in shown:
        ahead, scored = row["ahead"] or {}, row[split]
        between = ahead.get("interval")
        rows.append(
            [
                f"{row['title']} (bound)" if row["bound"] else row["title"],
                scored["accuracy"],
                scored["loss"],
                row["forwards"],
                row["ms"],
                row["parameters"],
                ahead.get("points"),
                "" if between is None else _between(*between),
            ]
        )
    bounds = [i for i, row in enumerate(shown) if row["bound"]]
    table = report.Table(
        heads,
        rows,
        formats={
            heads[1]: MEASURE.number, "forwards": ".3g", "ms per image": ".2f",
            "parameters": short_count, "hub ahead, points": "+.1f",
        },
    )  # fmt: skip
    table.highlight = report.best_cells(table, heads[1], skip=bounds)
    return table


def _interval(level: float) -> str:
    return f"{100 * level:.0f} % interval"


def _percent(share: float) -> str:
    """As the measure's values are written."""
    return f"{100 * share:.0f} %"


def _between(low: float, high: float) -> str:
    """An interval that is not broken into lines."""
    return f"{low:+.1f}\u00a0to\u00a0{high:+.1f}"


def _ranking(demo: ShelfDemo) -> report.Section:
    rank = demo.rank
    models, agreement = rank["models"], rank["agreement"]
    taus = {name: found["tau"] for name, found in agreement.items() if found["tau"] is not None}
    best, worst = max(taus, key=taus.get), min(taus, key=taus.get)
    text = (
        f"{_title(best)} orders the {demo.models} models most like the accuracy of cross-validated "
        f"linear heads does (Kendall's tau {taus[best]:.2f}), {_title(worst)} least "
        f"({taus[worst]:.2f}). That varies by data set, so it is measured every time."
    )
    taught = [
        [
            _title(name),
            found["tau"],
            found["recall"],
            sum(model["seconds"].get(name, 0.0) for model in models),
            found["models"],
        ]
        for name, found in agreement.items()
    ]
    recall = f"best {rank['best']} among its first {rank['top']}"
    agreed = report.Table(
        ["score", "Kendall's tau", recall, "seconds", "models"],
        taught,
        formats={"Kendall's tau": ".2f", recall: _percent, "seconds": ".1f"},
        caption="Each score against the yardstick",
    )
    scatter = report.Picture(
        scores_against(
            {SCORES[name]: [_score(model, name) for model in models] for name in agreement},
            [model["scores"][YARDSTICK] for model in models],
            MEASURE,
            [model["label"].split("-")[1] for model in models],
            {SCORES[name]: f"tau {tau:.2f}" for name, tau in taus.items()},
            f"{MEASURE.title} of a linear head, {MEASURE.unit}",
        ),
        "Every model by a cheap score and by the cross-validated accuracy of a linear head on its "
        "features.",
        "Scatter plots of five cheap scores against the accuracy of linear heads",
    )
    return report.Section(
        "Which models are worth having?", text, [agreed, _best_models(demo), scatter]
    )


def _title(name: str) -> str:
    """Of a score, without its unit."""
    return SCORES[name].partition(",")[0]


def _score(model: Mapping[str, Any], name: str) -> float | None:
    """In the unit that its title names."""
    score = model["scores"].get(name)
    return 100 * score if score is not None and SCORES[name].endswith("%") else score


def _best_models(demo: ShelfDemo) -> report.Table:
    names = list(demo.rank["agreement"])
    shown = demo.rank["models"][:SHOWN]
    heads = ["rank", "model", f"linear head, {MEASURE.unit}", *(SCORES[name] for name in names)]
    heads += ["parameters", "ms per image"]
    rows = [
        [
            model["rank"],
            model["label"],
            model["scores"][YARDSTICK],
            *(_score(model, name) for name in names),
            None if model["parameters"] is None else float(model["parameters"]),
            model["ms"],
        ]
        for model in shown
    ]
    return report.Table(
        heads,
        rows,
        formats={
            heads[2]: MEASURE.number, "parameters": short_count, "ms per image": ".2f",
            **{SCORES[name]: ".1f" for name in names if SCORES[name].endswith("%")},
        },
        caption=f"The first {len(shown)} of {demo.models}, by the linear head",
    )  # fmt: skip


def _asked(demo: ShelfDemo) -> report.Section:
    groups = [demo.renderings == i for i in range(len(demo.rendering_names))]
    weights = demo.weights / demo.weights.sum(dim=1, keepdim=True)
    mean = torch.stack([weights[group].mean(dim=0) for group in groups])  # [renderings, M]
    known = torch.tensor(
        [demo.rendering_names.index(label.partition("-")[0]) for label in demo.experts]
    )
    by_known = torch.zeros(len(groups), len(groups), dtype=mean.dtype).index_add(1, known, mean)
    load = (weights > 0).double().mean(dim=0)
    asked = int((load > 0).sum())
    most = load.argsort(descending=True, stable=True)[:SHOWN].tolist()
    shown = sorted((i for i in most if load[i] > 0), key=lambda i: (int(known[i]), i))
    rest = 1 - load[shown].sum() / load.sum()
    own = by_known.diagonal().sum() / by_known.sum()
    text = (
        f"{_percent(own)} of the weight lies on models that were pre-trained on the rendering of "
        f"the image; a router that asked the same of all images would have "
        f"{_percent(1 / len(groups))} there. It was told nothing of renderings: it sees the image "
        f"and learns from the classes alone. Of {len(demo.experts)} experts {asked} are asked "
        "about a test image at all."
    )
    names = list(demo.rendering_names)
    return report.Section(
        "Who is asked?",
        text,
        [
            report.Picture(
                report.heat_map(
                    by_known, names, names, "rendering of the image",
                    "rendering that the models were pre-trained on", "share of the weight",
                    limits=(0.0, 1.0), cell=_weight,
                ),
                "Shares of the weight on the test digits, summed over each rendering's models; a "
                "bare 0: none at all.",
                "Heat map of weights by rendering of the image and of the pre-training",
            ),
            report.Picture(
                report.mean_weights(
                    mean[:, shown], names, [demo.experts[i] for i in shown], "rendering"
                ),
                f"The {len(shown)} experts that are asked most, by what they were pre-trained on; "
                f"the others have {_percent(rest)} of all that is asked.",
                "Heat map of the mean weight of the experts that are asked most, by rendering",
            ),
        ],
    )  # fmt: skip


def _weight(value: float) -> str:
    """A bare 0 for a weight that nothing has."""
    return "0" if value == 0 else f"{value:.2f}"


def _dropped(demo: ShelfDemo) -> report.Section:
    found, total = demo.prune, len(demo.prune["experts"])
    chosen = found["chosen"]
    left = [Left(total, 0.0, 0.0, 0.0)]
    left += [
        Left(step["left"], step["lost"], *(step["interval"] or (math.nan,) * 2), step["dropped"])
        for step in found["steps"]
    ]
    if chosen is None:
        text = f"None of the {total} experts can go within {found['points']:g} points."
        kept = None
    else:
        kept = len(chosen["kept"])
        untaken = demo.models - total
        text = (
            f"{demo.models - kept} of {demo.models} models can go: "
            f"{f'{untaken} that the hub never took, and ' if untaken else ''}"
            f"{total - kept} of its {total} experts, without which it loses at "
            f"most {found['points']:g} points of {MEASURE.title} on {found['images']} validation "
            "images."
        )
        if chosen["test"] is not None:
            text += (
                f" On the test images, looked at once: {MEASURE.text(chosen['test']['hub'])} with "
                f"{total} experts, {MEASURE.text(chosen['test']['value'])} with {kept}: "
                f"{_judged(chosen['test'], found['points'])}."
            )
    picture = report.Picture(
        elimination_curve(left, found["points"], kept, found["level"]),
        "Points lost on validation images as experts go one after another, those first that are "
        f"missed least; grey: {_interval(found['level'])} of a paired bootstrap over the images.",
        "Line of the points lost over the number of experts left",
    )
    return report.Section("What can go?", text, [picture, *_kept(demo)])


def _judged(test: Mapping[str, Any], points: float) -> str:
    """What the test images say of a hub that validation images chose."""
    lost = f"{test['lost']:.1f} points lost"
    if test["confirmed"]:
        return f"{lost}, which confirms it"
    return f"{lost}, more than {points:g}, so validation was too kind to it"


def _kept(demo: ShelfDemo) -> list[report.Table]:
    chosen = demo.prune["chosen"]
    if chosen is None:
        return []
    experts = {expert["name"]: expert for expert in demo.prune["experts"]}
    rows = []
    for name in chosen["kept"]:
        asked, without = experts[name]["asked"], experts[name]["without"]
        low, high = without["interval"] or (math.nan, math.nan)
        rows.append([name, asked, without["lost"], _between(low, high)])
    rows.sort(key=lambda row: -row[1])
    heads = [
        "kept", "share of images, %", "points lost without it", _interval(demo.prune["level"]),
    ]  # fmt: skip
    return [report.Table(heads, rows, formats={heads[1]: MEASURE.number, heads[2]: "+.2f"})]


def _added(demo: ShelfDemo) -> report.Section:
    added, title = demo.added, "What can come?"
    if "reason" in added:
        return report.Section(title, f"{added['expert']} was refused: {added['reason']}.")
    unchanged, groups = added["unchanged"], added["groups"]
    text = (
        f"{added['expert']} joins the hub that was left: only its own features, its head and its "
        f"score are computed. On the {unchanged['images']} images that it does not get, the "
        f"largest change of a probability is {unchanged['largest_change']:g}."
    )
    heads = ["test images", f"{MEASURE.label}, before", "after", "share that it gets, %"]
    rows = [[group["images"], group["before"], group["after"], group["share"]] for group in groups]
    forms = dict.fromkeys(heads[1:], MEASURE.number)
    return report.Section(title, text, [report.Table(heads, rows, formats=forms)])


def _next(demo: ShelfDemo) -> report.Section:
    told, unfrozen = demo.predicted, demo.unfrozen
    same = "all" if told["same"] == told["images"] else f"{told['same']}"
    text = (
        f"From files, hubpath shelf predict runs {told['forwards']:g} bodies for each of "
        f"{told['images']} test images and says of {same} of them the same class as the cached "
        f"features: {MEASURE.text(told['accuracy'])} are right.\n\n"
        f"hubpath shelf unfreeze wrote the command that goes on from the "
        f"{len(unfrozen['experts'])} experts that matter most, end to end: "
        f"{', '.join(expert['name'] for expert in unfrozen['experts'])}."
    )
    return report.Section("And then?", text)
