"""The exploration loss over two ranks equals the loss of one process with the whole batch."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hubpath_fast as hp

SHAPE, MODEL_SEED, RANKS = (12, 6), 4, 2


def build():
    torch.manual_seed(MODEL_SEED)
    experts = [nn.Linear(6, 3) for _ in range(4)]
    heads = nn.Linear(6, 8)

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = heads

        def forward(self, x):
            clean, noise = self.heads(x).chunk(2, dim=1)
            return clean, noise

    return hp.HubPathway(experts, Generator(), k=4).double()


def data():
    torch.manual_seed(7)
    x = torch.randn(*SHAPE, dtype=torch.float64)
    return x, torch.randint(0, 3, SHAPE[:1]), torch.randn(SHAPE[0], 4, dtype=torch.float64)


def gradients(model, criterion, x, y, eps):
    out = model(x, eps)
    losses = criterion(out, y)
    losses.total.backward()
    return losses.explore.detach(), [p.grad.clone() for p in model.parameters()]


def rank_main(rank, store, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    x, y, eps = (t.chunk(RANKS)[rank] for t in data())
    model = DistributedDataParallel(build())
    torch.save(gradients(model, hp.HubPathwayLoss(), x, y, eps), f"{results}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one_process(tmp_path):
    """K = M and equal shards, so that the mean of two ranks' gradients is the whole batch's."""
    mp.start_processes(
        rank_main, (str(tmp_path / "store"), str(tmp_path)), RANKS, start_method="spawn"
    )
    explore, expected = gradients(build(), hp.HubPathwayLoss(), *data())
    for rank in range(RANKS):
        rank_explore, grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(rank_explore, explore, rtol=1e-12, atol=1e-12)
        for ours, truth in zip(grads, expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
