"""Parameter groups with their own rates, and the optimizer over them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import nn

from ..model.heads import head_parameters, lr_factor
from ..resting import beside, expect, rests
from .config import TrainerConfig


class ParameterGroup(NamedTuple):
    """Parameters that share a peak learning rate."""

    name: str
    params: Sequence[nn.Parameter]
    lr: float


def pathway_groups(model: nn.Module, config: TrainerConfig) -> list[ParameterGroup]:
    """Groups of a Hub-Pathway: the experts' bodies, their heads, and the router (all the rest).

    Bodies with a factor of their own (``model.heads.lr_factor``) make a group for each factor.
    """
    heads = [p for expert in model.experts for p in head_parameters(expert)]
    bodies: dict[float, list[nn.Parameter]] = {1.0: []}
    taken = list(heads)
    for expert in model.experts:
        own = _without(expert.parameters(), taken)  # a trunk that experts share is the first one's
        bodies.setdefault(lr_factor(expert), []).extend(own)
        taken += own
    return _groups(config, bodies, heads, router=_without(model.parameters(), taken))


def single_groups(model: nn.Module, config: TrainerConfig) -> list[ParameterGroup]:
    """Groups of a single network: its body at ``lr_expert`` (times its factor, if it has one) and
    its head at ``lr_head``."""
    heads = head_parameters(model)
    bodies = {lr_factor(model): _without(model.parameters(), heads)}
    return _groups(config, bodies, heads, router=[])


def default_groups(model: nn.Module, config: TrainerConfig) -> list[ParameterGroup]:
    """:func:`pathway_groups` for a model with experts, :func:`single_groups` for any other."""
    has_experts = isinstance(getattr(model, "experts", None), nn.ModuleList)
    return (pathway_groups if has_experts else single_groups)(model, config)


def build_optimizer(
    model: nn.Module, groups: Sequence[ParameterGroup], config: TrainerConfig
) -> torch.optim.Optimizer:
    """AdamW or SGD over ``groups``, one fused update where torch has it.

    Parameters on the meta device, of experts that another rank has, keep their places in the
    groups, so that these are the same on all ranks; without a gradient no update looks at them.
    Raises ValueError when there is nothing to train, or when a trainable parameter of ``model`` is
    in no group or in two: it would silently stay as it is, or be updated twice.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    owner: dict[int, str] = {}
    for group in groups:
        for p in group.params:
            if id(p) in owner:
                raise ValueError(
                    f"parameter {names.get(id(p), tuple(p.shape))} is in the groups "
                    f"{owner[id(p)]!r} and {group.name!r}; keep it in one"
                )
            owner[id(p)] = group.name
    left = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in owner]
    if left:
        more = f" and {len(left) - 3} more" if len(left) > 3 else ""
        raise ValueError(
            f"trainable parameters in no group: {', '.join(left[:3])}{more}; add them to a group "
            "or freeze them with requires_grad_(False)"
        )

    parts = []
    for name, params, lr in groups:
        params = [p for p in params if p.requires_grad]
        plain = [p for p in params if p.ndim > 1 or config.decay_bias_and_norm]
        spared = [p for p in params if p.ndim <= 1 and not config.decay_bias_and_norm]
        parts += [(name, plain, lr, config.weight_decay), (f"{name}, no decay", spared, lr, 0.0)]
    entries = [
        {"params": params, "lr": float(lr), "peak_lr": float(lr), "weight_decay": wd, "name": name}
        for name, params, lr, wd in parts
        if params
    ]
    if not entries:
        raise ValueError("no parameter requires a gradient: nothing to train; unfreeze some")
    # Fused kernels exist for these devices; foreach is the next best elsewhere.
    fused = all(p.device.type in ("cpu", "cuda", "meta") for e in entries for p in e["params"])
    fast = {"fused": True} if fused else {"foreach": True}
    params = [p for entry in entries for p in entry["params"]]
    if config.optimizer == "adamw":
        expect(params, 2)
        adamw = torch.optim.AdamW(entries, betas=(config.momentum, 0.999), **fast)
        return start_moments(adamw)
    expect(params, int(config.momentum > 0))
    sgd = torch.optim.SGD(entries, momentum=config.momentum, nesterov=config.nesterov, **fast)
    return start_momentum(sgd)


def start_momentum(sgd: torch.optim.SGD) -> torch.optim.SGD:
    """Give every parameter its momentum, of zero, before the first step; returns the optimizer.

    The fused update fails where a parameter gets its first gradient later than others, as those of
    an expert without rows do. The first update is the same to the bit: 0.9 * 0 + gradient.
    """
    for group in sgd.param_groups:
        if group["momentum"] > 0:
            for p in group["params"]:
                if p.is_meta:
                    continue
                sgd.state[p]["momentum_buffer"] = beside(p)
    return sgd


def start_moments(adamw: torch.optim.AdamW) -> torch.optim.AdamW:
    """Have the moments of parameters that rest in files do so, too; returns the optimizer.

    They are made before a parameter's first update, as the fused one would make them.
    """

    def start(*_: object) -> None:
        for group in adamw.param_groups:
            for p in group["params"]:
                if p.grad is not None and not adamw.state.get(p) and rests(p):
                    moments = {key: beside(p) for key in ("exp_avg", "exp_avg_sq")}
                    step = torch.zeros((), dtype=torch.float32, device=p.device)
                    adamw.state[p] = {"step": step, **moments}

    adamw.register_step_pre_hook(start)
    return adamw


def match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Bring the state into its parameters' memory layouts, in place.

    A loaded state has the layouts of the run that saved it (contiguous or channels_last), and fused
    updates go through the memory of both in step, without looking: the result would be wrong.
    """
    for p, state in optimizer.state.items():
        for key, value in state.items():
            same = isinstance(value, torch.Tensor) and value.shape == p.shape
            if same and value.stride() != p.stride():
                state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)


def group_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[list[str]]:
    """Of each group its name and its parameters' names: what a resumed run must have alike."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [[g["name"], *(names[id(p)] for p in g["params"])] for g in optimizer.param_groups]


def _groups(
    config: TrainerConfig, bodies: Mapping[float, list[nn.Parameter]], heads, router
) -> list[ParameterGroup]:
    """bodies: by the factor of their rate."""
    lr_head = config.lr_expert if config.lr_head is None else config.lr_head
    experts = [
        ParameterGroup(
            "experts" if factor == 1 else f"experts x {factor:g}", own, factor * config.lr_expert
        )
        for factor, own in bodies.items()
    ]
    groups = [
        *experts,
        ParameterGroup("heads", heads, lr_head),
        ParameterGroup("router", router, config.lr_router),
    ]
    return [group for group in groups if group.params]


def _without(params: Iterable[nn.Parameter], taken: Sequence[nn.Parameter]) -> list[nn.Parameter]:
    ids = {id(p) for p in taken}
    return [p for p in params if id(p) not in ids]
