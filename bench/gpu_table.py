"""Puts what runs on devices found into the repository: measures nothing, needs no GPU.

    python -m bench.gpu_table [RUN ...] [--check]

RUN: a folder that ``bench.gpu_check`` or ``bench.gpu_speed`` left, or one of its files. Their lines
go to ``bench/results/DEVICE/gpu.jsonl``, one file a device; of lines of one part, group and name
the newest stays, and a failure goes once its group has been run again and ended well. Then the
tables between the marks in docs/results.md and bench/README.md are written from those files, and
from nothing else. --check writes nothing: exit status 1 where a table is not what the files say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from . import gpu_goals
from .gpu_cells import cell, kernel_name, markdown, memory, milliseconds, ms, notes_of
from .gpu_goals import MET, MISSED, NOT_MEASURED, Rows
from .gpu_rows import card, devices_in, last_of, merge, on_gpu, part, timed
from .records import RESULTS, ROOT

BEGIN, END = "<!-- gpu results: by python -m bench.gpu_table -->", "<!-- end of gpu results -->"
COMMANDS = "`python -m bench.gpu_check` and `python -m bench.gpu_speed`"
NOTHING = (
    "**Nothing here was run or measured on a GPU.** The kernels are tested for values and "
    "gradients under Triton's interpreter and compiled for sm_80, sm_90 and sm_100; the executors "
    f"`streams` and `graphs` are tested against a stand-in for CUDA. On a GPU, {COMMANDS} check "
    "and measure everything in nine minutes."
)


def heading(rows: Rows) -> str:
    last = last_of(rows)
    commits = ", ".join(dict.fromkeys(r["commit"] for r in rows.values() if "commit" in r))
    versions = f"torch {last['torch']}, Triton {last['triton']}, Python {last['python']}"
    driver = f", driver {last['driver']}" if "driver" in last else ""
    return f"**{last['device']}**{driver}, {versions}, commit {commits}, {last['date'][:10]}"


def checks(rows: Rows) -> list[str]:
    """How many checks are right, and all that are not."""
    found = part(rows, "check")
    if not found:
        return []
    skipped = sum("skipped" in row for row in found)
    wrong = [row for row in found if not row["ok"]]
    ended = [row for key, row in rows.items() if key[0] == "check" and key[2] == "group"]
    right, total = len(found) - skipped - len(wrong), len(found) - skipped
    left = f" ({skipped} skipped)" if skipped else ""
    lines = [f"`bench.gpu_check`: {right} of {total} checks are right{left}."]
    lines += [f"- {r['group']}: {r['name']}: {r.get('note', r.get('text', ''))}" for r in wrong]
    lines += [f"- group {row['group']}: {row['status']}" for row in ended if not row["ok"]]
    return ["\n".join(lines)]


def ceilings(rows: Rows) -> list[str]:
    found = {row["name"]: row for row in part(rows, "speed", "ceilings") if row["ok"]}
    lines = [f"{name}: {row['text']}" for name, row in found.items()]
    return ["Ceilings: " + ", ".join(lines) + "."] if lines else []


def goals(devices: list[Rows]) -> list[str]:
    """What was aimed at, and what was found on each device where anything of it was measured."""
    measured = [rows for rows in devices if part(rows, "speed") and on_gpu(rows)]
    if not measured:
        return []
    head = ["goal", "wanted", "predicted"]
    body = [[goal.figure, goal.wanted, goal.predicted] for goal in gpu_goals.GOALS]
    for rows in measured:
        head += [card(rows), "result"]
        for cells, line in zip(body, gpu_goals.lines(rows), strict=True):
            cells += line[2:]
    found, whys = markdown(head, body), gpu_goals.whys(measured)
    found += ["\n".join(["Why missed:", *whys])] * bool(whys)
    return [*found, "\n".join(gpu_goals.foretold())]


def missed(rows: Rows, name: str) -> list[str]:
    """The goals in two sentences. name: of the device, where there are several."""
    lines = gpu_goals.lines(rows)
    met, unknown = (sum(line[3] == verdict for line in lines) for verdict in (MET, NOT_MEASURED))
    if unknown == len(lines):
        return []
    text = f"{name}: {met} of {len(lines)} goals are met".removeprefix(": ")
    text += f", {unknown} not measured." if unknown else "."
    failed = [f"{line[0]} {line[2]} ({line[1]})" for line in lines if line[3] == MISSED]
    return [text + (f" Missed: {'; '.join(failed)}." if failed else "")]


def step_rows(rows: Rows) -> list[dict]:
    """The rows of the paper's step; singles once, of the groups that they stand in."""
    found = part(rows, "speed", "step")
    return found + [r for r in part(rows, "speed", "graphs") if r["name"].startswith("graphs")]


