"""BatchNorm folded into the convolutions before it: fewer passes over maps at prediction.

In evaluation mode BatchNorm is one scale and one shift per channel, which the convolution before it
can do with its own weights. Nothing in a network says which BatchNorm follows which convolution, so
one call is watched: a pair is a convolution whose output is read by that BatchNorm alone, both
called once. Each pair is compared with its own outputs in that call, and the network with its own
at the end, also on other numbers of samples; what does not agree stays as it was.
"""

from __future__ import annotations

import contextlib
import copy
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Of the largest output. In float32 two orders of the same sums differ by a tenth of it after 200
# layers; a BatchNorm that is folded wrongly, by much more.
ALLOWED = 1e-4


@dataclass
class Folded:
    """folded: how many BatchNorm layers. left: by the name of one that stays, why."""

    folded: int = 0
    left: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def find_foldable(
    network: nn.Module,
    call: Callable[[], Tensor],
    shared: Callable[[nn.Module], bool],
    others: Sequence[Callable[[], Tensor]] = (),
) -> Foldable:
    """Finds what can be told to be a pair, and changes nothing; ``fold`` of what it returns does.

    Args:
        network: in evaluation mode, of float32 or float64; of others nothing is folded, since each
            fold would round the weights once more.
        call: runs the network once and returns its output.
        shared: whether a module, or a parameter of it, has another place in the model.
        others: more calls, of other inputs, after which the network has to say the same; one that
            fails of the network as it is says nothing.

    Raises:
        Exception: what ``call`` raises of the network as it is.
    """
    norms = {part: name for name, part in network.named_modules() if is_norm(part)}
    if not norms:
        return Foldable(network)
    dtypes = {p.dtype for p in network.parameters()} - {torch.float32, torch.float64}
    if dtypes:
        return Foldable(network, norms, dict.fromkeys(norms, f"the weights are {dtypes.pop()}"))
    checks = [(call, call())]
    for other in others:
        with contextlib.suppress(Exception):
            checks.append((other, other()))
    with _Watch(network, shared) as watch:
        call()
    pairs = watch.pairs()
    return Foldable(network, norms, watch.left, pairs, checks)


def is_norm(part: nn.Module) -> bool:
    """Whether it is a BatchNorm of any kind that has statistics to use: torch's, timm's with its
    activation, torchvision's frozen one."""
    named = isinstance(part, _BatchNorm) or "BatchNorm" in type(part).__name__
    return named and isinstance(getattr(part, "running_mean", None), Tensor)


def close(one: object, two: object) -> bool:
    """Whether two outputs agree but for the order of their sums; NaN agrees with nothing."""
    if not (isinstance(one, Tensor) and isinstance(two, Tensor) and one.shape == two.shape):
        return False
    return bool((one - two).abs().max() <= ALLOWED * one.abs().max())


@dataclass(frozen=True)
class _Pair:
    """rest: what the BatchNorm's module does beside it, an activation or nothing."""

    conv: nn.Module
    norm: nn.Module
    folded: nn.Module
    rest: nn.Module


@dataclass
class Foldable:
    """A network's pairs, before any is folded. norms: its BatchNorm layers and their names. left:
    of those that stay, why. checks: calls, and what they returned of the network as it is."""

    network: nn.Module
    norms: dict[nn.Module, str] = field(default_factory=dict)
    left: dict[nn.Module, str] = field(default_factory=dict)
    pairs: list[_Pair] = field(default_factory=list)
    checks: list[tuple[Callable[[], Tensor], Tensor]] = field(default_factory=list)

    @torch.no_grad()
    def fold(self) -> Folded:
        """Puts the pairs in, in place; all of them or, where the network then fails or says
        something else, none."""
        why = _replace(self.network, self.pairs, self.checks) if self.pairs else None
        if why is not None:
            return Folded(0, {name: self.left.get(n, why) for n, name in self.norms.items()})
        left = {name: self.left[n] for n, name in self.norms.items() if n in self.left}
        return Folded(len(self.pairs), left)


@dataclass
class _Call:
    """A convolution's call. given: a copy of its input. reads: operations that were given its
    output; own: those of them by the BatchNorm that makes the pair."""

    conv: nn.Module
    given: Tensor | None
    output: Tensor | None = None
    reads: int = 0
    own: int = 0
    pair: _Pair | None = None


