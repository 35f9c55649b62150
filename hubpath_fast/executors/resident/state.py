"""What an expert holds beyond its parameters and buffers, which alone can come and go."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from ..groups import expert_name


def check_state(experts: Sequence[nn.Module]) -> None:
    """Raises ValueError naming the first expert, and what it holds."""
    for index, expert in enumerate(experts):
        for path, module in expert.named_modules():
            if (found := _outside(module)) is not None:
                where = f", in {path} ({type(module).__name__})" if path else ""
                raise ValueError(
                    f"experts: {expert_name(experts, index)} holds state outside its parameters "
                    f"and buffers{where}: {found}; register it as a buffer, or use another "
                    "executor than 'resident'"
                )


def _outside(module: nn.Module) -> str | None:
    kind = type(module)
    if getattr(kind, "get_extra_state", None) is not nn.Module.get_extra_state:
        return "get_extra_state()"
    for name, value in vars(module).items():
        if name not in ("_parameters", "_buffers", "_modules") and _has_tensor(value):
            return f"the tensor {name}"
    return None


def _has_tensor(value: object) -> bool:
    if isinstance(value, Tensor):
        return True
    held: Iterable = ()
    if isinstance(value, dict):
        held = value.values()
    elif isinstance(value, (list, tuple, set)):
        held = value
    return any(map(_has_tensor, held))
