"""The model card of a saved hub, ``README.md``: metadata for the Hugging Face hub, and text.

Every number comes from the run's ``result.json``, the model's ``config.json``, or was measured when
the card was written; what is not there the card does not say, or says that it is not known.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from ..data.named import FOLDER
from ..data.sources import PUBLISHED
from ..fields import nested
from ..files import printable, write_text
from ..hub.aliases import LOCAL
from ..measure import Measure
from ..tasks.classification import ACCURACY
from ..tasks.landmarks.task import NME
from .licences import Weights, metadata, weights_of
from .saved import CARD_FILE

TEMPLATE = "card.md.jinja"
LIBRARY = "hubpath_fast"
CLASSES_IN_TEXT = 100
MARKS = re.compile(r"([\\`*_\[\]|~#])")  # what Markdown would read

# name of the task -> its measure, and what the Hugging Face hub calls it
TASKS = {
    "classification": (ACCURACY, "image-classification"),
    "landmarks": (NME, "keypoint-detection"),
}
# Data sets that are on the Hugging Face hub under their publisher's own name.
HUB_DATASETS = {"cifar-100": "uoft-cs/cifar100"}


def write_card(
    folder: str | Path,
    config: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
    licenses: Mapping[int | str, str] | None = None,
    name: str | None = None,
) -> Path:
    """Writes ``README.md`` beside a saved model, and returns its path.

    Args:
        folder: of the saved model.
        config: its ``config.json``; with "trainer" and "run", as a run's checkpoints have them,
            the card also tells of the training.
        result: the run's ``result.json``; None: the card has no results, and says so. "costs" in
            it, see ``costs.measured_costs``, says what an image takes.
        licenses: of experts' weights, by number or label: in place of what their sources state.
        name: what the model is called, and opened as; None: as the folder is.

    Raises ValueError for a licence of an expert that there is not.
    """
    folder = Path(folder)
    text = card(name or folder.resolve().name, config, result, licenses)
    return write_text(folder / CARD_FILE, text)


def card(
    name: str,
    config: Mapping[str, Any],
    result: Mapping[str, Any] | None = None,
    licenses: Mapping[int | str, str] | None = None,
) -> str:
    """The text of the card; see ``write_card``."""
    model, fit = config["model"], (config.get("run") or {}).get("fit") or {}
    task = model.get("task") or {}
    weights = weights_of(model["experts"], licenses)
    pretrained = fit.get("pretrained", True)
    fields = {
        "name": plain(name),
        "what": _what(model, task),
        "opens": json.dumps(name),
        "call": _call(config),
        "images": _images(config.get("preprocessing")),
        "classes": _classes(task.get("classes")),
        "results": _results(model, task, result),
        "experts": _experts(model, weights, pretrained, result),
        "licences": _licences(model, weights, pretrained),
        "trained": _trained(task, result),
        "settings": _settings(config),
        "versions": _versions(config.get("versions")),
    }
    environment = Environment(
        loader=PackageLoader("hubpath_fast.pretrained", "."),
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # it is Markdown; ``plain`` escapes what others have named
    )
    head = _metadata(name, task, weights if pretrained else [], result)
    body = environment.get_template(TEMPLATE).render(fields)
    return f"---\n{head}\n---\n\n{body}"


def plain(text: Any) -> str:
    """Text of others, such as a class's name, as Markdown shows it: on one line, with no markup."""
    one_line = " ".join(printable(str(text)).split())
    return MARKS.sub(r"\\\1", html.escape(one_line, quote=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are escaped already; the first column is text, the others
    numbers."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, rule, *rows))


def _metadata(
    name: str, task: Mapping[str, Any], weights: Sequence[Weights], result: Mapping[str, Any] | None
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    measure, kind = TASKS.get(task.get("name"), (None, None))
    found: dict[str, Any] = {"library_name": LIBRARY, "tags": ["hub-pathway"]}
    found |= metadata(weights) if weights else {}
    if kind is not None:
        found |= {"pipeline_tag": kind, "metrics": [measure.name]}
    dataset = task.get("dataset")
    if dataset in HUB_DATASETS:
        found["datasets"] = [HUB_DATASETS[dataset]]
    value = None if measure is None else (result or {}).get(f"test_{measure.name}")
    if value is not None and dataset not in (None, FOLDER):
        found["model_name"] = name
        found["eval_results"] = [
            EvalResult(
                task_type=kind,
                dataset_type=HUB_DATASETS.get(dataset, dataset),
                dataset_name=_title(dataset),
                dataset_split="validation" if result.get("test_is_validation") else "test",
                metric_type=measure.name,
                metric_value=value,
            )
        ]
    return ModelCardData(**found).to_yaml().strip()


def _what(model: Mapping[str, Any], task: Mapping[str, Any]) -> str:
    count, k, generator = len(model["experts"]), model["k"], model["generator"]["kind"]
    if generator == "fixed":
        chosen = [plain(model["experts"][i]["label"]) for i in model["generator"]["experts"]]
        how = f"every image goes to the same {len(chosen)} of them, {' and '.join(chosen)}"
    elif k == count:
        how = "every image goes to all of them, with weights of its own from a small router"
    else:
        how = f"a router sends each image to the {k} of them that suit it best"
    text = (
        f"A Hub-Pathway (Shu et al., NeurIPS 2022) of {count} experts, each a network of its own: "
        f"{how}, and their weighted outputs are combined."
    )
    dataset, kind = task.get("dataset"), task.get("name")
    if kind == "classification":
        text += f" It gives an image one of {len(task['classes'])} classes"
    elif kind == "landmarks":
        text += " It finds the landmarks of a face, or of what else it was shown"
    else:
        return text
    on = "images of its author's own" if dataset == FOLDER else _title(dataset)
    return f"{text}; it learned on {on}." if dataset else f"{text}."


def _call(config: Mapping[str, Any]) -> str:
    size = (config.get("preprocessing") or {}).get("input_size")
    shape = f"[N, 3, {size}, {size}]" if size else "as the experts take them"
    kind = (config["model"].get("task") or {}).get("name")
    if kind == "classification":
        return f"probabilities = model(images).softmax(dim=1)  # images: uint8 {shape}"
    return f"outputs = model(images)  # images: uint8 {shape}"


def _images(preprocessing: Mapping[str, Any] | None) -> str:
    """What images must look like."""
    if not preprocessing:
        return "What its images must look like is known to its author: it was made of modules."
    lines = [f"- {name.replace('_', ' ')}: {plain(_said(v))}" for name, v in preprocessing.items()]
    return "Images:\n\n" + "\n".join(lines)


def _said(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return " x ".join(map(str, value))
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _classes(classes: Sequence[str] | None) -> str:
    if not classes:
        return ""
    if len(classes) > CLASSES_IN_TEXT:
        return f"The names of its {len(classes)} classes are in `config.json`, in their order."
    return f"Classes, in the order of the outputs: {', '.join(map(plain, classes))}."


def _results(
    model: Mapping[str, Any], task: Mapping[str, Any], result: Mapping[str, Any] | None
) -> str:
    measure, _ = TASKS.get(task.get("name"), (None, None))
    if not result or measure is None or result.get(f"test_{measure.name}") is None:
        return "Whoever saved this model gave no results of a run with it: none are known here."
    images = f"{result['test_images']:,} images" if "test_images" in result else "images"
    split = "validation" if result.get("test_is_validation") else "test"
    columns, cells = [f"{measure.title}, {split}"], [measure.text(result[f"test_{measure.name}"])]
    for key, title, form in COSTS:
        value = (result.get("costs") or {}).get(key)
        if value is not None:
            columns.append(title)
            cells.append(f"{value:{form}}")
    parts = [table(["", *columns], [["this model", *cells]])]
    notes = [f"Measured on {images}" + (", which also chose its weights" * (split != "test"))]
    if "costs" in result:
        notes.append(
            f"ms are the median of five, on {result['costs']['device']}, in batches of "
            f"{result['costs']['batch']}"
        )
    else:
        notes.append(f"an image runs {model['k']} experts; what that takes was not measured")
    parts.append("; ".join(notes) + ".")
    routing = result.get("routing") or {}
    if "learned" in routing:
        parts += _compared(model, routing, measure)
    return "\n\n".join(parts)


COSTS = (
    ("forwards_per_sample", "forwards an image", ".3g"),
    ("milliseconds_per_sample", "ms an image", ".3g"),
    ("gflops_per_sample", "GFLOPs an image", ".3g"),
)


def _compared(model: Mapping[str, Any], routing: Mapping[str, Any], measure: Measure) -> list[str]:
    """Its routes beside other ways to ask its experts."""
    k = str(model["k"])
    ways = [("learned routes", k, routing["learned"])]
    if "fixed" in routing:
        names = " and ".join(map(plain, routing["fixed"]["names"]))
        ways += [
            (f"always {names}, the best {k}", k, routing["fixed"]),
            (f"{k} drawn for each image", k, routing["random"]),
        ]
    ways += [(f"{plain(one['name'])} alone", "1", one) for one in routing["alone"]]
    kept = "fixed" if routing.get("kept") == "fixed" else "learned"
    rows = []
    for (way, count, found), key in zip(
        ways, ("learned", "fixed", *[""] * len(ways)), strict=False
    ):
        interval = f"{measure.number(found['low'])} to {measure.number(found['high'])}"
        way = f"**{way}** (this model)" if key == kept else way
        rows.append([way, count, measure.number(found["value"]), interval])
    columns = ["who is asked", "forwards an image", measure.label, "95 % interval"]
    return [
        f"The same experts, asked in other ways, on {routing['images']:,} "
        f"{routing['split']} images:",
        table(columns, rows),
        f"In words: {plain(routing['sentence'])}.",
    ]


def _experts(
    model: Mapping[str, Any],
    weights: Sequence[Weights],
    pretrained: bool,
    result: Mapping[str, Any] | None,
) -> str:
    """What each began with, and what it is asked for."""
    routes = (result or {}).get("routes") or {}
    columns, told = ["expert", "began with"], []
    for key, title in (("share", "share of images"), ("weight", "mean weight")):
        if len(routes.get(key) or ()) == len(weights):
            columns.append(title)
            told.append(
                [f"{value:.1%}" if key == "share" else f"{value:.3f}" for value in routes[key]]
            )
    rows = []
    for i, (expert, began) in enumerate(zip(model["experts"], weights, strict=True)):
        start = _link(began) if pretrained else f"random weights ({plain(began.name)})"
        rows.append([plain(expert["label"]), start, *(column[i] for column in told)])
    text = table(columns, rows)
    if told:
        text += "\n\nThe share is of the test images that an expert is asked about, without noise"
        text += f": {routes['sets']} different sets of experts occur" * ("sets" in routes) + "."
    else:
        text += "\n\nWhat each of them is asked for was not measured."
    return text + _by_class(model, routes)


def _by_class(model: Mapping[str, Any], routes: Mapping[str, Any]) -> str:
    """Who is asked about which class; classes without test images are left out."""
    shares, classes = routes.get("class_share"), (model.get("task") or {}).get("classes") or ()
    if not shares:
        return ""
    labels = [plain(expert["label"]) for expert in model["experts"]]
    rows = [
        [plain(name), *(f"{share:.0%}" for share in shares[str(number)])]
        for number, name in enumerate(classes)
        if str(number) in shares
    ]
    head = "<details><summary>Share of images by class</summary>"
    return f"\n\n{head}\n\n{table(['class', *labels], rows)}\n\n</details>"


def _link(weights: Weights) -> str:
    name = plain(weights.name)
    if weights.repository is None:
        return name
    return f"[{name}](https://huggingface.co/{weights.repository})"


def _licences(model: Mapping[str, Any], weights: Sequence[Weights], pretrained: bool) -> str:
    if not pretrained:
        return (
            "Its experts began with random weights, so no licence of pre-trained weights is stated "
            "here. Nothing is stated of the model's own, either: ask its author."
        )
    rows = [
        [plain(expert["label"]), _link(began), plain(began.licence or "unknown"), plain(began.by)]
        for expert, began in zip(model["experts"], weights, strict=True)
    ]
    head, _, *lines = table(["expert", "weights", "licence", "stated by"], rows).splitlines()
    text = "\n".join([head, "|---|---|---|---|", *lines])
    unknown = sum(began.licence is None for began in weights)
    several = len({began.licence for began in weights}) > 1
    notes = ["The model holds weights that began as these; each has its own licence."] * several
    if unknown:
        notes.append(
            f"Of {unknown} of {len(weights)} the licence is unknown: ask their authors before you "
            "use or share the model."
        )
    return "\n\n".join([text, *([" ".join(notes)] if notes else [])])


def _trained(task: Mapping[str, Any], result: Mapping[str, Any] | None) -> str:
    command = "hubpath landmarks fit" if task.get("name") == "landmarks" else "hubpath fit"
    text = f"Trained by `{command} --config FILE`, with a FILE of the settings below"
    if result and result.get("best_step") is not None and "steps" in result:
        text += f"; the weights are those of step {result['best_step']} of {result['steps']}"
    if result and "seconds" in result:
        text += f", {result['seconds']:,.0f} seconds of training"
    return text + ". Where its data lies is left out."


def _settings(config: Mapping[str, Any]) -> str:
    """The settings of the run as JSON, without paths of the machine that it ran on."""
    fit, trainer = (config.get("run") or {}).get("fit"), config.get("trainer")
    if not fit or not trainer:
        return ""
    told = nested({name: value for name, value in fit.items() if not _is_local(value)})
    return printable(json.dumps({**told, "trainer": dict(trainer)}, indent=2))


def _is_local(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, str) and (os.path.isabs(v) or v.startswith(LOCAL)) for v in values)


def _versions(versions: Mapping[str, str] | None) -> str:
    if not versions:
        return "Not noted."
    return ", ".join(f"{plain(name)} {plain(version)}" for name, version in versions.items()) + "."


def _title(dataset: str) -> str:
    return PUBLISHED[dataset].title if dataset in PUBLISHED else dataset
