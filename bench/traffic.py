"""What a training step moves between GPUs, experts shared out (ep) beside a copy of all (dp).

    python -m bench.traffic [--hub resnet50] [--px 224] [--samples 48] [--k 2] [--outputs 100]
        [--experts 5,64,1024] [--ranks 8,64]

By formula: nothing is run, and no GPU is needed. M experts of one architecture, so many samples on
each of W ranks, K active experts; images travel as uint8, outputs and gradients as float32. Routing
and placement are even, so (W-1)/W of the rows go to another rank. Bytes are those that one rank
sends in a step; sums are made in a ring. ``dp`` sums the gradients of experts that had rows on any
rank: of all, where there are as many rows as experts. Where there are more ranks than experts, ep
leaves some without: the row says so.
"""

from __future__ import annotations

import argparse

from hubpath_fast.hub.costs import TASK, count_flops
from hubpath_fast.hub.registry import find
from hubpath_fast.hub.router import default_router
from hubpath_fast.hub.source import PlainTask, skeleton
from hubpath_fast.hub.spec import read_specs
from hubpath_fast.parallel.traffic import dp_bytes, ep_bytes, on_the_wire


def row(
    parameters: int, flops: int, num_experts: int, ranks: int, args: argparse.Namespace
) -> dict[str, float]:
    """MB of a rank's step, by what for, of experts with so many parameters and FLOPs each."""
    router = default_router(args.outputs, args.px, args.k, [flops] * num_experts)
    shared = sum(p.numel() for module in router for p in module.parameters())
    rows = args.samples * args.k
    ep = ep_bytes(
        sent_rows=round(rows * (ranks - 1) / ranks),
        row_bytes=3 * args.px**2,
        outputs=args.outputs,
        output_bytes=4,
        num_experts=num_experts,
        ranks=ranks,
        router_parameters=shared,
    )
    used = min(num_experts, ranks * rows)
    dp = dp_bytes(used * parameters, num_experts, ranks, shared)
    small = ("counts", "mean weights", "agreement")
    return {
        "M": num_experts,
        "ranks": ranks,
        "rows": ep["rows"] / 1e6,
        "outputs and gradients": (ep["outputs"] + ep["gradients"]) / 1e6,
        "router": on_the_wire({"router gradients": ep["router gradients"]}, ranks) / 1e6,
        "counts and agreement": on_the_wire({name: ep[name] for name in small}, ranks) / 1e6,
        "ep": on_the_wire(ep, ranks) / 1e6,
        "dp": on_the_wire(dp, ranks) / 1e6,
    }


def show(found: dict[str, float]) -> str:
    *parts, ep, dp = list(found.values())[2:]
    cells = [f"{value:,.1f}" for value in (*parts, ep, dp)] + [f"{dp / ep:,.0f}"]
    note = " (idle ranks in ep)" if found["ranks"] > found["M"] else ""
    return f"| {found['M']:,} | {found['ranks']}{note} | {' | '.join(cells)} |"


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main(arguments: list[str] | None = None) -> list[dict[str, float]]:
    parser = argparse.ArgumentParser("python -m bench.traffic", description=__doc__.split("\n")[0])
    parser.add_argument("--hub", default="resnet50", help="the architecture of all experts")
    parser.add_argument("--px", type=int, default=224)
    parser.add_argument("--samples", type=int, default=48, help="of a rank")
    parser.add_argument("--k", type=int, default=2)
    parser.add_argument("--outputs", type=int, default=TASK.num_outputs)
    parser.add_argument("--experts", type=_numbers, default=[5, 64, 1024])
    parser.add_argument("--ranks", type=_numbers, default=[8, 64])
    args = parser.parse_args(arguments)
    [spec] = read_specs([args.hub])
    network = skeleton(find(spec), PlainTask(args.outputs))
    parameters, flops = sum(p.numel() for p in network.parameters()), count_flops(network, args.px)
    print(f"MB that a rank sends in a step; {spec.name}, {parameters:,} parameters, {args.px} px")
    names = ("rows", "outputs, gradients", "router", "counts, agreement", "ep", "dp", "dp / ep")
    print(f"| M | ranks | {' | '.join(names)} |\n|{'---:|' * (2 + len(names))}")
    rows = []
    for count in args.experts:
        for ranks in args.ranks:
            rows.append(row(parameters, flops, count, ranks, args))
            print(show(rows[-1]))
    return rows


if __name__ == "__main__":
    main()
