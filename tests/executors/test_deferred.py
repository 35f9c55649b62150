"""What is done with the result of a BatchNorm layer: taken in where it can be, right everywhere."""

import pytest
import torch
import torch.nn.functional as F
from support.masked import assert_same, close, counted, exact_run, masked_run, padded, some_gradient
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from hubpath_fast.executors.autograd_graph import leaves_of
from hubpath_fast.executors.graphs.deferred import Call, Deferred, deferred, settled
from hubpath_fast.executors.graphs.masked import masked

COUNT, CAPACITY, CHANNELS = 3, 5, 4
TOLERANCE = 1e-12  # of float64, a few operations


class Program(nn.Module):
    """Two BatchNorm layers, and what a case does with the results: function(p, x, r), where r is
    another tensor of x's shape, with a gradient."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        self.bn, self.other = nn.BatchNorm2d(CHANNELS), nn.BatchNorm2d(CHANNELS)
        self.before = nn.Conv2d(2, CHANNELS, 1, bias=False)
        self.beside = nn.Conv2d(2, CHANNELS, 1, bias=False)
        for parameter in self.parameters():
            parameter.data = torch.randn_like(parameter)
        self.double()

    def forward(self, images):
        return self.function(self, self.before(images), self.beside(images))


def images(count=COUNT):
    torch.manual_seed(1)
    return torch.randn(count, 2, 3, 3, dtype=torch.float64)


PLAIN, RELU, RELU6 = (None, False), ("relu", False), ("relu6", False)
SILU, HARDSWISH, SUM, SUM_RELU = ("silu", False), ("hardswish", False), (None, True), ("relu", True)


def twice(p, x, r):
    d = p.bn(x)
    return F.relu(d) * d


def activated_and_sum(p, x, r):
    d = p.bn(x)
    return F.relu(d) + d


def doubled(p, x, r):
    d = p.bn(x)
    return d + d


def sum_in_place(p, x, r):
    d = p.bn(x)
    d += r
    return torch.relu_(d)


def into_a_real_one(p, x, r):
    r += p.bn(x)
    return r


def held_by_two(p, x, r):
    d = p.bn(x)
    same = d
    F.relu(d, inplace=True)
    return same + r


def made_before_in_place(p, x, r):
    d = p.bn(x)
    y = d + r
    d.relu_()
    return y * d


def activated_then_in_place(p, x, r):
    d = p.bn(x)
    y = F.relu(d)
    d += r
    return y * d


def unused(p, x, r):
    p.bn(x)
    return r


def layer_twice(p, x, r):
    first, second = p.bn(x), p.bn(r)
    return F.relu(second) * F.relu(first)


def written_after_its_use(p, x, r):
    y = F.relu(p.bn(x) + r) * 2
    return y + F.relu_(r.clone())


def detached(p, x, r):
    with torch.no_grad():
        y = F.relu(p.bn(x))
    return y * r


def activated_without_gradient(p, x, r):
    d = p.bn(x)
    with torch.no_grad():
        y = F.relu(d)
    return y * r


def looked_at_without_gradient(p, x, r):
    d = p.bn(x)
    with torch.no_grad():
        mean = d.mean((1, 2, 3), keepdim=True)
    return d * mean


def sum_with_constant(p, x, r):
    with torch.inference_mode():
        constant = torch.ones(x.shape, dtype=x.dtype)
    return (p.bn(x) + constant).relu()


def layers_in_a_row(p, x, r):
    return F.silu(p.other(F.relu(p.bn(x))))


def into_list(p, x, r):
    return torch.cat([F.relu(p.bn(x)), p.other(r)], dim=1)


def by_metadata(p, x, r):
    d = p.bn(x)
    assert (d.shape, d.size(1), len(d)) == (x.shape, CHANNELS, len(x))
    assert d.dim() == d.ndim == 4
    assert (d.dtype, d.device, d.requires_grad) == (x.dtype, x.device, True)
    assert (d.numel(), torch.is_floating_point(d), d.is_cuda) == (x.numel(), True, False)
    assert isinstance(d, torch.Tensor)
    return F.silu(d)


# What is done, and what the layers are computed with.
PROGRAMS = {
    "itself": (lambda p, x, r: p.bn(x), {PLAIN: 1}),
    "relu": (lambda p, x, r: F.relu(p.bn(x)), {RELU: 1}),
    "relu in place": (lambda p, x, r: F.relu(p.bn(x), inplace=True), {RELU: 1}),
    "torch.relu": (lambda p, x, r: torch.relu(p.bn(x)), {RELU: 1}),
    "torch.relu_": (lambda p, x, r: torch.relu_(p.bn(x)), {RELU: 1}),
    "x.relu": (lambda p, x, r: p.bn(x).relu(), {RELU: 1}),
    "x.relu_": (lambda p, x, r: p.bn(x).relu_(), {RELU: 1}),
    "by keyword": (lambda p, x, r: torch.relu(input=p.bn(x)), {PLAIN: 1}),
    "nn.ReLU": (lambda p, x, r: nn.ReLU(inplace=True)(p.bn(x)), {RELU: 1}),
    "nn.ReLU6": (lambda p, x, r: nn.ReLU6()(p.bn(x)), {RELU6: 1}),
    "relu6": (lambda p, x, r: F.relu6(p.bn(x), inplace=True), {RELU6: 1}),
    "hardtanh 0, 6": (lambda p, x, r: F.hardtanh(p.bn(x), 0, 6), {RELU6: 1}),
    "hardtanh": (lambda p, x, r: nn.Hardtanh()(p.bn(x)), {PLAIN: 1}),
    "silu": (lambda p, x, r: nn.SiLU(inplace=True)(p.bn(x)), {SILU: 1}),
    "hardswish": (lambda p, x, r: nn.Hardswish(inplace=True)(p.bn(x)), {HARDSWISH: 1}),
    "gelu": (lambda p, x, r: F.gelu(p.bn(x)), {PLAIN: 1}),
    "two activations": (lambda p, x, r: F.silu(F.relu(p.bn(x))), {RELU: 1}),
    "sum": (lambda p, x, r: p.bn(x) + r, {SUM: 1}),
    "sum, from the right": (lambda p, x, r: torch.relu(r + p.bn(x)), {SUM_RELU: 1}),
    "torch.add": (lambda p, x, r: torch.add(p.bn(x), r).relu(), {SUM_RELU: 1}),
    "sum with its input": (lambda p, x, r: (p.bn(x) + x).relu(), {SUM_RELU: 1}),
    "sum in place": (sum_in_place, {SUM_RELU: 1}),
    "sum in place of another": (into_a_real_one, {PLAIN: 1}),
    "scaled sum": (lambda p, x, r: torch.add(p.bn(x), r, alpha=2).relu(), {PLAIN: 1}),
    "sum with a number": (lambda p, x, r: (1 + p.bn(x)).relu(), {PLAIN: 1}),
    "sum with fewer": (lambda p, x, r: (p.bn(x) + r.mean((2, 3), True)).relu(), {PLAIN: 1}),
    "sum of other precision": (lambda p, x, r: (p.bn(x) + r.float()).relu(), {PLAIN: 1}),
    "sum, then a sum": (lambda p, x, r: (p.bn(x) + r + x).relu(), {SUM: 1}),
    "activation, then a sum": (lambda p, x, r: (p.bn(x).relu() + r).relu(), {RELU: 1}),
    "sum of two": (lambda p, x, r: (p.bn(x) + p.other(r)).relu(), {PLAIN: 1, SUM_RELU: 1}),
    "sum of three": (
        lambda p, x, r: (p.bn(x) + r + p.other(r)).relu(), {SUM: 1, SUM_RELU: 1},
    ),
    "sum with itself": (doubled, {PLAIN: 1}),
    "used twice": (twice, {RELU: 1, PLAIN: 1}),
    "activated and as it is": (activated_and_sum, {RELU: 1, SUM: 1}),
    "held by two, in place": (held_by_two, {RELU: 1}),
    "made before in place": (made_before_in_place, {SUM: 1, RELU: 1}),
    "activated, then in place": (activated_then_in_place, {RELU: 1, SUM: 1}),
    "never used": (unused, {PLAIN: 1}),
    "a layer twice": (layer_twice, {PLAIN: 1, RELU: 2}),
    "a residual that lives on": (written_after_its_use, {SUM_RELU: 1}),
    "without gradients": (detached, {PLAIN: 1}),
    "activated without gradients": (activated_without_gradient, {PLAIN: 1}),
    "looked at without gradients": (looked_at_without_gradient, {PLAIN: 1}),
    "sum with a tensor of inference mode": (sum_with_constant, {PLAIN: 1}),
    "sum with a sparse one": (
        lambda p, x, r: (p.bn(x) + r.detach().to_sparse()).relu(), {PLAIN: 1},
    ),
    "layers in a row": (layers_in_a_row, {RELU: 1, SILU: 1}),
    "joined": (into_list, {RELU: 1, PLAIN: 1}),
    "what is known of it": (by_metadata, {SILU: 1}),
    "a part": (lambda p, x, r: p.bn(x)[:, 1:].relu(), {PLAIN: 1}),
    "its own gradient cut": (lambda p, x, r: p.bn(x).detach() * r, {PLAIN: 1}),
    "of a dropped row": (lambda p, x, r: F.dropout(p.bn(x), 0.0) + r, {PLAIN: 1}),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_results_gradients_and_statistics_are_those_of_torch(name, monkeypatch):
    function, expected = PROGRAMS[name]
    module = Program(function)
    exact = exact_run(module, images(), some_gradient)
    with counted(monkeypatch) as calls:
        run = masked_run(module, padded(images(), CAPACITY, True), COUNT, some_gradient)
    assert_same(run, exact, TOLERANCE)
    assert calls == expected


@pytest.mark.parametrize("name", PROGRAMS)
def test_without_fusion_each_layer_is_computed_where_it_is_called(name, monkeypatch):
    function, _ = PROGRAMS[name]
    module = Program(function)
    with counted(monkeypatch) as calls:
        run = masked_run(module, padded(images(), CAPACITY, True), COUNT, some_gradient, False)
    assert_same(run, exact_run(module, images(), some_gradient), TOLERANCE)
    assert set(calls) == {PLAIN}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_single_row_is_normalised_by_running_statistics_that_stay(name):
    function, _ = PROGRAMS[name]
    module, x = Program(function), images(1)
    for layer in (module.bn, module.other):
        layer.running_mean.uniform_(-1, 1)
        layer.running_var.uniform_(0.5, 2)
    run = masked_run(module, padded(x, CAPACITY, True), 1, some_gradient)
    for layer in (module.bn, module.other):
        layer.eval()
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


def changed_input(p, x, r):
    x = x * 1
    d = p.bn(x)
    x += 1
    return d * 2


def changed_residual(p, x, r):
    r = r * 1
    d = p.bn(x) + r
    r.zero_()
    return d


def changed_weight(p, x, r):
    d = p.bn(x)
    with torch.no_grad():
        p.bn.weight.mul_(2)
    return d


@pytest.mark.parametrize("function", [changed_input, changed_residual, changed_weight])
def test_what_was_read_must_not_be_written_to(function):
    with pytest.raises(RuntimeError, match=r"writes to a tensor \[.*\] in place that a BatchNorm"):
        masked_run(Program(function), images(CAPACITY), COUNT, some_gradient)


class Doubled(torch.autograd.Function):
    """As those of libraries: it asks no ``__torch_function__``."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, d_y):
        return d_y * 2


