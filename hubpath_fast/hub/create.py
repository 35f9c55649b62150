"""One call from model names to a Hub-Pathway."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from .._checks import check_k
from ..model import HubPathway, PathwayGenerator
from .build import build_experts, default_input_size, normalization
from .costs import mean_flops
from .expert import Expert
from .router import generator_size
from .source import HeadTask
from .spec import ExpertSpec, read_specs


def create_model(
    experts: str | Sequence[str | ExpertSpec | nn.Module] | Sequence[Expert],
    num_outputs: int,
    k: int = 2,
    pretrained: bool = True,
    input_size: int | None = None,
    resize_to_native: bool = False,
    generator_width: int | None = None,
    generator_stride: int | None = None,
    task: HeadTask | None = None,
    **options,
) -> HubPathway:
    """A Hub-Pathway of pre-trained models, each with a new head for ``num_outputs``.

    The model takes images [N, 3, S, S], uint8 or floats in [0, 1]; every expert's own normalisation
    and size are applied inside.

    Args:
        experts: a hub's name ("paper-homogeneous"), or a list of names, specs and modules (see
            ``build_experts``), or the experts that ``build_experts`` made (then num_outputs and
            input_size must be those given there, and ``pretrained`` and ``task`` say nothing).
        k: K, active experts per sample.
        pretrained, input_size, resize_to_native, task: see ``build_experts``.
        generator_width, generator_stride: of the ``PathwayGenerator``. None: what leaves it at most
            5 % of the FLOPs of K mean experts, see ``router.generator_size`` (our choice). A width
            alone, or an expert that cannot be run on one image to count: width 16 unless given, and
            the stride that leaves about 56 pixels a side.
        options: further arguments of ``HubPathway``, such as ``aggregator`` or ``executor``.

    Raises:
        HubError: all problems of the hub at once.
        ValueError: k is not in 1..M.
    """
    ready = isinstance(experts, Sequence) and all(isinstance(expert, Expert) for expert in experts)
    chosen = experts if ready and experts else read_specs(experts)
    check_k(k, len(chosen))
    if ready:
        built = chosen
        size = input_size or min(expert.size for expert in built)
    else:
        size = input_size or default_input_size(chosen)
        built = build_experts(chosen, num_outputs, pretrained, size, resize_to_native, task)
    if generator_width is None:
        mean = mean_flops(built, num_outputs, size)
        active = None if mean is None else k * mean
    else:
        active = None
    width, stride = generator_size(len(built), size, active, generator_width, generator_stride)
    generator = PathwayGenerator(len(built), width=width, stride=stride)
    return HubPathway(
        [expert.module for expert in built],
        generator,
        k=k,
        num_outputs=num_outputs,
        normalization=normalization(built),
        **options,
    )
