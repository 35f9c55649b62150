"""Which experts may be captured as graphs, and at which sizes.

A graph replays fixed kernels on fixed addresses. So a group needs a graph of its own size, unless
every row passes through the expert alone: then rows can be padded to a bucket.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..structure import hooks_of

# Modules whose output of a row depends on that row only, and that are nothing but their parts. An
# expert made of anything else may mix rows in its own forward, and gets exact sizes.
ROW_WISE = (
    nn.Sequential, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear, nn.LayerNorm,
    nn.GroupNorm, nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.GELU, nn.SiLU, nn.Hardswish, nn.Tanh,
    nn.Sigmoid, nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout, nn.Dropout2d, nn.MaxPool2d,
    nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Upsample,
)  # fmt: skip


def may_pad(expert: nn.Module) -> bool:
    """Whether rows may be added to a group without changing the others' outputs.

    In evaluation every expert is taken to treat rows alone, since the groups themselves depend on
    which samples came together; but not where a norm takes its statistics from the batch even then.
    """
    modules = list(expert.modules())
    if any(module.training for module in modules):
        # BatchNorm couples rows in training: those padded with zeros moved its outputs by a fifth.
        return all(type(module) in ROW_WISE for module in modules)
    norms = (module for module in modules if isinstance(module, _BatchNorm))
    return all(norm.running_mean is not None for norm in norms)


def bucket(count: int) -> int:
    """The smallest bucket that holds ``count`` rows: 1, 2, 4, 8, then steps of 4 up to 32, then
    steps of an eighth of the next lower power of two. At least 8 rows waste a ninth at most there.
    """
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = 4 if count <= 32 else 1 << (count - 1).bit_length() - 4
    return -(-count // step) * step


def refusal(expert: nn.Module) -> str | None:
    """Why an expert, or generator, must not be captured; None: nothing known speaks against it.

    Its attribute ``not_captured`` says why where it reads what is no part of it.
    """
    if getattr(expert, "not_captured", None):
        return expert.not_captured
    hooked = [name for name, module in expert.named_modules() if any(hooks_of(module))]
    if hooked:
        where = ", ".join(name or "itself" for name in hooked[:3])
        return f"has hooks, which a replay would not call (on {where})"
    if any(parameter._backward_hooks for parameter in expert.parameters()):
        return "has hooks on its parameters, which a replay would call a second time"
    return None