class Passed(Doubled):
    @staticmethod
    def forward(ctx, x):
        return x


class Ran(Doubled):
    """Runs a layer itself."""

    @staticmethod
    def forward(ctx, x, layer):
        with torch.enable_grad():
            return layer(x.detach())


@pytest.mark.parametrize("function", [Doubled, Passed])
def test_a_gradient_that_is_lost_is_seen_at_the_leaves(function):
    # ``CapturedModule`` refuses outputs with leaves that are none of the module's.
    module = Program(lambda p, x, r: function.apply(p.bn(x)))
    with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
        y = module(images(CAPACITY))
    assert not {id(leaf) for leaf in leaves_of(y)} <= set(map(id, module.parameters()))
    exact = exact_run(module, images(), some_gradient)
    run = masked_run(module, padded(images(), CAPACITY, True), COUNT, some_gradient, False)
    assert_same(run, exact, TOLERANCE)


@pytest.mark.parametrize("then", [lambda y: y, F.relu, lambda y: y + 1, lambda y: y + y])
def test_what_an_autograd_function_deferred_is_refused(then):
    module = Program(lambda p, x, r: then(Ran.apply(x, p.bn)))
    with pytest.raises(RuntimeError, match=r"autograd\.Function returned"):
        masked_run(module, images(CAPACITY), COUNT, some_gradient)


