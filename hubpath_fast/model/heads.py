"""Where an expert's head is, and at what share of the usual rate its body learns.

One definition for all who need it: the hub, which loads pre-trained weights into everything but the
head, and the trainer, which gives heads and bodies rates of their own.
"""

from __future__ import annotations

from torch import nn

# Where the classifier sits in timm's, torchvision's and most other networks.
HEAD_NAMES = ("head", "heads", "fc", "classifier", "last_linear")


def mark_head(network: nn.Module, layers: tuple[str, ...]) -> None:
    """Notes on a network which of its layers, by dotted names, are new for the task."""
    network.head_layers = tuple(layers)


def head_names(module: nn.Module) -> set[str]:
    """Names, within ``module``, of the parameters and buffers of its head.

    The head is what ``mark_head`` noted; else what ``get_classifier()`` returns, as in timm, which
    may be several layers; else a layer named head, heads, fc, classifier or last_linear. It is
    looked for from the outside in, so that wrappers do no harm. Empty where there is none.
    """
    layers = {id(layer) for head in head_layers(module) for layer in head.modules()}
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, layer in module.named_modules()
        if id(layer) in layers
        for name in [*layer._parameters, *layer._buffers]
    }


def head_layers(module: nn.Module) -> list[nn.Module]:
    """The outermost layers of its head; see ``head_names``."""
    for inner in module.modules():
        for heads in _candidates(inner):
            if any(layer._parameters or layer._buffers for h in heads for layer in h.modules()):
                return heads
    return []


def split_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """An expert's parameters as (body, head); none is in both. See ``head_names``."""
    heads = head_names(module)
    body, head = [], []
    for name, parameter in module.named_parameters():
        (head if name in heads else body).append(parameter)
    return body, head


def head_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of an expert's head; see ``head_names``. Empty: all are the body's."""
    return split_parameters(module)[1]


def set_lr_factor(module: nn.Module, factor: float) -> None:
    """Notes on an expert what its body's learning rate is multiplied by; a number above 0."""
    if not factor > 0:
        raise ValueError(f"factor: expected a number above 0, got {factor}; freeze the body for 0")
    module.lr_factor = float(factor)


def lr_factor(module: nn.Module) -> float:
    """What ``set_lr_factor`` noted on the module or on one inside it; 1 where nothing is."""
    return next((m.lr_factor for m in module.modules() if hasattr(m, "lr_factor")), 1.0)


def _candidates(module: nn.Module):
    """The heads that a module says it has, the surest way of saying it first."""
    marked = getattr(module, "head_layers", ())
    yield [module.get_submodule(name) for name in marked]
    found = module.get_classifier() if hasattr(module, "get_classifier") else None
    several = found if isinstance(found, (tuple, list)) else [found]
    yield [head for head in several if isinstance(head, nn.Module)]
    for name in HEAD_NAMES:
        head = getattr(module, name, None)
        yield [head] if isinstance(head, nn.Module) else []
