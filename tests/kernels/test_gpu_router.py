"""The router and gather on a device: what the interpreter cannot show.

The other kernel tests run on the device too where there is one; these add large sizes, races,
host waits and captured graphs.
"""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest
import torch
from emulator.router_cases import U, error_of_p, gradient_terms
from hubpath_fast.kernels import gather, noisy_topk
from support.output_cases import assert_within

from hubpath_fast import Routing, reference

pytestmark = pytest.mark.gpu
CONTIGUOUS, LAST = torch.contiguous_format, torch.channels_last


def scores(n, m, seed=0):
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(n, m, generator=generator, device="cuda") for _ in range(3)]


def stable_plan(experts, m):
    """offsets, rows, positions by a stable sort."""
    flat = experts.flatten()
    rows = torch.sort(flat, stable=True).indices
    positions = torch.empty_like(rows)
    positions[rows] = torch.arange(flat.numel(), device=flat.device)
    counts = torch.bincount(flat, minlength=m)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return [x.int() for x in (offsets, rows, positions.view_as(experts))]


@pytest.mark.parametrize(
    ("n", "m", "k"),
    [
        pytest.param(48, 5, 2, id="paper"),
        pytest.param(512, 8, 2, id="most-samples-of-one-launch"),
        pytest.param(64, 64, 9, id="widest-hub-of-one-launch"),
        pytest.param(513, 5, 2, id="first-of-two-launches"),
        pytest.param(4096, 64, 8, id="last-of-two-launches"),
        pytest.param(4097, 64, 8, id="first-of-three-launches"),
        pytest.param(65536, 16, 2, id="many-blocks"),
        pytest.param(262144, 64, 2, id="a-scan-of-every-block"),
        pytest.param(4096, 1000, 16, id="wide-hub"),
        pytest.param(300, 1024, 1024, id="K-equals-M-at-the-limit"),
    ],
)
def test_router_matches_float64(n, m, k):
    clean, noise, eps = (x.requires_grad_() for x in scores(n, m))
    weights, mean, experts, *plan = noisy_topk(clean, noise, eps.detach(), k, False)
    for got, expected in zip(plan, stable_plan(experts, m), strict=True):
        assert torch.equal(got, expected)
    wide = [x.detach().double().requires_grad_() for x in (clean, noise)]
    z = wide[0] + eps.detach().double() * torch.nn.functional.softplus(wide[1])
    p = torch.softmax(z, dim=1)
    # Float32 may rank two almost equal experts either way: the values ranked must agree. exp of
    # an argument up to about 30 is good to 30 * 2^-23, and division and sums add a few roundings.
    tolerance = {"rtol": 1e-5, "atol": 1e-7}
    torch.testing.assert_close(weights.double(), p.gather(1, experts), **tolerance)
    torch.testing.assert_close(weights.double(), p.topk(k, dim=1).values, **tolerance)
    assert (experts.sort(1).values.diff(dim=1) > 0).all()
    torch.testing.assert_close(mean.double(), p.mean(0), **tolerance)

    grad_weights, grad_mean = scores(n, k, 1)[0], scores(1, m, 2)[0][0]
    got = torch.autograd.grad((weights, mean), (clean, noise), (grad_weights, grad_mean))
    expected = torch.autograd.grad(
        (p.gather(1, experts), p.mean(0)), wide, (grad_weights.double(), grad_mean.double())
    )
    # dz/dnoise = eps sigmoid(noise): where that is large, so is the error.
    terms = gradient_terms(p, SimpleNamespace(experts=experts), grad_weights, grad_mean, False)
    bound = (4 * error_of_p(z.detach()) + 16 * U) * terms.detach()
    steep = (eps.double() * torch.sigmoid(wide[1])).abs().detach()
    for name, a, b, limit in zip(
        ("clean", "noise"), got, expected, (bound, bound * steep), strict=True
    ):
        assert_within(a, b, limit, f"d_{name}")


