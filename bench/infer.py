"""A hub in service: latency of one image, images/s, loading, memory and size, against its experts.

    python -m bench.infer [--preset tiny|homogeneous|heterogeneous | --model DIR]
                          [--forms sparse,cond,dense,parts] [--device cpu|cuda] [--images 400]
                          [--seconds 20] [--quick] [--out FILE]

Rows: the model as it is, and frozen for inference; each form of ``hubpath export``; the slowest of
its experts and the mean of all, alone; an ensemble of K experts. Each takes uint8 images on the
host and answers with probabilities on the host. Every row's answers are compared with the model's
before it is timed; one that fails, or says something else, says so in place of numbers.

One image after another, from a tensor and from a JPEG file: p50, p90 and p99 over --images images,
each asked of all rows in turn. A p99 is that of the hub's slowest pair of experts, which the table
names. Then batches of 8 and 64, in interleaved rounds, and each row in processes of its own:
loading, and the most memory held. See docs/export.md for the columns. Rows are JSON lines in --out.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

import hubpath_fast as hp

from . import children, infer_child, infer_goals, infer_latency, infer_setup, jsonl, records, timing
from .infer_latency import Latency
from .infer_rows import Answer, Row, to_dict
from .infer_setup import FORMS, PRESETS, Questions

BATCHES = (8, 64)
PROCESSES = 3  # of which loading and memory are the medians
GENERATOR, SLOWEST, MEAN = "generator", "slowest expert", "mean expert"
PROBED = 20  # images by which an ensemble's experts are chosen


@dataclass
class Measured:
    """What is known of each row, by its name, and why nothing is."""

    records: dict[str, dict] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, **values: object) -> None:
        self.records.setdefault(name, {}).update(values)


@dataclass(frozen=True)
class Setting:
    """rows: those that a table has, in its order; singles: [M], each expert alone."""

    model: hp.HubPathway
    rows: list[Row]
    singles: list[Row]
    questions: Questions
    photos: list[Path]
    device: str

    @property
    def size(self) -> int:
        return self.model.origin.input_size

    @property
    def labels(self) -> tuple[str, ...]:
        return self.model.origin.labels


def measure(model: hp.HubPathway, args: argparse.Namespace, folder: Path) -> list[dict]:
    """The records of all rows; model: on the CPU, in evaluation mode."""
    measured = Measured()
    say = progress(time.monotonic())
    rows, singles = infer_setup.save(model, folder / "model")
    exported, measured.notes = infer_setup.export_all(model, folder, args.forms, args.device)
    say(f"saved, and exported as {', '.join(row.name for row in exported) or 'nothing'}")
    model = model.to(args.device)
    questions = infer_setup.make_questions(model, max(args.images, max(BATCHES)))
    photos = infer_setup.write_photos(folder / "photos")
    setting = Setting(model, [*rows, *exported], singles, questions, photos, args.device)
    answers, notes = infer_setup.open_checked([*setting.rows, *singles], questions, args.device)
    measured.notes |= notes
    add_ensemble(setting, answers, measured)
    known = {row.name: row for row in setting.rows}
    for name, row in known.items():
        if name in answers:
            measured.add(name, bytes=row.bytes, routed=row.routed)
    say(f"opened and compared: {len(answers)}, of which {len(singles)} are experts alone")
    add_latency(setting, answers, args.images, measured)
    add_from_files(setting, answers, args.images, measured)
    say(f"asked about {args.images} images and as many files, one after another")
    add_batches(setting, answers, args.seconds, measured)
    say(f"asked about batches of {' and '.join(map(str, BATCHES))}; now in processes of their own")
    add_processes(setting, answers, folder, args.processes, measured)
    return listed(setting, args.forms, measured)


def progress(start: float) -> Callable[[str], None]:
    """Prints what was done, and the seconds since the start: large hubs take many minutes."""
    return lambda text: print(f"[{time.monotonic() - start:5.1f} s] {text}", flush=True)


def add_ensemble(setting: Setting, answers: dict[str, Answer], measured: Measured) -> None:
    """Chooses the experts of the ensemble, by a few answers of each, and opens it."""
    if any(row.name not in answers for row in setting.singles):
        measured.notes[ensemble_name(setting)] = "not made: an expert does not run by itself"
        return
    own = {row.name: answers[row.name] for row in setting.singles}
    images = list(setting.questions.images[:PROBED].split(1))
    seconds = infer_latency.ask_each(own, images, setting.device)
    middles = [statistics.median(seconds[row.name]) for row in setting.singles]
    row = infer_setup.ensemble_of(setting.singles, middles, setting.model.k)
    opened, notes = infer_setup.open_checked([row], setting.questions, setting.device)
    answers |= opened
    measured.notes |= notes
    setting.rows.append(row)
    measured.add(row.name, experts=infer_setup.named(row.experts, setting.labels))


def ensemble_name(setting: Setting) -> str:
    return f"ensemble of {setting.model.k}"


def add_latency(
    setting: Setting, answers: Mapping[str, Answer], count: int, measured: Measured
) -> None:
    """Of one image from a tensor, and the experts whose images take longest."""
    asked = setting.questions.asked[:count]
    images = list(setting.questions.images[:count].split(1))
    functions = {**answers, GENERATOR: infer_setup.generator_of(setting.model)}
    seconds = infer_latency.ask_each(functions, images, setting.device)
    add_quantiles("tensor", setting, seconds, measured)
    measured.add(GENERATOR, tensor=asdict(Latency.of(seconds[GENERATOR])))
    own = [seconds[row.name] for row in setting.singles if row.name in seconds]
    for row in setting.rows:
        if row.name not in seconds or row.experts:
            continue
        if len(own) == len(setting.singles):
            ratio = infer_latency.to_alone(seconds[row.name], own, seconds[GENERATOR], asked)
            measured.add(row.name, to_alone=ratio)
        if row.routed:
            worst = infer_latency.slowest(seconds[row.name], asked)
            names = infer_setup.named(worst.experts, setting.labels)
            found = {"experts": names, "p50": worst.p50, "images": worst.images}
            measured.add(row.name, slowest=found)


def add_from_files(
    setting: Setting, answers: Mapping[str, Answer], count: int, measured: Measured
) -> None:
    """Of one image from a JPEG file."""
    functions = {n: infer_setup.from_file(answer, setting.size) for n, answer in answers.items()}
    photos = [setting.photos[index % len(setting.photos)] for index in range(count)]
    seconds = infer_latency.ask_each(functions, photos, setting.device)
    add_quantiles("jpeg", setting, seconds, measured)


def add_quantiles(
    what: str, setting: Setting, seconds: Mapping[str, Sequence[float]], measured: Measured
) -> None:
    """Of the rows, of the slowest expert by its median, and of each image's mean expert."""
    for row in setting.rows:
        if row.name in seconds:
            measured.add(row.name, **{what: asdict(Latency.of(seconds[row.name]))})
    own = {row.name: seconds[row.name] for row in setting.singles if row.name in seconds}
    if len(own) < len(setting.singles):
        return
    slowest = measured.records.get(SLOWEST, {}).get("experts", [None])[0]  # of a tensor's row
    slowest = slowest or max(own, key=lambda name: statistics.median(own[name]))
    measured.add(SLOWEST, experts=[slowest], **{what: asdict(Latency.of(own[slowest]))})
    mean = infer_latency.mean_of(list(own.values()))
    measured.add(MEAN, **{what: asdict(Latency.of(mean))})


