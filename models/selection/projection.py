"""Random projection of gradients to a few thousand numbers, which keeps inner products (RoVRM section 4.3, after LESS).

Shape letters: B rows, D numbers before and K after the projection.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from eagleray.models.selection.rows import SelectionError, spans


class RandomProjection:
    """x -> x S / sqrt(K) with random signs S [D, K], which are made in blocks and never held as a whole.

    Equal in every process: the signs of a block are the bits of a counter-based generator with the seed and the number
    of the block as its key.

    Args:
        width: K.
        seed: Seed of the signs.
        block: Rows of S at a time; part of what the projection is, as the seed.
    """

    def __init__(self, width: int, *, seed: int = 0, block: int = 1024) -> None:
        if width < 1 or width % 8:
            raise SelectionError(
                f"The width of a projection is {width}; it must be a positive multiple of 8."
            )
        self.width, self._seed, self._block = width, seed, block

    def __call__(self, rows_BD: torch.Tensor, *, first_block: int = 0) -> torch.Tensor:
        """Project rows; float32 [B, K] on the rows' device.

        Args:
            rows_BD: The rows, or a part of longer ones that come piece by piece; the projections of the pieces add up.
            first_block: Where the signs for a piece begin: after `blocks` of the pieces before it.
        """
        projected = torch.zeros(rows_BD.shape[0], self.width, device=rows_BD.device)
        for number, (start, stop) in enumerate(spans(rows_BD.shape[1], self._block), start=first_block):
            signs = self.signs(number)[: stop - start].to(rows_BD.device)
            projected.addmm_(rows_BD[:, start:stop].float(), signs)
        return projected.div_(math.sqrt(self.width))

    def blocks(self, width: int) -> int:
        """How many blocks of signs rows of a width take."""
        return -(-width // self._block)

    def signs(self, number: int) -> torch.Tensor:
        """Block `number` of S: +1 and -1 in float32 [block, K]."""
        generator = np.random.Generator(np.random.Philox(key=[self._seed, number]))
        bits = np.frombuffer(generator.bytes(self._block * self.width // 8), dtype=np.uint8)
        ones = np.unpackbits(bits).reshape(self._block, self.width)
        return torch.from_numpy(ones).float().mul_(2).sub_(1)