@pytest.mark.parametrize("n", [64, 5000], ids=["one-launch", "three-launches"])
def test_a_thousand_repeats_are_equal_to_the_bit(n):
    clean, noise, eps = (x.requires_grad_() for x in scores(n, 64))
    x = torch.randn(n, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        out = noisy_topk(clean, noise, eps.detach(), 4, False)
        rows = gather(x, Routing(*out), None, None, x.dtype, CONTIGUOUS)
        loss = out[0].square().sum() + out[1].square().sum() + rows.float().square().sum()
        return [*out, rows, *torch.autograd.grad(loss, [clean, noise, x])]

    first = step()
    differs = torch.zeros((), dtype=torch.bool, device="cuda")
    for _ in range(1000):
        for a, b in zip(step(), first, strict=True):
            differs |= (a != b).any()
    assert not differs


@pytest.mark.parametrize("source", ["eps", "draw"])
@pytest.mark.parametrize("n", [48, 1000, 5000], ids=["one-launch", "two", "three"])
def test_capture_and_replay(n, source):
    clean, noise, eps = (x.requires_grad_() for x in scores(n, 6))
    x = torch.randn(n, 3, 8, 8, device="cuda", requires_grad=True)
    scale = torch.rand(6, 3, device="cuda")
    shift = torch.rand(6, 3, device="cuda")

    def step():
        given = "draw" if source == "draw" else eps.detach()
        out = noisy_topk(clean, noise, given, 2, False)
        rows = gather(x, Routing(*out), scale, shift, torch.float16, LAST)
        loss = out[0].square().sum() + out[1].square().sum() + rows.float().square().mean()
        return [*out, rows, *torch.autograd.grad(loss, [clean, noise, x])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()  # compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    replays = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        with torch.no_grad():
            clean.copy_(scores(n, 6, 7)[0])
        graph.replay()
        replays.append([y.clone() for y in captured])
    assert all(map(torch.equal, replays[0], replays[2]))
    assert torch.equal(replays[0][1], replays[1][1]) == (source == "eps")
    for replay in replays:
        for got, expected in zip(replay[3:6], stable_plan(replay[2], 6), strict=True):
            assert torch.equal(got, expected)
    if source == "eps":
        assert all(map(torch.equal, step(), replays[0]))


def test_replays_draw_again_without_being_seeded():
    clean, noise, _ = scores(32, 5)
    noisy_topk(clean, noise, "draw", 2, False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        mean = noisy_topk(clean, noise, "draw", 2, False)[1]
    means = []
    for _ in range(4):
        graph.replay()
        means.append(mean.clone())
    assert len({tuple(m.tolist()) for m in means}) == 4


@pytest.mark.parametrize("n", [200, 600], ids=["one-launch", "two-launches"])
def test_the_host_never_waits(n):
    clean, noise, eps = (x.requires_grad_() for x in scores(n, 7))
    x = torch.randn(n, 3, 9, 9, device="cuda", requires_grad=True)
    scale = torch.rand(7, 3, device="cuda")
    noisy_topk(clean, noise, eps.detach(), 3, True)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (eps.detach(), None, "draw"):
            out = noisy_topk(clean, noise, given, 3, True)
            rows = gather(x, Routing(*out), scale, None, torch.bfloat16, LAST)
            (out[0].sum() + out[1][0] + rows.float().sum()).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("layouts", list(itertools.product([CONTIGUOUS, LAST], repeat=2)))
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.bfloat16], ids=str)
def test_gather_images(dtype, layouts):
    x = torch.rand(48, 3, 224, 224, device="cuda")
    x = ((x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)).contiguous(
        memory_format=layouts[0]
    )
    routing = reference.noisy_topk(*scores(48, 5)[:2], 2)
    scale, shift = torch.rand(5, 3, device="cuda"), torch.rand(5, 3, device="cuda")
    got = gather(x, routing, scale, shift, torch.bfloat16, layouts[1])
    expert = routing.experts.flatten()[routing.rows.long()]
    expected = x[routing.rows.long() // 2].double() * scale[expert].double()[..., None, None]
    expected = expected + shift[expert].double()[..., None, None]
    assert got.is_contiguous(memory_format=layouts[1])
    # one rounding to bfloat16 after two in float32
    torch.testing.assert_close(got.double(), expected, rtol=2.0**-8 + 2.0**-22, atol=1e-6)


def test_more_than_two_to_the_31_elements():
    size = 2**31 + 2**22
    if torch.cuda.mem_get_info()[0] < 4 * size:
        pytest.skip("needs 9 GiB of device memory")
    n, inner = 8, size // 8
    x = torch.randint(0, 255, (n, inner), device="cuda", dtype=torch.uint8)
    routing = reference.noisy_topk(*scores(n, 3)[:2], 1)
    got = gather(x, routing, None, None, torch.uint8, CONTIGUOUS)
    for row, sample in enumerate(routing.rows.tolist()):
        assert torch.equal(got[row], x[sample])
