"""Where the tests run: on the GPU if there is one, else under Triton's interpreter on the CPU."""

from __future__ import annotations

import gc
import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    # Triton reads this when a kernel is defined, so it must be set before any kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1"
    # Where torch.export runs before a process's first backward, that one starts threads as for
    # devices, and no process that is forked later, as a rank of bench.check_ranks is, can compute
    # gradients.
    torch.ones(1, requires_grad=True).backward()
# Spinning threads of workers, and of what they start, slow each other about twentyfold. And the
# executor that a model chooses by itself depends on their number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.hookimpl(wrapper=True)
def pytest_collection(session):
    """No garbage collection while tests are collected, and none afterwards of what lives as long as
    the process: some 700,000 objects of modules and tests, looked at again by every full one."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


def pytest_collection_modifyitems(items):
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch.cuda.is_available() is False")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that Triton kernels run on here: CPU tensors only work under the interpreter."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture
def user_cache(tmp_path, monkeypatch):
    """An empty cache folder, of this process and of what it starts: the package's part of it."""
    pytest.importorskip("platformdirs")
    from hubpath_fast.executors import remembered
    from hubpath_fast.files import user_cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    remembered.read.cache_clear()
    yield user_cache_folder()
    remembered.read.cache_clear()
