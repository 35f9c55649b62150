"""What the host pays at every step to see that captured graphs still fit their experts.

    python -m bench.host [--models resnet50 swin_tiny_patch4_window7_224 ...] [--out FILE]

For each network: taking its signature, as when something changed; seeing that nothing
changed; and, for the network as one of a hub, seeing that no module is shared. Nothing is run, so
it is the same with and without a GPU.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import timm
import torch

from hubpath_fast import functional as HF
from hubpath_fast.model.executors import RowPrecision, RowSource
from hubpath_fast.model.executors.sharing import Sharing
from hubpath_fast.model.executors.signature import Signature

from . import jsonl, records, timing

MODELS = ("resnet50", "swin_tiny_patch4_window7_224", "convnext_tiny", "efficientnet_b3")


def measure(name: str, seconds: float) -> list[dict]:
    expert = timm.create_model(name)
    scores = torch.zeros(4, 2)
    x, routing = torch.rand(4, 3, 8, 8), HF.noisy_topk(scores, scores, 1)
    layout = torch.contiguous_format
    source = RowSource(x, routing, None, None, x.dtype, layout, RowPrecision())
    kept, sharing = Signature(expert, source), Sharing()
    times = timing.interleaved(
        {
            "taken anew": lambda: Signature(expert, source),
            "unchanged": lambda: kept.holds(expert, source),
            "shared": lambda: sharing([expert]),
        },
        seconds=seconds,
    )
    return [
        {"benchmark": "host", "model": name, "row": row, **asdict(t), **records.environment("cpu")}
        for row, t in times.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="bench.host", description=__doc__.split("\n")[0])
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm's models")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each model")
    parser.add_argument("--out", type=Path, help="add rows to this file of JSON lines")
    args = parser.parse_args(argv)
    for name in args.models:
        rows = measure(name, args.seconds)
        cells = ", ".join(f"{row['row']} {row['p50'] * 1e6:.0f} us" for row in rows)
        print(f"{name}: {cells}")
        if args.out:
            jsonl.write(args.out, rows)


if __name__ == "__main__":
    main()