def steps(found: list[dict], title: str) -> list[str]:
    """A table of whole steps, the fastest first: times, and what the device did meanwhile."""
    head = [title, "ms (20-80 %)", "device busy, ms", "x K singles", "x K captured", "launches",
            "GiB (of dense)", "dearest kernel"]  # fmt: skip
    dense = next((row for row in found if row["name"] == "dense" and row["ok"]), {})
    body = []
    shown = sorted(timed(found), key=lambda row: row["p50"])
    for row in shown:
        dearest = row.get("dearest") or []
        kernel = f"`{kernel_name(dearest[0][0])}` {ms(dearest[0][1])} ms" if dearest else "-"
        body.append([
            row["name"], milliseconds(row, spread=True), ms(row.get("busy")),
            cell(row.get("to_k_single")), cell(row.get("to_k_captured")),
            cell(row.get("launches"), "{:.0f}"), memory(row, dense), kernel,
        ])  # fmt: skip
    body += [[r["name"], r.get("note", "-"), *["-"] * 6] for r in found if r not in shown]
    return markdown(head, body)


GLUES = {"reference eager": "reference", "compiled eager": "compiled", "torch eager": "torch",
         "triton eager": "triton", "torch graph": "torch, replayed",
         "triton graph": "triton, replayed"}  # fmt: skip


def glues(rows: Rows, group: str, title: str) -> list[str]:
    """Microseconds of each row by size, and how many times as fast as the eager reference."""
    found, body = part(rows, "speed", group), []
    sizes: dict[str, dict[str, dict]] = {}  # "48,5,2,100" -> "triton eager" -> its row
    for row in timed(found):
        size, _, how = row["name"].partition(" ")
        sizes.setdefault(size, {})[how] = row
    shown = [how for how in GLUES if any(how in by for by in sizes.values())]
    for size in sorted(sizes, key=lambda size: [int(n) for n in size.split(",")]):
        by = sizes[size]
        cells = [cell(by.get("triton eager", {}).get("busy"), "{:.0f}", 1e6)]
        for how in shown:
            row = by.get(how, {})
            ratio = row.get("speedup") if how != "reference eager" else None
            told = f" ({ratio:.1f}x)" if ratio else ""
            cells.append(cell(row.get("p50"), "{:.0f}", 1e6) + told)
        body.append([size, *cells])
    head = [title, "triton: device busy", *(GLUES[how] for how in shown)]
    return markdown(head, body) + notes_of(found)


REMARK = (
    "\\* More than the copy: it writes as much as it reads, and what mostly reads, or was measured "
    "when the copy was slow, may be faster."
)


def roofs(rows: Rows) -> list[str]:
    """Microseconds and the share of a copy, replayed and eager, forward and backward."""
    found = part(rows, "speed", "roof")
    kernels: dict[str, dict[str, str]] = {}
    for row in timed(found):
        *kernel, direction, mode = row["name"].split()
        text, share = f"{row['p50'] * 1e6:.0f}", gpu_goals.share(rows, row)
        if share is not None:
            text += f", {share:.0%}" + "\\*" * (share > 1)
        kernels.setdefault(" ".join(kernel), {})[f"{direction} {mode}"] = text
    columns = [f"{d} {mode}" for mode in ("graph", "eager") for d in ("forward", "backward")]
    body = [[name, *(by.get(c, "-") for c in columns)] for name, by in sorted(kernels.items())]
    head = ["kernel: us, share of a copy", *(c.replace("graph", "replayed") for c in columns)]
    table = markdown(head, body)
    return table + [REMARK] * any("*" in text for text in table) + notes_of(found)