def test_what_goes_past_torch_functions_is_refused():
    def past(p, x, r):
        with torch._C.DisableTorchFunctionSubclass():
            return torch.exp(p.bn(x))

    with pytest.raises(RuntimeError, match="called past torch's functions"):
        masked_run(Program(past), images(CAPACITY), COUNT, some_gradient)


class Other(torch.Tensor):
    pass


def of_another_class(p, x):
    return p.bn(x.as_subclass(Other))


def of_inference_mode(p, x):
    with torch.inference_mode():
        x = x * 1
    return p.bn.requires_grad_(False)(x)


def in_a_transform(p, x):
    p.bn.track_running_stats = False
    _, found = torch.func.grad(lambda x: (x.sum(), p.bn(x)), has_aux=True)(x)
    return found


@pytest.mark.parametrize("call", [of_another_class, of_inference_mode, in_a_transform])
def test_what_is_not_plain_is_not_deferred(call):
    kinds = []
    module = Program(lambda p, x, r: kinds.append(type(call(p, x))) or r)
    masked_run(module, images(CAPACITY), COUNT, some_gradient)
    assert Deferred not in kinds


class Mode(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "context",
    [
        torch.no_grad,
        torch.inference_mode,
        Mode,
        lambda: torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x),
    ],
)
def test_nothing_is_deferred_where_it_could_not_be_followed(context):
    kinds = []

    def program(p, x, r):
        with context():
            kinds.append(type(p.bn(x * 1)))
        kinds.append(type(p.other(r)))
        return r

    masked_run(Program(program), images(CAPACITY), COUNT, some_gradient)
    assert kinds == [torch.Tensor, Deferred]


