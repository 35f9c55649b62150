"""BatchNorm layers that normalise by the batch even in evaluation, and why a hub takes none.

A layer that keeps no running statistics makes a prediction depend on who else is in the batch: on
one row it fails, or gives its bias alone. Experts get groups of any size, one row among them, and
``min_group`` promises running statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from ..executors.groups import is_batch_norm


def batch_norm_problems(modules: Sequence[tuple[str, nn.Module]]) -> Iterator[str]:
    """One sentence for each of the named modules with such a layer."""
    for name, module in modules:
        layers = _without_statistics(module)
        if not layers:
            continue
        first, layer = layers[0]
        kind = getattr(layer, "original_name", type(layer).__name__)  # of torch.jit's
        where = f"layer {first!r} ({kind})" if first else kind
        if len(layers) > 1:
            where += f" and {len(layers) - 1} more"
        yield (
            f"{name}: {where} has no running statistics, so that what it says of a sample would "
            "depend on the rest of the batch, in evaluation too; build it with "
            "track_running_stats=True, or take GroupNorm or FrozenBatchNorm instead"
        )


def check_batch_norm(modules: Sequence[tuple[str, nn.Module]]) -> None:
    """Raises ValueError for the first of the named modules with such a layer."""
    for problem in batch_norm_problems(modules):
        raise ValueError(problem)


def _without_statistics(module: nn.Module) -> list[tuple[str, nn.Module]]:
    # InstanceNorm is none: it normalises each sample by itself. A layer whose buffers are there
    # but no longer updated (track_running_stats set to False afterwards) evaluates by them.
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if is_batch_norm(layer)
        # A layer that was traced has no such attributes at all.
        and (
            getattr(layer, "running_mean", None) is None
            or getattr(layer, "running_var", None) is None
        )
    ]
