"""Captured graphs on a GPU."""

import pytest
import torch
from graphs_cases import row_wise_expert
from test_executors import M, batch, build, train
from torch import nn

import hubpath_fast as hp
from hubpath_fast.model.executors.graphs import MIN_SEEN

pytestmark = pytest.mark.gpu


def gpu_states(executor, amp=False):
    model = build(executor, "cuda").to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        return train(model, 20, "cuda"), model


@pytest.mark.parametrize("amp", [False, True], ids=["float32", "autocast"])
def test_graphs_give_the_same_training_on_a_gpu(amp):
    (expected, _), (found, model) = (gpu_states(name, amp) for name in ("sequential", "graphs"))
    assert model.executor_report().hits > 20, str(model.executor_report())
    for name, value in expected.items():
        # Another choice of convolution algorithm for a capture may reorder sums.
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


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


def test_dropout_draws_anew_in_each_replay_on_a_gpu():
    model, (x, y) = build("graphs", "cuda"), batch(device="cuda")
    outputs = []
    for _ in range(MIN_SEEN + 3):
        clean = torch.zeros(24, M, device="cuda").scatter(
            1, (torch.arange(24, device="cuda") % M)[:, None], 9.0
        )
        routing = hp.functional.noisy_topk(clean, torch.zeros_like(clean), 1)
        out = model(x, routing=routing)
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

    model, (x, y) = build("graphs", "cuda"), batch(device="cuda")
    model.experts[1] = Reads().cuda()
    for step in range(30):
        x, y = batch(seed=step, device="cuda")
        hp.HubPathwayLoss()(model(x), y).total.backward()
    report = model.executor_report()
    assert "cannot be captured" in report.eager[1]
    assert report.hits > 0
