"""Which experts may be captured as graphs, and at which sizes.

A graph replays fixed kernels on fixed addresses. So a group needs a graph of its own size, unless
every row passes through the expert alone: then rows can be padded to a bucket.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..structure import hooks_of
from ..torch_private import is_compiled
from .masked import takes_statistics
from .row_wise import treats_rows_alone


def couples_rows(expert: nn.Module) -> str | None:
    """None: rows may be added to a group of this expert, within ``masked``, without changing what
    it gives for the others, in the mode that it is in. Else why not: "norm (EvoNorm2dB0) may mix
    rows"; a clause that follows "since".

    In evaluation every expert is taken to treat rows alone, since the groups themselves depend on
    which samples came together; but not where a norm takes its statistics from the batch even then.
    """
    modules = list(expert.named_modules())
    if not any(module.training for _, module in modules):
        for name, module in modules:
            if isinstance(module, _BatchNorm) and takes_statistics(module):
                return f"{_where(name, module)} takes its statistics from the batch in evaluation"
        return None
    for name, module in modules:
        if isinstance(module, torch.jit.ScriptModule):
            return f"{_where(name, module)} is scripted"
        if is_compiled(module):
            return f"{_where(name, module)} is compiled"
        if not treats_rows_alone(module):
            return f"{_where(name, module)} may mix rows"
    return None


def _where(name: str, module: nn.Module) -> str:
    return f"{name or 'itself'} ({type(module).__name__})"


def refusal(expert: nn.Module) -> str | None:
    """Why an expert, or generator, must not be captured; None: nothing known speaks against it.

    Its attribute ``not_captured`` says why where it reads what is no part of it.
    """
    if getattr(expert, "not_captured", None):
        return expert.not_captured
    for name, module in expert.named_modules():
        if isinstance(module, nn.SyncBatchNorm) and module.training:
            return (
                f"{_where(name, module)} exchanges statistics with other processes, which a replay "
                "cannot; take BatchNorm"
            )
    hooked = [name for name, module in expert.named_modules() if any(hooks_of(module))]
    if hooked:
        where = ", ".join(name or "itself" for name in hooked[:3])
        return f"has hooks, which a replay would not call (on {where})"
    if any(parameter._backward_hooks for parameter in expert.parameters()):
        return "has hooks on its parameters, which a replay would call a second time"
    return None
