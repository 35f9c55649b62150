"""BatchNorm layers within ``masked``: of every kind, in every mode, as the layer's own forward."""

import itertools
import weakref

import pytest
import torch
from support.masked import Run, assert_same, counted, exact_run, masked_run, padded, some_gradient
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from torch import nn
from torch.utils.checkpoint import checkpoint

from hubpath_fast.executors.graphs.masked import masked

COUNT, CAPACITY, CHANNELS = 4, 6, 3
TOLERANCE = 1e-12  # of float64, one layer


def without_statistics():
    layer = nn.BatchNorm2d(CHANNELS)
    layer.track_running_stats = False  # afterwards: the buffers are there, and stand still
    return layer


def without_count():
    layer = nn.BatchNorm2d(CHANNELS, momentum=None)
    layer.num_batches_tracked = None  # of weights older than it: torch does not move them then
    return layer


def tracking_nothing():
    layer = nn.BatchNorm2d(CHANNELS, track_running_stats=False)
    layer.track_running_stats = True  # afterwards: there is nothing to keep them in
    return layer


def with_drop_layer():
    return BatchNormAct2d(CHANNELS, act_layer=nn.GELU, drop_layer=nn.Tanh)


LAYERS = {
    "1d": (lambda: nn.BatchNorm1d(CHANNELS), ()),
    "1d, positions": (lambda: nn.BatchNorm1d(CHANNELS), (5,)),
    "2d": (lambda: nn.BatchNorm2d(CHANNELS), (2, 3)),
    "3d": (lambda: nn.BatchNorm3d(CHANNELS), (2, 3, 2)),
    "not affine": (lambda: nn.BatchNorm2d(CHANNELS, affine=False), (2, 3)),
    "eps and momentum": (lambda: nn.BatchNorm2d(CHANNELS, eps=0.1, momentum=0.7), (2, 3)),
    "momentum None": (lambda: nn.BatchNorm2d(CHANNELS, momentum=None), (2, 3)),
    "momentum None, no count": (without_count, (2, 3)),
    "no statistics": (lambda: nn.BatchNorm2d(CHANNELS, track_running_stats=False), (2, 3)),
    "no statistics any more": (without_statistics, (2, 3)),
    "statistics, but none to keep": (tracking_nothing, (2, 3)),
    "timm": (lambda: BatchNormAct2d(CHANNELS), (2, 3)),
    "timm, no activation": (lambda: BatchNormAct2d(CHANNELS, apply_act=False), (2, 3)),
    "timm, a layer before the activation": (with_drop_layer, (2, 3)),
}