@pytest.mark.parametrize("first", [F.relu, torch.tanh])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_may_end_and_begin_with_a_layer(reentrant, first):
    """Within one nothing is deferred; what comes into one belongs to the run outside of it."""
    kinds = []

    def part(p, x):
        y = p.other(first(x))
        kinds.append(type(y))
        return y

    def program(p, x, r):
        x = p.bn(x)
        x = x * 1 if reentrant else x  # that kind takes nothing but values
        y = checkpoint(lambda x: part(p, x), x, use_reentrant=reentrant)
        return F.relu(y) * r

    module = Program(program)
    exact = exact_run(module, images(), some_gradient)
    kinds.clear()
    run = masked_run(module, padded(images(), CAPACITY, True), COUNT, some_gradient)
    assert_same(run, exact, TOLERANCE)
    assert set(kinds) == {torch.Tensor}


def test_a_gradient_comes_with_the_residual():
    bn = nn.BatchNorm1d(2, affine=False).double()
    r = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)

    def layer():
        count = torch.tensor(3, dtype=torch.int32)
        x = torch.randn(4, 2, dtype=torch.float64)
        statistics = bn.running_mean, bn.running_var, 0.1, bn.eps, bn.num_batches_tracked
        return deferred(Call(x, count, None, None, *statistics))

    d = layer()
    assert not d.requires_grad
    assert (d + r).requires_grad
    assert not d.requires_grad
    d += r
    assert d.requires_grad
    d.sum().backward()
    close(r.grad, torch.tensor([[1.0], [1], [1], [0]], dtype=torch.float64).expand(4, 2), 0)


def test_outputs_of_several_kinds_are_settled():
    module = Program(lambda p, x, r: (p.bn(x), [p.other(r).relu()], {"x": x}, None))
    with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
        one, [two], kept, none = module(images(CAPACITY))
    assert type(one) is type(two) is type(kept["x"]) is torch.Tensor
    assert none is None
    assert settled((3, "text")) == (3, "text")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_precision_is_that_of_torch_under_autocast(dtype, monkeypatch):
    """Of the results, and of what is taken in: a sum of two precisions is torch's."""
    seen = []

    def program(p, x, r):
        y = F.relu(p.bn(x) + r.to(dtype))
        seen.append(y.dtype)
        return y

    module = Program(program).float()
    x = images(CAPACITY).float()
    for run in (lambda: module(x), lambda: masked_run(module, x, CAPACITY, some_gradient)):
        with torch.autocast("cpu", torch.bfloat16), counted(monkeypatch) as calls:
            run()
    assert seen[0] == seen[1]
    assert calls == ({SUM_RELU: 1} if dtype == torch.bfloat16 else {PLAIN: 1})
