"""Checks of noise by number: what a kernel draws for a ``NoiseDraw`` is what its definition says.

The definition is computed here, on the host, from integers: Philox of the counter, and its numbers
by Box-Muller. So a kernel that agrees draws the same on every device, in every part of a batch and
on every rank. As ``check_kernels``, each check is a function of a device and a backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from hubpath_fast import functional as HF
from hubpath_fast import reference

from .children import Write
from .inputs import Inputs, Size
from .operations import relative_error
from .verdicts import write_verdict

SEED, FIRST = 2**62 + 12345, 2**34 - 20  # both halves of each take part
# The noise is computed in float32, and scores are as many units in the last place off.
TOLERANCE = 1e-5
MULTIPLIERS, KEYS, ROUNDS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85), 10
WORD = 2**32 - 1


def philox(seed: int, counter: np.ndarray) -> list[np.ndarray]:
    """Four words of Philox4x32-10 of each counter, as uint64."""
    zero = np.zeros_like(counter, dtype=np.uint64)
    c = [counter.astype(np.uint64) & WORD, counter.astype(np.uint64) >> 32, zero, zero]
    key = [seed & WORD, seed >> 32]
    for _ in range(ROUNDS):
        low, high = (c[2 * i] * np.uint64(MULTIPLIERS[i]) for i in range(2))
        c = [
            (high >> 32) ^ c[1] ^ np.uint64(key[0]), high & WORD,
            (low >> 32) ^ c[3] ^ np.uint64(key[1]), low & WORD,
        ]  # fmt: skip
        key = [(k + step) & WORD for k, step in zip(key, KEYS, strict=True)]
    return c


def normals(seed: int, first: int, n: int, m: int) -> Tensor:
    """float64 [N, M]: one block of Philox for four adjacent experts of a sample."""
    blocks = max(4, 1 << (m - 1).bit_length()) // 4
    counter = (first + np.arange(n))[:, None] * blocks + np.arange(blocks)
    words, found = philox(seed, counter), []
    for a, b in (words[:2], words[2:]):
        radius = np.sqrt(-2 * np.log((a + 0.5) * 2.0**-32))
        angle = 2 * np.pi * b.astype(np.float64) * 2.0**-32
        found += [radius * np.cos(angle), radius * np.sin(angle)]
    return torch.from_numpy(np.stack(found, axis=-1).reshape(n, 4 * blocks)[:, :m].copy())


def numbered(write: Write, sizes: Iterable[Size], device: str, backend: str) -> None:
    """Routings of numbered noise against the reference's on the noise of the definition, and their
    parts against the whole, to the bit."""
    for size in sizes:
        text = f"numbered {size.n},{size.m},{size.k}"

        def judge(size=size) -> tuple[str | None, dict]:
            return next(_differences(size, device, backend), None), {"text": "as defined"}

        write_verdict(write, text, judge)


def _differences(size: Size, device: str, backend: str) -> Iterator[str]:
    clean, noise, _ = (part.double() for part in Inputs(size, device).scores())
    eps = normals(SEED, FIRST, size.n, size.m).to(device)

    def route(start: int, stop: int):
        own = slice(start, stop)
        draw = HF.NoiseDraw(SEED, FIRST + start)
        return HF.noisy_topk(clean[own], noise[own], size.k, draw, backend=backend)

    whole, expected = route(0, size.n), reference.noisy_topk(clean, noise, size.k, eps)
    # An expert of a score that is next to another's may change places with it.
    other = (whole.experts != expected.experts).any(dim=1).double().mean().item()
    if other > 1e-3:
        yield f"{other:.1%} of the samples have other experts"
    error = relative_error(whole.mean, expected.mean)
    if not error <= TOLERANCE:
        yield f"mean: relative error {error:.1e} above {TOLERANCE:.0e}"
    same = (whole.experts == expected.experts).all(dim=1)
    error = relative_error(whole.weights[same], expected.weights[same])
    if not error <= TOLERANCE:
        yield f"weights: relative error {error:.1e} above {TOLERANCE:.0e}"
    middle = size.n // 3
    for start, stop in ((0, middle), (middle, size.n), (size.n - 1, size.n)):
        part = route(start, stop)
        if not torch.equal(part.weights, whole.weights[start:stop]):
            yield f"samples {start}..{stop - 1} alone have other weights than in the whole"
        if not torch.equal(part.experts, whole.experts[start:stop]):
            yield f"samples {start}..{stop - 1} alone have other experts than in the whole"