class Bent(nn.Module):
    """Gives the layer after it a gradient to send on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.full((CHANNELS,), 2.0))

    def forward(self, x):
        return x**2 + x * self.scale.view(-1, *[1] * (x.dim() - 2))


def made(name):
    make, positions = LAYERS[name]
    torch.manual_seed(0)
    module = nn.Sequential(Bent(), make(), nn.Hardsigmoid()).double()
    for parameter in module[1].parameters():
        parameter.data.normal_()
    x = torch.randn(COUNT, CHANNELS, *positions, dtype=torch.float64)
    return module, x


@pytest.mark.parametrize("name", LAYERS)
def test_two_steps_are_those_of_the_layer(name):
    module, x = made(name)
    for _ in range(2):  # the second moves statistics that are no longer those of the start
        exact = exact_run(module, x, some_gradient)
        run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
        assert_same(run, exact, TOLERANCE)
        module.load_state_dict(exact.buffers, strict=False)


def test_counts_that_change_in_place_are_read_anew():
    module, x = made("2d")
    count = torch.tensor(0, dtype=torch.int32)
    with masked(module, count):
        for rows in (4, 2, 3):
            count.fill_(rows)
            exact = exact_run(module, x[:rows], some_gradient)
            found = module(padded(x[:rows], CAPACITY, True))
            assert torch.allclose(found[:rows], exact.outputs, rtol=0, atol=TOLERANCE)
            assert torch.allclose(module[1].running_mean, exact.buffers["1.running_mean"])


def test_layers_in_evaluation_keep_their_own_forward(monkeypatch):
    module, x = made("2d")
    module[1].running_mean.normal_()
    module[1].eval()
    with counted(monkeypatch) as calls:
        run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert not calls
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


def test_layers_that_take_statistics_of_the_batch_in_evaluation_are_masked():
    module, x = made("no statistics")
    module[1].eval()
    run = masked_run(module, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert_same(run, exact_run(module, x, some_gradient), TOLERANCE)


class Louder(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(2 * x)


def test_other_norms_are_left_alone():
    layers = [
        Louder(CHANNELS), FrozenBatchNormAct2d(CHANNELS), nn.SyncBatchNorm(CHANNELS),
        nn.InstanceNorm2d(CHANNELS), nn.GroupNorm(1, CHANNELS),
    ]  # fmt: skip
    module = nn.Sequential(*layers)
    replaced = nn.BatchNorm2d(CHANNELS)
    replaced.forward = own = torch.tanh
    module.append(replaced)
    with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
        assert not any("forward" in vars(layer) for layer in layers)
        assert replaced.forward is own


def test_a_forward_that_someone_replaced_comes_back():
    module, x = made("2d")
    whole, own = module.forward, module[2].forward
    module.forward = lambda x: whole(x) * 2
    module[2].forward = lambda x: own(x) * 3
    before = module.forward, module[2].forward
    exact = module(x)
    with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
        found = module(padded(x, CAPACITY, True))
    assert torch.allclose(found[:COUNT], exact, rtol=0, atol=TOLERANCE)
    assert (module.forward, module[2].forward) == before


def test_a_layer_by_itself_can_be_the_module():
    torch.manual_seed(0)
    layer, x = nn.BatchNorm1d(CHANNELS).double(), torch.randn(COUNT, CHANNELS, dtype=torch.float64)
    run = masked_run(layer, padded(x, CAPACITY, True), COUNT, some_gradient)
    assert_same(run, exact_run(layer, x, some_gradient), TOLERANCE)


def test_statistics_of_a_part_that_is_called_by_itself_move():
    module, x = made("2d")
    with masked(module, torch.tensor(COUNT, dtype=torch.int32)):
        module[1](padded(x, CAPACITY, True))
    expected = nn.BatchNorm2d(CHANNELS).double()
    expected(x)
    assert torch.allclose(module[1].running_var, expected.running_var)


class Checkpointed(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return checkpoint(self.body, x, use_reentrant=False)


def test_a_checkpoint_may_be_run_again_in_a_context_of_its_own():
    """As captures do: the forward pass in one, the backward pass in another."""
    body, x = made("2d")
    module = Checkpointed(body)
    exact = exact_run(module, x, some_gradient)
    count = torch.tensor(COUNT, dtype=torch.int32)
    with masked(module, count):
        outputs = module(padded(x, CAPACITY, True))[:COUNT]
    with masked(module, count):
        (outputs * some_gradient(outputs)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    run = Run(outputs.detach(), gradients, dict(module.named_buffers()))
    assert_same(run, exact, TOLERANCE)


class Flattened(nn.Module):
    """As timm's LeViT: the positions of all rows, as if they were rows."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(CHANNELS)

    def forward(self, x):
        return self.norm(x.flatten(0, 1)).reshape_as(x)


class Remembering(nn.Module):
    """Weak references to all that passes."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        x = x * 1
        self.seen.append(weakref.ref(x))
        return x


def test_inputs_that_autograd_does_not_keep_are_freed_on_the_way():
    layers = [(Remembering(), nn.BatchNorm2d(CHANNELS), nn.ReLU()) for _ in range(4)]
    module = nn.Sequential(*itertools.chain(*layers)).double().requires_grad_(False)
    alive = []
    count = torch.tensor(COUNT, dtype=torch.int32)
    last = Remembering()
    last.forward = lambda x: alive.extend(layer[0].seen[0]() is not None for layer in layers) or x
    module.append(last)
    with masked(module, count):
        module(torch.randn(CAPACITY, CHANNELS, 2, 2, dtype=torch.float64))
    assert sum(alive) <= 1  # of the last layer, whose result waits


def test_positions_in_place_of_rows_are_refused():
    with (
        masked(module := Flattened(), torch.tensor(2, dtype=torch.int32)),
        pytest.raises(TypeError, match=r"BatchNorm1d got 20 rows where the module has 4"),
    ):
        module(torch.randn(4, 5, CHANNELS))


def test_the_wrong_kind_of_input_is_refused_as_by_torch():
    module = nn.Sequential(nn.BatchNorm2d(CHANNELS))
    with (
        masked(module, torch.tensor(2, dtype=torch.int32)),
        pytest.raises(ValueError, match="expected 4D input"),
    ):
        module(torch.randn(4, CHANNELS))
