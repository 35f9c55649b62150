"""A loop of one's own with DistributedDataParallel: losses and gradients over two ranks equal
those of one process with the whole batch."""

import warnings

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from support.processes import server
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import hubpath_fast as hp

SHAPE, MODEL_SEED, RANKS = (12, 6), 4, 2


def build(k=4):
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

    return hp.HubPathway(experts, Generator(), k=k).double()


def data():
    torch.manual_seed(7)
    x = torch.randn(*SHAPE, dtype=torch.float64)
    return x, torch.randint(0, 3, SHAPE[:1]), torch.randn(SHAPE[0], 4, dtype=torch.float64)


def gradients(model, criterion, x, y, eps):
    out = model(x, eps)
    losses = criterion(out, y)
    losses.total.backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    return losses.explore.detach(), grads


def rank_main(rank, store, results, k):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    x, y, eps = (t.chunk(RANKS)[rank] for t in data())
    model = DistributedDataParallel(build(k), find_unused_parameters=k < 4)
    torch.save(gradients(model, hp.HubPathwayLoss(), x, y, eps), f"{results}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("k", [4, 1])
def test_two_ranks_equal_one_process(tmp_path, k):
    """Equal shards, so that the mean of two ranks' gradients is the whole batch's. With K = 1 an
    expert may have rows on one rank alone, or on none: then it has no gradient anywhere."""
    server()
    mp.start_processes(
        rank_main, (str(tmp_path / "store"), str(tmp_path), k), RANKS, start_method="forkserver"
    )
    explore, expected = gradients(build(k), hp.HubPathwayLoss(), *data())
    for rank in range(RANKS):
        rank_explore, grads = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(rank_explore, explore, rtol=1e-12, atol=1e-12)
        for ours, truth in zip(grads, expected, strict=True):
            if truth is None:
                assert ours is None
            else:
                torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
