"""What ranks move in a training step, by formula; ``collectives.counted`` counts the same.

Expert parallel moves what the rows are: images there, outputs back, their gradients there again,
and the router's gradients. It does not grow with the experts' parameters. Data parallel moves the
gradients of all experts that had rows, however few rows those were.

Each term is named as where it is counted, and is what one rank hands over in a step of one
micro-batch. What is summed over ranks travels about twice in a ring, which ``on_the_wire`` adds.

Letters: M experts, C*H*W an image, C outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

COUNT_BYTES, FLAG_BYTES, NUMBER_BYTES = 4, 4, 8  # of the counts, of a failure, of what is agreed on
SUMMED = ("router gradients", "expert gradients", "mean weights", "agreement")


def ep_bytes(
    sent_rows: int,
    row_bytes: int,
    outputs: int,
    output_bytes: int,
    num_experts: int,
    ranks: int,
    router_parameters: int,
    received_rows: int | None = None,
    replicas: int = 1,
    parameter_bytes: int = 4,
) -> dict[str, int]:
    """Bytes that a rank hands over with the experts shared out, by what for.

    Args:
        sent_rows: of the rank's own samples, to experts of other ranks.
        row_bytes: of an image as it travels: C*H*W in uint8.
        outputs: of a row, C; of a map all its values.
        output_bytes: of one of these: 4 in float32.
        num_experts: M.
        ranks: of a replica.
        router_parameters: of generator and aggregator, that have gradients.
        received_rows: of other ranks' samples, to the rank's experts; None: as many as it sends.
        replicas: of the ranks, each with all experts.
        parameter_bytes: of a gradient of the router.
    """
    received_rows = sent_rows if received_rows is None else received_rows
    output = outputs * output_bytes
    return {
        "rows": sent_rows * row_bytes,
        "outputs": received_rows * output,
        "gradients": sent_rows * output,
        "counts": num_experts * COUNT_BYTES * (ranks - 1),
        "router gradients": router_parameters * parameter_bytes,
        "mean weights": _mean_weights(num_experts),
        "agreement": _agreement(num_experts, replicas),
    }


def dp_bytes(
    expert_parameters: int,
    num_experts: int,
    ranks: int,
    router_parameters: int,
    parameter_bytes: int = 4,
) -> dict[str, int]:
    """Likewise with all experts on every rank. expert_parameters: of all experts that any rank had
    rows for. Running statistics of BatchNorm come on top."""
    return {
        "expert gradients": expert_parameters * parameter_bytes,
        "router gradients": router_parameters * parameter_bytes,
        "mean weights": _mean_weights(num_experts),
        "agreement": _agreement(num_experts, ranks),
    }


def on_the_wire(terms: Mapping[str, int], ranks: int) -> float:
    """Bytes that a rank sends in all, where sums are made in a ring of so many ranks: of each of
    them it sends 2 (W - 1)/W times the bytes."""
    ring = 2 * (ranks - 1) / ranks
    return sum(size * (ring if name in SUMMED else 1) for name, size in terms.items())


def _mean_weights(num_experts: int) -> int:
    """The mean weights [M] and the number of samples; and in backward [M]."""
    return (2 * num_experts + 1) * 4


def _agreement(num_experts: int, replicas: int) -> int:
    """Whether an expert failed; whether a rank is asked to stop or met an error, has bad
    gradients or others than before; and the rows of each expert by replica."""
    return FLAG_BYTES + (4 + replicas * num_experts) * NUMBER_BYTES