def add_batches(
    setting: Setting, answers: Mapping[str, Answer], seconds: float, measured: Measured
) -> None:
    """Images per second, of each batch size."""
    for n in BATCHES:
        images = setting.questions.images[:n]
        functions = {name: asking(answer, images) for name, answer in answers.items()}
        times = timing.interleaved(functions, setting.device, seconds, min_rounds=3, calls=1)
        rates = {name: n / found.p50 for name, found in times.items()}
        for row in setting.rows:
            if row.name in rates:
                measured.add(row.name, **{f"images_per_second_{n}": rates[row.name]})
        if SLOWEST in measured.records:
            [name] = measured.records[SLOWEST]["experts"]
            measured.add(SLOWEST, **{f"images_per_second_{n}": rates[name]})
            mean = statistics.mean(times[row.name].p50 for row in setting.singles)
            measured.add(MEAN, **{f"images_per_second_{n}": n / mean})


def asking(answer: Answer, images: Tensor) -> Callable[[], Tensor]:
    return lambda: answer(images)


def add_processes(
    setting: Setting,
    answers: Mapping[str, Answer],
    folder: Path,
    processes: int,
    measured: Measured,
) -> None:
    """Loading and memory, in processes of their own."""
    images = folder / "images.pt"
    torch.save(setting.questions.images[: max(BATCHES)].clone(), images)
    found: dict[str, dict] = {}
    for row in (*setting.rows, *setting.singles):
        if row.name not in answers:
            continue
        try:
            found[row.name] = infer_child.ask(to_dict(row), images, setting.device, processes)
        except RuntimeError as error:
            measured.notes[row.name] = f"fails in a process of its own: {error}"
    for row in setting.rows:
        measured.add(row.name, **found.get(row.name, {}))
    if SLOWEST in measured.records and all(row.name in found for row in setting.singles):
        [name] = measured.records[SLOWEST]["experts"]
        sizes = {row.name: row.bytes for row in setting.singles}
        measured.add(SLOWEST, bytes=sizes[name], **found[name])
        own = [found[row.name] for row in setting.singles]
        means = {key: mean_of_known([one[key] for one in own]) for key in own[0]}
        measured.add(MEAN, bytes=round(statistics.mean(sizes.values())), **means)


