"""Captured graphs on a GPU."""

import pytest
import torch
from support.graphs import (
    Recurrent,
    assert_same,
    backward,
    exact_expert,
    fixed_routing,
    grads,
    norm_expert,
    replays,
    row_wise_expert,
)
from support.models import M, batch, build, train, without_dropout
from torch import nn

import hubpath_fast as hp
from hubpath_fast.executors.graphs import GENERATOR, MIN_SEEN
from hubpath_fast.executors.graphs.backend import CudaBackend

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def same_algorithms():
    """Padded batches must not be rounded to TF32 where exact ones are not."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def of_experts(executor, expert):
    """A model of such experts, the same each time."""
    model = build(executor)
    model.experts = nn.ModuleList(expert() for _ in range(M))
    return model.to("cuda", memory_format=torch.channels_last)


def gpu_states(executor, amp=False, expert=exact_expert):
    model = of_experts(executor, expert)
    return train(model, 20, "cuda", amp), model


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_graphs_give_the_same_training_on_a_gpu(amp):
    (expected, _), (found, model) = (gpu_states(name, amp) for name in ("sequential", "graphs"))
    assert model.executor_report().hits > 5, str(model.executor_report())
    # Another choice of convolution algorithm for a capture may reorder sums.
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_graphs_give_the_same_predictions_on_a_gpu(amp):
    model, (x, _) = build("graphs", "cuda"), batch(device="cuda")
    twin = build("sequential", "cuda")
    for seed in range(20):
        x, _ = batch(seed=seed, device="cuda")
        with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=amp):
            found, expected = model.eval()(x), twin.eval()(x)
        # bfloat16 keeps 8 bits; float32 may be summed in another order
        tolerance = 2e-2 if amp else 1e-4
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    assert model.executor_report().hits > 20, str(model.executor_report())


def test_dropout_draws_again_in_each_replay_on_a_gpu():
    model, (x, y) = build("graphs", "cuda"), batch(device="cuda")
    outputs = []
    for _ in range(MIN_SEEN + 3):
        out = model(x, routing=fixed_routing(model, device="cuda"))
        hp.HubPathwayLoss()(out, y).total.backward()
        outputs.append(out.expert_outputs.detach().clone())
    assert model.executor_report().hits == 4 * M
    assert not torch.equal(outputs[-1], outputs[-2])


def test_a_host_read_in_an_expert_is_reported_on_a_gpu():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = row_wise_expert()

        def forward(self, x):
            return self.body(x) * (1.0 if x.sum().item() > 0 else 2.0)

    model = build("graphs", "cuda")
    model.experts[1] = Reads().cuda()
    for step in range(12):  # one size: three times until it fails, six more until it is given up
        x, y = batch(seed=step, device="cuda")
        backward(model, x, y, fixed_routing(model, device="cuda"))
    report = model.executor_report()
    assert "cannot be captured" in report.eager[1]
    assert report.hits > 0
    torch.rand(2, device="cuda")  # the random generator is as usable as before


def test_a_failed_capture_leaves_the_generator_and_the_allocator_usable_on_a_gpu():
    device = torch.device("cuda", torch.cuda.current_device())
    backend, x = CudaBackend(device), torch.rand(4, device=device)

    def captured(function):
        pool = backend.new_pool()
        with backend.forked([1], x), backend.on(1):
            return backend.capture(function, pool)

    results = []
    captured(lambda: results.append(x * 2))
    for _ in range(2):
        with pytest.raises(RuntimeError):
            captured(lambda: [x.sum().item()])  # a host read, which breaks a capture off
        torch.rand(2, device=device)  # raises where the generator is still capturing
    replay = captured(lambda: results.append(x + torch.rand(4, device=device)))
    draws = []
    for _ in range(2):
        with backend.forked([1], x), backend.on(1):
            replay()
        draws.append(results[-1].clone())
    assert not torch.equal(*draws)
    # What was marked as read on a second stream is given back once that is done.
    active = torch.cuda.memory_stats()["active_bytes.all.current"]
    block, side = torch.empty(1 << 22, dtype=torch.uint8, device=device), torch.cuda.Stream()
    block.record_stream(side)
    del block
    torch.cuda.synchronize()
    few = torch.empty(1, device=device)  # the allocator looks at what is done when it is asked
    assert torch.cuda.memory_stats()["active_bytes.all.current"] <= active + 512
    assert few.numel() == 1


def test_borrowed_memory_is_the_same_memory_and_does_not_own_it_on_a_gpu():
    backend = CudaBackend(torch.device("cuda", torch.cuda.current_device()))
    cases = ((3, 4, 2, 2), torch.float32), ((5,), torch.bfloat16), ((), torch.float64)
    for shape, dtype in cases:
        owned = torch.rand(shape, device="cuda").to(dtype)
        if owned.dim() == 4:
            owned = owned.to(memory_format=torch.channels_last)
        borrowed = backend.borrow(owned)
        assert (borrowed.data_ptr(), borrowed.stride()) == (owned.data_ptr(), owned.stride())
        owned.fill_(3)
        assert torch.equal(borrowed, owned)
        held = torch.cuda.memory_allocated()
        del owned
        assert torch.cuda.memory_allocated() < held


def test_experts_side_by_side_train_like_one_after_another():
    def states(executor):
        model = build(executor, "cuda")
        model.experts = nn.ModuleList(row_wise_expert() for _ in range(M)).cuda()
        return train(model, 30, "cuda"), model

    torch.manual_seed(2)
    expected, _ = states("sequential")
    torch.manual_seed(2)
    found, model = states("graphs")
    assert model.executor_report().hits > 30, str(model.executor_report())
    records = model._executors.made["graphs"]._store.records
    streams = {use.index: r.stream for use, r in records.items() if use.gradients}
    assert streams == {GENERATOR: 0} | {i: i for i in range(M)}
    # Padded batches are summed in another order.
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


def test_two_forwards_before_a_backward_are_right_on_a_gpu():
    model, (x, y) = build("graphs", "cuda"), batch(device="cuda")
    for expert in model.experts:
        expert[3].p = 0.0  # Dropout
    criterion = hp.HubPathwayLoss()
    for _ in range(MIN_SEEN + 1):
        backward(model, x, y, fixed_routing(model, device="cuda"))
    assert model.executor_report().hits == 2 * M
    found = []
    for executor in ("graphs", "sequential"):
        model.executor = executor
        model.zero_grad(set_to_none=True)
        outs = [model(part, routing=fixed_routing(model, device="cuda")) for part in (x, x.flip(0))]
        sum(criterion(out, y).total for out in outs).backward()
        found.append([p.grad.clone() for p in model.experts.parameters()])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)  # float32, other algorithms


def test_padded_groups_give_the_same_training_on_a_gpu():
    states = [gpu_states(name, expert=norm_expert) for name in ("sequential", "graphs")]
    (expected, _), (found, model) = states
    report = model.executor_report()
    assert (report.exact, report.eager) == ({}, {}), str(report)
    assert report.hits > 40, str(report)
    assert report.padded_rows > 0, str(report)
    # Padded batches are summed in another order.
    assert_same(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_padded_groups_give_the_gradients_and_statistics_of_exact_ones_on_a_gpu(amp):
    model, twin = (of_experts(name, norm_expert) for name in ("graphs", "sequential"))
    x, y = batch(device="cuda")
    for counts in ([6, 6, 6, 6], [5, 7, 9, 3], [2, 10, 8, 4], [7, 5, 4, 8], [3, 3, 9, 9]):
        for each in (model, twin):
            each.zero_grad()
            routing = fixed_routing(each, counts=counts, device="cuda")
            with torch.autocast("cuda", torch.bfloat16, enabled=amp):
                loss = hp.HubPathwayLoss()(each(x, routing=routing), y).total
            loss.backward()
        # bfloat16 keeps 8 bits, and padded kernels round less often: several operations are one.
        tolerance = 5e-2 if amp else 1e-4
        found, expected = grads(model), grads(twin)
        for name, value in expected.items():
            if value is not None:
                error = (found[name] - value).abs().max()
                assert error <= tolerance * value.abs().max() + 1e-4, (name, counts)
    buffers = dict(twin.experts.named_buffers())
    assert_same(dict(model.experts.named_buffers()), buffers, rtol=2e-2 if amp else 1e-4, atol=1e-3)
    assert model.executor_report().hits >= 2 * M, str(model.executor_report())


def test_a_model_that_was_warmed_up_replays_all_and_captures_no_more_on_a_gpu():
    model = without_dropout(build("graphs", "cuda"))
    x, y = batch(device="cuda")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state(), torch.cuda.get_rng_state()
    captured = model.warm_up(x).captured
    assert set(captured) == set(range(M))
    assert_same(model.state_dict(), before)
    assert torch.equal(torch.get_rng_state(), random[0])
    assert torch.equal(torch.cuda.get_rng_state(), random[1])
    with replays(model, 5 * M):
        for counts in ([6, 6, 6, 6], [5, 7, 9, 3], [2, 10, 8, 4], [7, 5, 4, 8], [3, 3, 9, 9]):
            backward(model, x, y, fixed_routing(model, counts=counts, device="cuda"))
    assert model.executor_report().captured == captured


def test_more_sizes_of_an_expert_hold_hardly_more_memory():
    model = of_experts("graphs", exact_expert)
    held = []
    for counts in ([9, 5, 5, 5], [6, 6, 6, 6], [7, 7, 5, 5], [8, 8, 4, 4]):
        x, y = batch(device="cuda")
        for _ in range(MIN_SEEN):
            backward(model, x, y, fixed_routing(model, counts=counts, device="cuda"))
        held.append(model.executor_report().memory)
    assert sum(map(len, model.executor_report().captured.values())) == 14
    # A library's workspace beyond 1 MiB takes a segment of 20 MiB, once an expert.
    assert held[-1] <= 1.5 * held[0] + M * (20 << 20)


def test_recurrent_experts_are_trained_by_graphs_on_a_gpu():
    def states(executor):
        torch.manual_seed(2)
        model = build(executor, "cuda")
        model.experts = nn.ModuleList(Recurrent() for _ in range(M)).cuda()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for seed in range(2 * MIN_SEEN):
            x, y = batch(seed=seed, device="cuda")
            backward(model, x, y, fixed_routing(model, device="cuda"))
            optimizer.step()
            optimizer.zero_grad()
        return model.state_dict(), model

    (expected, _), (found, model) = states("sequential"), states("graphs")
    assert model.executor_report().hits == (MIN_SEEN + 1) * M, str(model.executor_report())
    assert_same(found, expected, rtol=1e-3, atol=1e-4)
