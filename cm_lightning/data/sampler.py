"""The order in which images are seen: a pure function of the seed and the position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from cm_lightning.types import InputError

__all__ = ["Order", "Rows", "StepSampler"]


class Rows(NamedTuple):
    """What one micro-batch takes from the store.

    Attributes:
        index: Positions in the store, ``(B,)`` int64.
        flip: Whether to mirror each image, ``(B,)`` bool.
        nimg: Images seen before the optimizer step they belong to.
    """

    index: npt.NDArray[np.int64]  # type: ignore[assignment]  # hides tuple.index
    flip: npt.NDArray[np.bool_]
    nimg: int = 0


class Order:
    """Image and coin flip at every position p = 0, 1, 2, ...

    Epoch ``p // N`` is a fresh permutation of the N images; the coin is drawn from a second stream.

    Args:
        size: Number of images N.
        seed: Seed, >= 0.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self._epochs: dict[int, Rows] = {}

    def __call__(self, positions: npt.NDArray[np.int64]) -> Rows:
        """Rows at the given positions, ``(B,)``."""
        index = np.empty(len(positions), np.int64)
        flip = np.empty(len(positions), np.bool_)
        epochs, places = np.divmod(positions, self.size)
        for epoch in np.unique(epochs):
            where = epochs == epoch
            rows = self._epoch(int(epoch))
            index[where], flip[where] = rows.index[places[where]], rows.flip[places[where]]
        return Rows(index, flip)

    def _epoch(self, epoch: int) -> Rows:
        if epoch not in self._epochs:
            order, coin = (np.random.default_rng((self.seed, epoch, k)) for k in (0, 1))
            for old in [e for e in self._epochs if e < epoch - 1]:
                del self._epochs[old]
            self._epochs[epoch] = Rows(
                order.permutation(self.size).astype(np.int64), coin.random(self.size) < 0.5
            )
        return self._epochs[epoch]


class StepSampler(Sampler[Rows]):
    """Endless micro-batches of one rank, addressed by the number of images seen.

    In optimizer step s of global batch G, micro-step j of rank k out of W takes the positions
    ``s * G + (j * W + k) * m`` to ``... + m``, m being the micro-batch: the set of images of a step
    does not depend on ranks or accumulation, and a resumed run starts where it stopped.

    Args:
        size: Number of images.
        seed: Seed, >= 0.
        global_batch: G.
        micro_batch: m; G must be a multiple of W * m.
        rank: k.
        world: W.
        start_nimg: Images seen before, a multiple of G.

    Raises:
        InputError: If ``start_nimg`` is no multiple of G.
    """

    def __init__(
        self,
        size: int,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int = 0,
        world: int = 1,
        start_nimg: int = 0,
    ) -> None:
        assert global_batch % (micro_batch * world) == 0
        if start_nimg % global_batch:
            raise InputError(
                f"data.global_batch {global_batch} does not divide the {start_nimg} images seen so "
                "far: resume with the global batch of the run."
            )
        self.order = Order(size, seed)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world, self.start_nimg = rank, world, start_nimg

    def __iter__(self) -> Iterator[Rows]:
        block = np.arange(self.micro_batch)
        step = self.start_nimg
        while True:
            for first in range(
                self.rank * self.micro_batch, self.global_batch, self.world * self.micro_batch
            ):
                yield self.order(step + first + block)._replace(nimg=step)
            step += self.global_batch
