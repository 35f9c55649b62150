"""The routed hub itself, as one of the rivals: the same images, scored and counted alike."""

from __future__ import annotations

import torch

from ..run import ShelfHub
from ..timing import router_ms
from .problem import Answer, Problem


@torch.no_grad()
def routed(problem: Problem, hub: ShelfHub) -> Answer:
    """problem: of the hub's whole shelf. A model that the router looks at runs for every image."""
    shelf, models = hub.shelf, torch.tensor(hub.models)
    probabilities = {}
    for split in problem.splits:
        numbers = shelf.splits[split].double()  # of view 0
        routing = hub.model.route(numbers)
        probabilities[split] = hub.model(numbers, routing=routing).softmax(-1)
    kept = torch.zeros(len(shelf.models)).index_fill(0, models, 1.0)
    asked = torch.zeros(len(numbers), len(shelf.models)).scatter(1, models[routing.experts], 1.0)
    if hub.watched is not None:
        asked[:, hub.watched] = kept[hub.watched] = 1.0
    parts = (hub.model.generator, hub.model.aggregator)
    extra = sum(parameter.numel() for part in parts for parameter in part.parameters())
    router = router_ms(hub.model, numbers.long())
    return Answer(probabilities, asked, kept, extra_parameters=extra, extra_ms=router)
