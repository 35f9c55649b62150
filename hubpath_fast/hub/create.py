"""One call from model names to a Hub-Pathway."""

from __future__ import annotations

from collections.abc import Container, Sequence

from torch import nn

from .._checks import check_k
from ..model import HubPathway, Origin, always_on
from .build import build_experts, default_input_size, normalization
from .expert import Expert
from .origin import expert_origin
from .router import EXPERT, IMAGE, make_generator
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
    router: str = IMAGE,
    generator: str | nn.Module | None = None,
    own: Container[int] | None = None,
    **options,
) -> HubPathway:
    """A Hub-Pathway of pre-trained models, each with a new head for ``num_outputs``.

    The model takes images [N, 3, S, S], uint8 or floats in [0, 1]; every expert's own normalisation
    and size are applied inside.

    Args:
        experts: a hub's name ("paper-homogeneous"), or a list of names, specs and modules (see
            ``build_experts``), or the experts that ``build_experts`` made (then num_outputs and
            input_size must be those given there, and ``pretrained``, ``task`` and ``own`` say
            nothing).
        k: K, active experts per sample.
        pretrained, input_size, resize_to_native, task, own: see ``build_experts``.
        generator_width, generator_stride: of the ``PathwayGenerator``. None: what leaves it at most
            5 % of the FLOPs of K mean experts, see ``router.generator_size`` (our choice). A width
            alone, or an expert that cannot be run on one image to count: width 16 unless given, and
            the stride that leaves about 56 pixels a side.
        router: what the generator looks at. "image": a network of nine layers on the image, from
            scratch. "expert:NAME" (or its number, from 0; "expert": the cheapest): linear heads on
            the features of that expert, which then runs on every image, whether it is one of its K
            or not. "network:NAME": linear heads on the features of a frozen network of the router's
            own, of any name that an expert can have. See ``FeatureGenerator``.
        generator: a module of your own in its place, x -> (clean [N, M], noise [N, M]); a text is
            taken as ``router``.
        options: further arguments of ``HubPathway``, such as ``aggregator`` or ``executor``.

    Raises:
        HubError: all problems of the hub at once.
        ValueError: k is not in 1..M; a router that is none.
    """
    ready = isinstance(experts, Sequence) and all(isinstance(expert, Expert) for expert in experts)
    chosen = experts if ready and experts else read_specs(experts)
    check_k(k, len(chosen))
    if ready:
        built = chosen
        size = input_size or min(expert.size for expert in built)
    else:
        size = input_size or default_input_size(chosen)
        built = build_experts(chosen, num_outputs, pretrained, size, resize_to_native, task, own)
    if isinstance(generator, str):
        router, generator = generator, None
    own = generator is not None
    if generator is None:
        sizes = generator_width, generator_stride
        generator = make_generator(router, built, num_outputs, size, k, pretrained, *sizes)
    model = HubPathway(
        [expert.module for expert in built],
        generator,
        k=k,
        num_outputs=num_outputs,
        normalization=normalization(built),
        **options,
    )
    watched = always_on(generator)
    if watched is not None and not own:  # by number: names may change with a library's version
        router = f"{EXPERT}:{[e.module for e in built].index(watched.source.module)}"
    origins = tuple(expert_origin(expert, size) for expert in built)
    model.origin = Origin(origins, size, None if own else router)
    return model
