"""What the tests of captured graphs share: a stand-in for CUDA's, experts, fixed routings."""

import contextlib
import copy
from collections import Counter
from functools import partial

import torch
from torch import nn

import hubpath_fast as hp
from hubpath_fast.devices import eval_mode
from hubpath_fast.executors.graphs import MIN_SEEN
from support.models import C, batch, conv_expert

# Of an expert that is padded, where each of four gets 6 of 24 rows at every step: around these 6,
# and 1.2 (for three steps) times 4.5 standard deviations of 2.1 above them.
SIZES_AROUND_SIX = [4, 8, 12]


def run_again(function, static):
    """Its results go where those of its first run lie, as a graph's do."""
    with torch.enable_grad():
        results = function()
    for target, result in zip(static, results, strict=True):
        if target is not None:
            target.detach().copy_(result.detach())


class FakeBackend:
    """Has the methods of ``CudaBackend``. Replays a function by running it again, into the tensors
    of its first run."""

    num_streams = 3
    one_random_state = True

    def __init__(self, device):
        self.captures, self.fail = 0, None
        self.held = Counter()  # bytes of each pool
        self.streams, self.log = [], []  # forked now; the stream of each call

    @contextlib.contextmanager
    def forked(self, streams, reads):
        before = self.streams
        self.streams = [*before, *streams]
        yield
        self.streams = before

    @contextlib.contextmanager
    def on(self, stream):
        assert stream in self.streams, "a stream is used that does not wait for the caller"
        self.log.append(stream)
        yield

    def new_pool(self):
        return object()

    def warm_up(self, function):
        function()

    def capture(self, function, pool):
        if self.fail is not None:
            raise self.fail
        self.captures += 1
        self.held[pool] += 100
        first = function()
        return lambda: run_again(function, first)

    def undisturbed(self):
        return contextlib.nullcontext()

    def borrow(self, tensor):
        return tensor

    def memory(self, pool):
        return self.held[pool]

    def budget(self):
        return 10**8  # buffers for the rows of ``batch()`` take 73,728 of them

    def random_state(self):
        return torch.get_rng_state()

    def set_random_state(self, state):
        torch.set_rng_state(state)


def row_wise_expert(outputs=C):
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LayerNorm(36), nn.Linear(36, outputs)
    )


class Mixing(nn.Sequential):
    """May mix rows, for all that is known: gets exact sizes."""

    def forward(self, x):
        return super().forward(x)


def exact_expert():
    return Mixing(*conv_expert())


def norm_expert():
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(144, C))


class Recurrent(nn.Module):
    def __init__(self, layer=nn.GRU):
        super().__init__()
        self.layer, self.head = layer(8, 5, batch_first=True), nn.Linear(5, C)

    def forward(self, x):
        return self.head(self.layer(x.flatten(1, 2))[0][:, -1])


def fixed_routing(model, n=24, counts=None, device="cpu"):
    """A routing that gives every expert the same n/M rows, or the rows of ``counts`` (K = 1)."""
    m = len(model.experts)
    counts = counts or [n // m] * m
    chosen = torch.repeat_interleave(torch.arange(m), torch.tensor(counts))
    clean = torch.zeros(len(chosen), m).scatter(1, chosen[:, None], 9.0)
    clean = clean.to(device).requires_grad_()
    return hp.functional.noisy_topk(clean, torch.zeros_like(clean), 1)


def backward(model, x, y, routing):
    out = model(x, routing=routing)
    hp.HubPathwayLoss()(out, y).total.backward()


def grads(model):
    return {
        name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()
    }


def assert_same(found, expected, rtol=0, atol=0):
    """Tensors by name, or None, are the same: to the bit, unless a tolerance says otherwise."""
    torch.testing.assert_close(dict(found), dict(expected), rtol=rtol, atol=atol)


def assert_as_sequential(model, run, packed=(), **tolerance):
    """``run(model)`` gives the gradients that the sequential executor gives. Returns how many
    batches it added to ``packed``."""
    twin = copy.deepcopy(model)
    twin.executor = "sequential"
    for each in (twin, model):
        before = len(packed)
        torch.manual_seed(7)
        each.zero_grad(set_to_none=True)
        run(each)
    assert_same(grads(model), grads(twin), **tolerance)
    return len(packed) - before


@contextlib.contextmanager
def replays(model, expected):
    """Within, so many groups are replayed."""
    before = model.executor_report().hits
    yield
    assert model.executor_report().hits == before + expected


# Of gradients, or outputs: in float64, padded batches sum in another order.
assert_close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)


def doubles(n=24, seed=0):
    x, y = batch(n=n, seed=seed)
    return x.double(), y


def compare_steps(model, twin, steps, counts=None):
    """Both are trained alike, and have the same gradients at each step and state in the end."""
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (model, twin)]
    for i in range(steps):
        x, y = doubles(seed=i)
        for each in (model, twin):
            torch.manual_seed(i)
            backward(each, x, y, fixed_routing(each, counts=counts))
        assert_close(grads(model), grads(twin))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert_close(model.state_dict(), twin.state_dict())


def settled(model, x, y, steps=MIN_SEEN, counts=None):
    """After enough steps on one routing for its sizes to be captured; gradients dropped."""
    for _ in range(steps):
        backward(model, x, y, fixed_routing(model, counts=counts))
    model.zero_grad(set_to_none=True)
    return model


def predict(model, x, counts, mode=torch.inference_mode):
    """A prediction that gives experts ``counts`` rows."""
    with eval_mode(model), mode():
        return model(x, routing=fixed_routing(model, counts=counts))
