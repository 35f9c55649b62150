"""Pathway noise as a function of (seed, sample, expert), which needs no generator and keeps none.

What a generator gives depends on who drew before: on how a batch is cut into micro-batches, and
on how many processes share it. Here a counter takes its place: a sample's noise is that of its
number, whoever asks for it and beside whichever others.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LARGEST_SEED, LARGEST_FIRST = 2**63 - 1, 2**48 - 1  # what the kernels' int64 counters hold


class NoiseDraw(NamedTuple):
    """The noise of samples ``first``, ``first + 1``, ...; ``eps`` of ``functional.noisy_topk``.

    seed: 0..2**63 - 1, another for each step. first: 0..2**48 - 1, the number of the call's first
    sample, such as its place in the batch of all processes.

    The kernels and torch's implementation draw other numbers of the same seed. Launches that a CUDA
    graph captures would repeat the noise of their capture: there ``"draw"`` draws anew.
    """

    seed: int
    first: int = 0

    def normals(self, num_samples: int, num_experts: int) -> Tensor:
        """float64 [N, M] on the CPU: 52 bits of Philox for each, through the normal quantile.

        One number makes one normal, so that the parts of a batch are those of the whole to the bit.
        """
        blocks = -(-num_experts // 4)  # a step of the counter makes four numbers, of one sample
        philox = np.random.Philox(key=self.seed, counter=self.first * blocks)
        # As torch's integers: torch.compile would make torch's of numpy's, and those cannot shift.
        bits = torch.from_numpy(philox.random_raw((num_samples, 4 * blocks)).view(np.int64))
        bits = bits[:, :num_experts] >> 12 & 2**52 - 1
        uniform = (bits.double() + 0.5) * 2.0**-52  # of 53 bits the largest would be rounded to 1
        return torch.special.ndtri(uniform)


def check_noise_draw(draw: NoiseDraw) -> None:
    """Raise ValueError unless the draw's numbers are in range."""
    for name, value, most in zip(draw._fields, draw, (LARGEST_SEED, LARGEST_FIRST), strict=True):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
            raise ValueError(f"eps: expected NoiseDraw.{name} in 0..{most}, got {value!r}")