def aggregates(rows: Rows) -> list[str]:
    """The aggregate, forward and backward, in each form."""
    found, body = part(rows, "speed", "aggregate"), []
    by_name = {row["name"]: row for row in timed(found)}
    for form in dict.fromkeys(name.rpartition(" ")[0] for name in sorted(by_name)):
        graph, eager = (by_name.get(f"{form} {mode}", {}) for mode in ("graph", "eager"))
        dense = by_name.get(f"{form.rpartition(' ')[0]} dense eager")
        body.append([
            form, ms(graph.get("p50")), ms(eager.get("p50")),
            cell(eager.get("peak_memory"), "{:.0f}", 2**-20),
            cell(gpu_goals.over(eager, dense, "peak_memory")),
        ])  # fmt: skip
    head = ["forward and backward", "ms, replayed", "ms, eager", "MiB", "of the dense form's"]
    return markdown(head, body) + notes_of(found)


def growths(rows: Rows) -> list[str]:
    found = part(rows, "speed", "growth")
    points = [row for row in found if row["ok"] and "step" in row]
    points.sort(key=lambda row: (row["name"].partition(",")[0], row["M"]))
    body = [[r["name"], ms(r["step"]["p50"]), ms(r["experts alone"]["p50"])] for r in points]
    grown = [f"{r['name']}: {r['text']}." for r in found if "growth_beyond_smaller_groups" in r]
    head = ["N = 64, K = 2", "ms a step", "its experts alone, eager"]
    return markdown(head, body) + grown + notes_of(found)


def streams(rows: Rows) -> list[str]:
    """Single steps on routings that change: the slow ones, and what made them slow."""
    found = part(rows, "speed", "stream")
    body = [
        [f"{row['name']}, {row['rounds']} steps", ms(row["p50"]), ms(row["p95"]),
         cell(row["p95"] / row["p50"]), ms(row["slowest"]), str(row["hits"]), str(row["misses"]),
         f"{row['captures_ahead']} + {row['captures']}", cell(row["padding"], "{:.1%}")]
        for row in timed(found)
    ]  # fmt: skip
    head = ["the paper's step, each waited for", "median, ms", "p95, ms", "p95 / median",
            "slowest, ms", "replayed groups", "eager groups", "captures, ahead + later",
            "padded rows"]  # fmt: skip
    return markdown(head, body) + notes_of(found)


def agents(rows: Rows) -> list[str]:
    found, head = part(rows, "speed", "agent"), ["a step of an Atari agent", "ms (20-80 %)",
            "steps/s", "device busy, ms", "launches"]  # fmt: skip
    body = [
        [row["name"], milliseconds(row, spread=True), cell(row["steps_per_second"], "{:.0f}"),
         ms(row.get("busy")), cell(row.get("launches"), "{:.0f}")]
        for row in timed(found)
    ]  # fmt: skip
    return markdown(head, body) + notes_of(found)


def predicted(rows: Rows) -> list[str]:
    found = part(rows, "speed", "predict")
    rows = sorted(timed(found), key=lambda row: (row["N"], row["p50"]))
    body = [[row["name"], milliseconds(row, spread=True), cell(row["to_single"])] for row in rows]
    return markdown(["prediction", "ms (20-80 %)", "x one expert"], body) + notes_of(found)


def in_lines(rows: Rows, group: str, title: str) -> list[str]:
    """Rows of a group as their own lines say it."""
    found = part(rows, "speed", group)
    body = [[row["name"], row["text"]] for row in timed(found)]
    return markdown([title, "found"], body) + notes_of(found)


def threads(rows: Rows) -> list[str]:
    """A table of the host's threads: milliseconds a step."""
    counts = sorted({int(key[1][4:]) for key in rows if key[1].startswith("cpu ")})
    names = [name for name in ("reference", "sequential", "threads")
             if any(("speed", f"cpu {n}", name) in rows for n in counts)]  # fmt: skip
    body = [
        [str(n), *(milliseconds(rows.get(("speed", f"cpu {n}", name), {})) for name in names)]
        for n in counts
    ]
    return markdown(["threads", *(f"{name}, ms" for name in names)], body)


