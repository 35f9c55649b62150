"""Each public operation, forward, backward and both, against the reference.

    python -m bench.ops [--device cpu|cuda] [--full] [--compile] [--only TEXT] [--out FILE]

Rows: ``reference`` (its lines for this operation, eager), ``compiled`` (those under torch.compile,
with --compile; a note where it does not compile), ``torch`` and ``triton`` (the public function on
that backend; triton on a GPU only). On a GPU each row is timed as eager calls and as a replayed
graph, except loops of masks, which wait for the device and cannot be captured. A result is compared
with the float64 reference before anything is timed; a wrong one is a note, never a time. Columns:
see bench/README.md.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from . import jsonl, operations, records, timing
from .children import first_line
from .counting import moved_bytes, peak_memory
from .inputs import ROUTINGS, Size, batch_norm
from .operations import NAMES, Operation

DIRECTIONS = ("forward", "backward", "both")
# The default subset: the paper's step, a small task, a wide hub, many samples; skewed where
# balance matters most. --full is the whole grid.
SUBSET = [
    Size(48, 5, 2, 10),
    Size(48, 5, 2, 100),
    Size(48, 5, 2, 100, "skewed"),
    Size(256, 16, 8, 100),
    Size(256, 16, 2, 1000),
    Size(256, 16, 2, 1000, "skewed"),
    Size(4096, 5, 1, 100),
    Size(4096, 64, 2, 10),
]
# Of the aggregate alone: maps of the digits' landmarks and of WFLW's.
MAPS = [Size(48, 5, 2, 5, trailing=(16, 16)), Size(16, 5, 2, 98, trailing=(64, 64))]
# Of masked_batch_norm alone, in the paper's ResNet-50 at a group of 20 rows in a graph of 24: its
# first layer, the widest of its first stage alone and before the sum, and the last.
NORMS = [
    batch_norm(20, 24, 64, 112, 112, dtype="bfloat16", activation="relu"),
    batch_norm(20, 24, 256, 56, 56, dtype="bfloat16"),
    batch_norm(20, 24, 256, 56, 56, dtype="bfloat16", activation="relu", residual=True),
    batch_norm(20, 24, 256, 56, 56, activation="relu", residual=True),
    batch_norm(20, 24, 2048, 7, 7, dtype="bfloat16", activation="relu", residual=True),
]
# What the bandwidth goals are about: sizes that fill a GPU and no cache holds.
ROOF = {
    "noisy_topk": [Size(262144, 64, 2, 10)],
    "gather": [Size(524288, 5, 2, 1000)],  # 4.2 GB of rows
    "combine": [Size(262144, 5, 4, 1000)],  # 4.2 GB of rows, 5.2 GB of concatenation
    "aggregate": [Size(4096, 64, 2, 1000, dtype="bfloat16"), Size(4096, 64, 2, 1000)],
    "exploit_loss": [Size(524288, 5, 2, 1000)],
    # What a network has there, of which a large cache may hold x for the second pass.
    "masked_batch_norm": NORMS[1:3],
}


def sizes(name: str, full: bool = False) -> list[Size]:
    """The sizes of one operation: the subset, or the whole grid."""
    if name == "masked_batch_norm":
        return NORMS
    maps = MAPS if name == "aggregate" else []
    if not full:
        return SUBSET + maps
    grid = itertools.product(
        (48, 256, 4096, 65536), (2, 5, 16, 64), (1, 2, 8), (10, 100, 1000), ROUTINGS
    )
    found = [Size(*point) for point in grid if point[2] <= point[1]]
    if name == "noisy_topk":  # it knows no C
        found = [size for size in found if size.c == 10]
    return found + maps


def memory_needed(name: str, size: Size) -> int:
    """Bytes of the float64 check at its worst: the concatenation, its parts, and gradients."""
    n, m, k, c = size[:4]
    largest = n * m * c if name in ("combine", "aggregate") else n * max(k * c, m)
    # The reference's gather differentiates M masks, each into a tensor of x's size, in turn. Its
    # combination keeps the M parts beside their concatenation, forward and backward.
    copies = {
        "noisy_topk": 10, "gather": 6, "combine": 7, "exploit_loss": 6, "aggregate": 5,
        "masked_batch_norm": 12,
    }[name]  # fmt: skip
    return copies * largest * size.positions * 8


def memory_at_hand(device: str) -> int:
    if device == "cuda":
        torch.cuda.empty_cache()  # what the last size left is not in use
        return torch.cuda.mem_get_info()[0]
    return 4 << 30


def measure(
    name: str,
    size: Size,
    device: str,
    seconds: float,
    compiled: bool,
    roof: float,
    rows: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    in_order: bool = False,
) -> list[dict]:
    """The rows of one operation at one size. ``roof``: the measured copy bandwidth, bytes/s.

    rows: which to measure, "dense" (of the aggregate: the concatenation and one product) among
    them; None: all of the device but that. in_order: on a GPU, rows of graphs keep all their
    samples, ``samples_us`` in the order of the rounds; and beside the gather is a row ``repeat`` of
    the same rounds: torch's copy that writes each byte twice, as a gather for K = 2 does.
    """
    if rows is None:
        rows = ["reference", "torch", *["triton"] * (device == "cuda"), *["compiled"] * compiled]
    common = {
        "benchmark": "ops", "operation": name, **dict(zip("NMKC", size[:4], strict=True)),
        **({"maps": "x".join(map(str, size.trailing))} if size.trailing else {}),
        **({"norm": size.numbers} if size.norm else {}),
        "routing": size.routing, "dtype": size.dtype, "copy_bandwidth": roof,
        **records.environment(device),
    }  # fmt: skip
    if memory_needed(name, size) > memory_at_hand(device):
        return [{**common, "row": "all", "note": "not run: the float64 check needs more memory"}]
    operation = operations.make(name, size, device)
    expected = operations.truth(operation)
    errors, notes = {}, {}
    for row in rows:
        try:
            found = operations.error(operation, row, expected)
        except Exception as error:  # a row that cannot run is reported, the others go on
            notes[row] = f"does not run: {first_line(error)}"
            continue
        if found > operations.tolerance(operation, row):
            notes[row] = f"wrong: relative error {found:.1e}; not timed"
        else:
            errors[row] = found
    del expected
    measured = [{**common, "row": row, "note": note} for row, note in notes.items()]
    for direction in directions:
        try:
            measured += _direction(operation, direction, errors, device, seconds, common, in_order)
        except RuntimeError as error:  # out of memory, a capture that failed
            note = f"{direction}: {first_line(error)}"
            measured.append({**common, "row": "all", "note": note})
    return measured


def _direction(
    operation: Operation, direction, errors, device, seconds, common, in_order=False
) -> list[dict]:
    functions = {row: operations.function(operation, row, direction) for row in errors}
    # Compiled code cannot be looked into by operator: the count is for the others.
    static = {
        row: {
            "moved_bytes": None if row == "compiled" else moved_bytes(function),
            "peak_memory": peak_memory(function, device),
        }
        for row, function in functions.items()
    }
    modes, samples = {"eager": timing.interleaved(functions, device, seconds)}, {}
    if device == "cuda":
        # A loop of masks waits for each count.
        masked = operation.name not in ("exploit_loss", "masked_batch_norm")
        graphs = {
            row: timing.capture(lambda row=row: operations.function(operation, row, direction))
            for row in functions
            if row in ("torch", "triton", "dense") or not masked
        }
        if in_order and (operation.name, direction) == ("gather", "forward"):
            graphs["repeat"] = timing.capture(lambda: _repeated_copy(operation))
            static["repeat"], errors = {}, errors | {"repeat": None}
        modes["graph"] = timing.replayed(graphs, seconds, kept=samples if in_order else None)
    fewest = operation.bytes(direction)
    base, rows = modes["eager"].get("reference"), []
    for mode, times in modes.items():
        for row, found in times.items():
            moved = static[row].get("moved_bytes")
            rows.append(
                {
                    **common, "direction": direction, "row": row, "mode": mode, **asdict(found),
                    **static[row], "fewest_bytes": fewest,
                    **_ordered(samples if mode == "graph" else {}, row),
                    "moved_over_fewest": moved and moved / fewest,
                    "share_of_copy": fewest / found.p50 / common["copy_bandwidth"],
                    "speedup": base and base.p50 / found.p50, "error": errors[row],
                }
            )  # fmt: skip
    return rows


def _ordered(samples: dict[str, list[float]], row: str) -> dict[str, list[float]]:
    if row not in samples:
        return {}
    return {"samples_us": [round(seconds * 1e6, 1) for seconds in samples[row]]}


def _repeated_copy(operation: Operation) -> Callable[[], object]:
    x, k = operation.leaves[0].detach(), operation.size.k
    out = x.new_empty(len(x), k, *x.shape[1:])
    return lambda: out.copy_(x[:, None].expand_as(out))


def show(rows: list[dict]) -> None:
    for row in rows:
        label = (
            f"{row['operation']:12} N={row['N']:<6} M={row['M']:<2} K={row['K']} C={row['C']:<4}"
        )
        label += f" {row['maps']}" if "maps" in row else ""
        label += f" {row['routing']:8}"
        if "norm" in row:
            label = f"{row['operation']} {row['norm']} {row['dtype']}"
        label += f" {row['row']:9}"
        if "note" in row:
            print(f"{label} {row['note']}", flush=True)
            continue
        speedup = f"{row['speedup']:6.2f}x" if row["speedup"] else " " * 7
        moved = f"{row['moved_over_fewest']:6.1f}" if row["moved_over_fewest"] else " " * 6
        print(
            f"{label} {row['direction']:8} {row['mode']:5} {row['p20'] * 1e6:10.1f}"
            f"{row['p50'] * 1e6:10.1f}{row['p80'] * 1e6:10.1f} us {speedup} "
            f"moved {moved} {timing.say_share(row['share_of_copy'])}",
            flush=True,
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.ops", description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="the whole grid of sizes: hours")
    parser.add_argument("--compile", action="store_true", help="add the reference compiled")
    parser.add_argument("--only", action="append", choices=NAMES, help="this operation; repeatable")
    parser.add_argument(
        "--sizes", nargs="*", help='indices into the sizes, or "roof": those that fill a GPU'
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each direction and mode")
    parser.add_argument("--limit", type=float, help="start nothing new after this many seconds")
    parser.add_argument("--out", type=Path, help="add rows to this file of JSON lines")
    args = parser.parse_args(argv)
    timing.refuse_interpreter()
    start = time.monotonic()
    roof = timing.copy_bandwidth(args.device)
    print(f"copy bandwidth {roof / 1e9:.1f} GB/s on {records.device_name(args.device)}")
    for name in args.only or NAMES:
        chosen = sizes(name, args.full)
        if args.sizes == ["roof"]:
            chosen = ROOF[name]
        elif args.sizes is not None:
            chosen = [chosen[int(i)] for i in args.sizes]
        for size in chosen:
            if args.limit and time.monotonic() - start > args.limit:
                print(f"stopped after {args.limit:.0f} s at {name} {size}")
                return
            try:
                rows = measure(name, size, args.device, args.seconds, args.compile, roof)
            except torch.OutOfMemoryError:  # making the inputs or the float64 truth
                print(f"{name} {size}: not run, out of memory")
                continue
            show(rows)
            if args.out:
                jsonl.write(args.out, rows)


if __name__ == "__main__":
    main()