class _Watch(TorchDispatchMode):
    """Around one call of a network: which BatchNorm reads which convolution's output, and who else
    does. All convolutions' outputs are kept, so that no two have the same memory."""

    def __init__(self, network: nn.Module, shared: Callable[[nn.Module], bool]):
        super().__init__()
        self._shared, self._times = shared, Counter()
        self._calls: dict[int, _Call] = {}  # by the memory of their outputs
        self._begun: list[_Call] = []
        self._comparing = self._read_before = False
        self.left: dict[nn.Module, str] = {}
        self._parts = [p for p in network.modules() if isinstance(p, nn.Conv2d) or is_norm(p)]
        self._hooked = {p for p in self._parts if p._forward_hooks or p._forward_pre_hooks}

    def __enter__(self) -> _Watch:
        self._handles = []
        for part in self._parts:
            if is_norm(part):
                self.left[part] = "it is not called"
                self._handles.append(part.register_forward_pre_hook(self._norm_begins))
                self._handles.append(part.register_forward_hook(self._norm_ends))
            else:
                self._handles.append(part.register_forward_pre_hook(self._conv_begins))
                self._handles.append(part.register_forward_hook(self._conv_ends))
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not self._comparing:
            calls = (self._made(value) for value in tree_leaves((args, kwargs)))
            for call in {id(call): call for call in calls if call is not None}.values():
                call.reads += 1
        return func(*args, **kwargs)

    def pairs(self) -> list[_Pair]:
        """Those whose convolution's output nothing else has read, in the end."""
        found = []
        for call in self._calls.values():
            pair = call.pair
            if pair is None:
                continue
            if self._times[pair.conv] > 1 or self._times[pair.norm] > 1:
                self.left[pair.norm] = "it or its convolution is called several times"
            elif call.reads > call.own:
                self.left[pair.norm] = "its convolution's output has other readers"
            else:
                found.append(pair)
        return found

    def _made(self, value: object) -> _Call | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            return None
        return self._calls.get(value.untyped_storage().data_ptr())

    def _conv_begins(self, conv: nn.Module, inputs: tuple) -> None:
        self._times[conv] += 1
        self._begun.append(_Call(conv, inputs[0].clone() if len(inputs) == 1 else None))

    def _conv_ends(self, conv: nn.Module, inputs: tuple, output: Tensor) -> None:
        call = self._begun.pop()
        call.output = output
        self._calls[output.untyped_storage().data_ptr()] = call

    def _norm_begins(self, norm: nn.Module, inputs: tuple) -> None:
        call = self._made(inputs[0])
        self._read_before = call is not None and call.reads > 0

    def _norm_ends(self, norm: nn.Module, inputs: tuple, output: Tensor) -> None:
        self._times[norm] += 1
        call = self._made(inputs[0])
        self._comparing = True
        try:
            self.left[norm] = self._pair(norm, call, inputs[0], output)
        finally:
            self._comparing = False
        if not self.left[norm]:
            del self.left[norm]

    def _pair(self, norm: nn.Module, call: _Call | None, given: Tensor, output: Tensor) -> str:
        """Makes the pair of a call, or says why there is none."""
        if call is None or call.output is not given or call.given is None:
            return "it does not follow a convolution"
        if call.pair is not None or self._read_before:
            return "its convolution's output has other readers"
        if self._hooked & {norm, call.conv}:
            return "it or its convolution has hooks"
        if self._shared(norm) or self._shared(call.conv):
            return "it or its convolution is shared"
        if is_parametrized(call.conv) or is_parametrized(norm):
            return "it or its convolution is parametrized"
        pair = _Pair(call.conv, norm, folded(call.conv, norm), _rest(norm))
        if not close(output, pair.rest(pair.folded(call.given))):
            return "its convolution with the folded weights gives something else"
        call.pair, call.own, call.given = pair, call.reads, None
        return ""


def folded(conv: nn.Module, norm: nn.Module) -> nn.Module:
    """A copy of a convolution that does what the BatchNorm behind it does, too."""
    weight = conv.weight
    # A deep copy would take the hooks along, and all that they reach.
    made = copy.copy(conv)
    made._parameters, made._buffers = dict(conv._parameters), dict(conv._buffers)
    made._forward_hooks, made._forward_pre_hooks = OrderedDict(), OrderedDict()
    parts = (weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    # In float64, since the copy's weights are then rounded once.
    values = [None if part is None else part.detach().double() for part in parts]
    new_weight, new_bias = fuse_conv_bn_weights(*values[:4], norm.eps, *values[4:])
    layout = torch.channels_last if _is_channels_last(weight) else torch.contiguous_format
    made.weight = nn.Parameter(new_weight.to(weight.dtype, memory_format=layout), False)
    made.bias = nn.Parameter(new_bias.to(weight.dtype), False)
    return made


def _is_channels_last(weight: Tensor) -> bool:
    return not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _rest(norm: nn.Module) -> nn.Module:
    """timm's keep a dropout and an activation inside; torch's nothing."""
    inner = [part for part in norm.children() if not isinstance(part, nn.Identity)]
    return (nn.Sequential(*inner) if inner else nn.Identity()).eval()


def _replace(
    network: nn.Module, pairs: list[_Pair], checks: list[tuple[Callable[[], Tensor], Tensor]]
) -> str | None:
    """Puts the pairs in; if the network then says something else, takes them out and says why."""
    names = {part: name for name, part in network.named_modules()}
    for pair in pairs:
        network.set_submodule(names[pair.conv], pair.folded)
        network.set_submodule(names[pair.norm], pair.rest)
    try:
        same = all(close(before, call()) for call, before in checks)
        why = None if same else "the network with it folded gives something else"
    except Exception as error:  # code may ask the layer that has gone for something
        why = f"the network with it folded fails: {type(error).__name__}"
    if why is not None:
        for pair in pairs:
            network.set_submodule(names[pair.conv], pair.conv)
            network.set_submodule(names[pair.norm], pair.norm)
    return why