def mean_of_known(values: Sequence[float | None]) -> float | None:
    return None if None in values else statistics.mean(values)


def listed(setting: Setting, forms: Sequence[str], measured: Measured) -> list[dict]:
    """One record a row, in the table's order. A row that failed has its note and what is known."""
    ours = [infer_setup.MODEL, infer_setup.FROZEN]
    names = [*ours, *forms, SLOWEST, MEAN, ensemble_name(setting), GENERATOR]
    names += [row.name for row in setting.singles if row.name in measured.notes]
    found = []
    for name in names:
        record = measured.records.get(name, {})
        note = measured.notes.get(name)
        if note is not None:
            record = {**record, "note": note}
        if record:
            found.append({"row": name, **record})
    return found


def table(rows: Sequence[dict]) -> str:
    """The records as lines; "-" where nothing was measured."""
    lines = [
        f"{'':16}{'one image, ms':^24}{'from a JPEG, ms':^24}{'images/s':^17}"
        f"{'load':>7}{'disk':>8}{'peak, MiB':^16}{'x alone':>8}  slowest experts",
        f"{'row':16}" + "".join(f"{p:>8}" for p in ("p50", "p90", "p99") * 2)
        + f"{'at 8':>9}{'at 64':>8}{'s':>7}{'MiB':>8}{'at 1':>8}{'at 64':>8}{'':>8}  (their p50)",
    ]  # fmt: skip
    for row in rows:
        if "note" in row:
            lines.append(f"{row['row']:16}  {row['note']}")
            continue
        cells = [f"{row['row']:16}"]
        for what in ("tensor", "jpeg"):
            cells += [cell(row.get(what, {}).get(p), 8, 2, 1e3) for p in ("p50", "p90", "p99")]
        cells += [cell(row.get("images_per_second_8"), 9, 1)]
        cells += [cell(row.get("images_per_second_64"), 8, 1), cell(row.get("load_seconds"), 7, 2)]
        for key in ("bytes", "peak_memory_1", "peak_memory_64"):
            cells.append(cell(row.get(key), 8, 1, 2**-20))
        cells.append(cell(row.get("to_alone"), 8, 2))
        if "slowest" in row:
            worst = row["slowest"]
            cells.append(f"  {' + '.join(worst['experts'])} ({worst['p50'] * 1e3:.2f} ms)")
        elif "experts" in row:
            cells.append(f"  ({' + '.join(row['experts'])})")
        lines.append("".join(cells))
    return "\n".join(lines)


def cell(value: float | None, width: int, digits: int, unit: float = 1) -> str:
    return f"{'-':>{width}}" if value is None else f"{value * unit:{width}.{digits}f}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.infer", description=__doc__.split("\n")[0])
    hub = parser.add_mutually_exclusive_group()
    hub.add_argument("--preset", choices=sorted(PRESETS), help="default: tiny")
    hub.add_argument("--model", type=Path, help="a saved model's folder, in place of a preset")
    parser.add_argument("--forms", type=children.some_of(FORMS), default=list(FORMS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--images", type=int, default=400, help="asked one after another")
    parser.add_argument("--seconds", type=float, default=20.0, help="of rounds, a batch size")
    parser.add_argument("--quick", action="store_true", help="few answers: shows that it runs")
    parser.add_argument("--out", type=Path, help="append the rows to this file, as JSON lines")
    args = parser.parse_args(argv)
    if args.images < 1:
        parser.error(f"--images: expected an integer of at least 1, got {args.images}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch.cuda.is_available() is False; use --device cpu")
    args.preset, args.processes = args.preset or "tiny", PROCESSES
    if args.quick:
        args.images, args.seconds, args.processes = min(args.images, 16), 0.0, 1
    return args


def main(argv: list[str] | None = None) -> int:
    """The exit status: 1 where a row failed."""
    args = parse(argv)
    timing.refuse_interpreter()
    try:
        model = infer_setup.read_model(args.model, PRESETS[args.preset])
    except ValueError as error:
        raise SystemExit(f"bench.infer: {error}") from error
    common = {
        "benchmark": "infer", "hub": str(args.model or args.preset), "quick": args.quick,
        "px": model.origin.input_size, "M": len(model.experts), "K": model.k,
        **records.environment(args.device),
    }  # fmt: skip
    print(" ".join(f"{key}={value}" for key, value in common.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="bench-infer-") as folder:
        rows = measure(model, args, Path(folder))
    rows += infer_goals.judge(rows)
    if args.out is not None:
        jsonl.write(args.out, [{**common, **row} for row in rows])
    print("\n" + table([row for row in rows if "goal" not in row]))
    print("\n" + infer_goals.text([row for row in rows if "goal" in row]), flush=True)
    return 1 if any("note" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