def whole(devices: list[Rows]) -> str:
    """All that is known, for bench/README.md."""
    blocks: list[str] = goals(devices) if any(on_gpu(rows) for rows in devices) else [NOTHING]
    for rows in devices:
        blocks += [heading(rows), *checks(rows), *ceilings(rows)]
        blocks += filter(None, [gpu_goals.lanes(rows)])
        blocks += steps(step_rows(rows), "the paper's step") + host([rows])
        blocks += steps(part(rows, "speed", "large"), "the paper's step, 256 images")
        blocks += streams(rows)
        blocks += agents(rows)
        blocks += steps(part(rows, "speed", "atari"), "the step of Atari's hub")
        blocks += glues(rows, "glue", "glue (N,M,K,C), us")
        blocks += glues(rows, "compiled", "glue beside torch.compile, us")
        blocks += aggregates(rows) + roofs(rows) + growths(rows) + predicted(rows)
        blocks += in_lines(rows, "resident", "predictions of a hub larger than its room")
        blocks += in_lines(rows, "shelf", "a training step of a shelf's heads") + threads(rows)
    return "\n\n".join(blocks)


WORDS = {
    "single 0": "one single model",
    "captured single 0": "one single model, captured as a graph",
    "sequential": "experts one after another",
    "streams": "experts on CUDA streams",
    "dense": "every expert on every image",
    "reference": "the reference: a plain loop",
}


def in_words(name: str) -> str | None:
    """What a row of whole steps is, for who does not know the names; None: a part of a step."""
    return f"experts as captured {name}" if name.startswith("graphs") else WORDS.get(name)


def host(devices: list[Rows]) -> list[str]:
    """How slow the hosts are: they make eager rows long that have many launches."""
    each = {}
    for rows in devices:
        row = rows.get(("speed", "step", "sequential"), {})
        if "launches" in row and row["p50"] >= 1.5 * row["busy"]:
            each[card(rows)] = f"{row['p50'] / row['launches'] * 1e6:.0f} us"
    if not each:
        return []
    who = f"This machine's host takes {' '.join(each.values())}"
    if len(devices) > 1:
        who = "Hosts take " + ", ".join(f"{time} ({name})" for name, time in each.items())
    return [
        f"{who} for each launch of an eager step, and the device waits for it: with a faster host "
        "the rows without graphs come down, towards the time in which the device is busy."
    ]


def short(devices: list[Rows]) -> str:
    """For docs/results.md: the paper's step, how many checks are right, which goals are missed."""
    gpus = list(filter(on_gpu, devices))
    if not gpus:
        return NOTHING
    several, blocks = len(gpus) > 1, []
    for rows in gpus:
        blocks += [heading(rows), *(text.split("\n")[0] for text in checks(rows))]
    blocks += steps_in_words(gpus) + host(gpus)
    for rows in gpus:
        blocks += missed(rows, card(rows) if several else "")
    return "\n\n".join([*blocks, "More: [bench/README.md](../bench/README.md)."])


def steps_in_words(gpus: list[Rows]) -> list[str]:
    """The paper's step on each GPU, the fastest rows of the first one first."""
    head, body = ["the paper's step: 48 images, 5 ResNet-50, K = 2"], {}  # cells by words
    for i, rows in enumerate(gpus):
        head += [f"{card(rows)}: ms" if len(gpus) > 1 else "ms", "device busy, ms",
                 "x K single models"]  # fmt: skip
        for row in sorted(timed(step_rows(rows)), key=lambda row: row["p50"]):
            if words := in_words(row["name"]):
                cells = body.setdefault(words, [words, *["-"] * 3 * len(gpus)])
                cells[1 + 3 * i : 4 + 3 * i] = [
                    milliseconds(row), ms(row.get("busy")), cell(row.get("to_k_single"))
                ]  # fmt: skip
    return markdown(head, list(body.values()))


def written_into(text: str, block: str) -> str:
    """A document with the block between its marks. Raises ValueError where it has none."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: list[str] | None = None, root: Path = ROOT, results: Path = RESULTS) -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu_table", description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="a folder of results")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if tables are old")
    args = parser.parse_args(argv)
    if args.runs and args.check:
        parser.error("--check: writes nothing, so it takes no RUN")
    for path in merge(args.runs, results):
        print(path)
    devices, old = devices_in(results), []
    for name, block in (("docs/results.md", short(devices)), ("bench/README.md", whole(devices))):
        path = root / name
        text = path.read_text()
        new = written_into(text, block)
        if new != text:
            old.append(name)
            if not args.check:
                path.write_text(new)
    print(f"{'old' if args.check else 'written'}: {', '.join(old) or 'nothing'}")
    return 1 if args.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
