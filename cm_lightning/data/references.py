"""Which images of the data set a training step takes as references for SCT."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cm_lightning.data.store import ImageStore, to_float
from cm_lightning.files import replacing
from cm_lightning.transfer import full_fp32
from cm_lightning.types import ClassLayout, InputError, References, check_word

__all__ = [
    "WHOLE",
    "ReferenceBank",
    "ReferenceSet",
    "class_layout",
    "nearest_distances",
    "prepare",
]

WHOLE = 1 << 31
"""Bytes up to which all classes stay on the device together, and up to which they stay as floats;
beyond, classes are fetched, and images stay grey levels."""

PARTS = 16
"""Parts that the rows of a batch are divided into at most, by class, each with references of its
own: ten classes cost a tenth of the products, a thousand do not cost a thousand calls."""


@dataclass(frozen=True)
class ReferenceSet:
    """Where the references of a step come from.

    Args:
        source: ``"bank"`` for the data set (images of the row's class if there are labels),
            ``"batch"`` for the micro-batch itself; the posterior's skip rule does not apply to it.
        n: References per row, the own image included: a random subset, drawn anew each step, of
            the set or of each class in the batch. ``None`` for all. An image that is drawn itself
            has one other reference less.
        gather: With ``"batch"``: the micro-batches of all devices together.

    Raises:
        InputError: If ``n`` is below 1, or does not fit the source.
    """

    source: Literal["bank", "batch"] = "bank"
    n: int | None = None
    gather: bool = False

    def __post_init__(self) -> None:
        check_word("references.source", self.source, ("bank", "batch"))
        if self.n is not None and self.n < 1:
            raise InputError(f"references.n must be 1 or more, or null for all, got {self.n}.")
        if self.n is not None and self.source == "batch":
            raise InputError("references.n belongs to the bank; the batch is used as it is.")
        if self.gather and self.source == "bank":
            raise InputError("references.gather belongs to the batch; the bank is complete.")


class ReferenceBank:
    """References from a store: all images, those of some classes, or random subsets of them.

    It is no part of a module: checkpoints, averages and DDP do not see it.

    Args:
        store: The images.
        spec: Which of them.
        conditional: Whether a row uses its own class only.
        flip: Whether mirrored images belong to the data.
        seed: Seed of random subsets.
        floats: Whether one set for all batches is kept as floats, ready for use at every step.

    Raises:
        InputError: If more references are asked for than there are, or a class has no image.
    """

    def __init__(
        self,
        store: ImageStore,
        spec: ReferenceSet,
        conditional: bool,
        flip: bool,
        seed: int,
        floats: bool = True,
    ) -> None:
        self.store, self.spec, self.seed = store, spec, seed
        self.size = len(store) * (2 if flip else 1)
        self.floats = floats and 4 * self.size * store.images[0].nbytes <= WHOLE
        self.flip = flip
        self.members: list[npt.NDArray[np.int64]] | None = None
        if conditional:
            assert store.labels is not None
            labels = np.concatenate([store.labels] * (2 if flip else 1))
            order = np.argsort(labels, kind="stable").astype(np.int64)
            ends = np.searchsorted(labels[order], np.arange(store.num_classes + 1))
            self.members = [order[a:b] for a, b in pairwise(ends)]
        self._check()
        self._whole: References | None = None

    def _check(self) -> None:
        counts = [self.size] if self.members is None else [len(rows) for rows in self.members]
        least = int(np.argmin(counts))
        where = "the data have" if self.members is None else f"label {least} has"
        wanted = self.spec.n or 1
        if counts[least] < wanted:
            raise InputError(
                f"references.n asks for {wanted} references per image and {where} only "
                f"{counts[least]}: lower it, or set it to null for all there are."
            )

    @property
    def fetched(self) -> bool:
        """Whether every batch has references of its own, rather than one set for all."""
        large = self.members is not None and self.store.images.nbytes > WHOLE
        return self.spec.n is not None or large

    @property
    def nbytes(self) -> int:
        """Bytes on the device of the one set for all batches, 0 where there is none."""
        if self.fetched:
            return 0
        return int(self.store.images[0].nbytes) * self.size * (4 if self.floats else 1)

    def __call__(
        self, labels: Tensor | None, nimg: int, device: torch.device, images: Tensor | None = None
    ) -> References:
        """References for a batch.

        Args:
            labels: Class indices of the batch, ``(B,)`` or ``None``.
            nimg: Images seen so far; decides random subsets.
            device: Where they are wanted.
            images: All images of the store on that device, if they are there already.
        """
        if not self.fetched:
            if self._whole is None or self._whole.images.device != device:
                parts = [np.arange(self.size)] if self.members is None else self.members
                whole = self._take(np.concatenate(parts), device, images)
                self._whole = prepare(whole) if self.floats else whole
            return self._whole
        return self._take(self.choose(labels, nimg), device, images)

    def layout(self, labels: npt.NDArray[np.int64] | None) -> ClassLayout | None:
        """Where the references of a batch's rows are among those that it is given.

        Args:
            labels: Class indices of the batch, ``(B,)``, or ``None``.

        Returns:
            ``None`` if every row uses all references.
        """
        if self.members is None or labels is None:
            return None
        sizes = [len(rows) if self.spec.n is None else self.spec.n - 1 for rows in self.members]
        given = np.unique(labels[labels >= 0]).tolist() if self.fetched else range(len(sizes))
        return class_layout(labels, {label: sizes[label] for label in given})

    def choose(self, labels: Tensor | None, nimg: int) -> npt.NDArray[np.int64]:
        """Positions of a batch's own references; for labels on a device it waits for the device.

        Args:
            labels: Class indices of the batch, ``(B,)`` or ``None``.
            nimg: Images seen so far; decides random subsets.
        """
        if self.members is None:
            return self._draw(np.arange(self.size), (nimg, 2))
        present = (
            [] if labels is None else sorted({label for label in labels.tolist() if label >= 0})
        )
        # a stream per class, so that a class has the same subset on every device
        chosen = [self._draw(self.members[label], (nimg, 2, label)) for label in present]
        return np.concatenate(chosen) if chosen else np.empty(0, np.int64)

    def announce(self, labels: Tensor | None, nimg: int) -> References:
        """References without images, for :meth:`fill` to complete on the device that has them.

        Args:
            labels: Class indices of the batch, ``(B,)`` on the CPU, or ``None``.
            nimg: Images seen so far.
        """
        index = self.choose(labels, nimg)
        found = None
        if self.members is not None:
            assert self.store.labels is not None
            found = torch.from_numpy(self.store.labels[index % len(self.store)])
        return References(torch.empty(0, dtype=torch.uint8), found, torch.from_numpy(index))

    def fill(self, references: References, images: Tensor) -> References:
        """Announced references with their images.

        Args:
            references: From :meth:`announce`, moved to the device.
            images: All images of the store on that device.
        """
        places = references.index % len(self.store)
        return references._replace(images=self._mirror(images[places], references.index))

    def _mirror(self, pixels: Tensor, index: Tensor) -> Tensor:
        if not self.flip:
            return pixels
        mirrored = index >= len(self.store)
        return torch.where(mirrored[:, None, None, None], pixels.flip(-1), pixels)

    def _draw(self, rows: npt.NDArray[np.int64], stream: tuple[int, ...]) -> npt.NDArray[np.int64]:
        n = self.spec.n
        if n is None:
            return rows
        generator = np.random.default_rng((self.seed, *stream))
        return np.sort(rows[generator.choice(len(rows), n - 1, replace=False)])

    def _take(
        self, index: npt.NDArray[np.int64], device: torch.device, images: Tensor | None
    ) -> References:
        places = index % len(self.store)
        if images is None:
            pixels = torch.from_numpy(self.store.read(places)).to(device)
        else:
            pixels = images[torch.from_numpy(places).to(device)]
        where = torch.from_numpy(index).to(device)
        labels = None
        if self.members is not None:
            assert self.store.labels is not None
            labels = torch.from_numpy(self.store.labels[places]).to(device)
        return References(self._mirror(pixels, where), labels, where)


def class_layout(labels: npt.NDArray[np.int64], sizes: Mapping[int, int]) -> ClassLayout:
    """Where the references of each row are that lie class by class.

    Args:
        labels: Class indices of the rows, ``(B,)``; -1 for none.
        sizes: Number of references of each class, those of the rows at least, in their order.

    Returns:
        One part per class, or :data:`PARTS` of several classes where there are more.
    """
    order = np.argsort(labels, kind="stable")
    order = order[labels[order] >= 0]
    present, counts = np.unique(labels[order], return_counts=True)
    ends = dict(zip(sizes, np.cumsum(list(sizes.values())).tolist(), strict=True))
    least = 1 if len(present) <= PARTS else math.ceil(len(order) / PARTS)
    parts: list[tuple[int, int, int, int]] = []
    first = row = 0
    start = None
    for label, count in zip(present.tolist(), counts.tolist(), strict=True):
        row += count
        start = ends[label] - sizes[label] if start is None else start
        if row - first >= least or row == len(order):
            parts.append((first, row, start, ends[label]))
            first, start = row, None
    return ClassLayout(torch.from_numpy(order), tuple(parts))


def prepare(references: References) -> References:
    """The same as floats with their squared norms, which then are not made at every step.

    Args:
        references: As grey levels.
    """
    images = references.images.to(torch.float32).div_(127.5).sub_(1)  # in place: they may be many
    parts = torch.split(images, 4096)
    squares = torch.cat([part.flatten(1).square().sum(1) for part in parts])
    return references._replace(images=images, squares=squares)


def nearest_distances(
    store: ImageStore,
    conditional: bool,
    flip: bool,
    device: torch.device,
    chunk: int = 2048,
    keep: bool = True,
) -> Tensor:
    """Distance from every image to its nearest other one, for the skip rule; computed once.

    Distances are Euclidean over images in [-1, 1], within the class if ``conditional``, against
    mirrored images too if ``flip``; exact duplicates are ignored, as they share one mean. The
    result is kept beside the store.

    Args:
        store: The images.
        conditional: Whether only images of the same class count.
        flip: Whether mirrored images belong to the data.
        device: Where to compute.
        chunk: Images per block.
        keep: Whether to write the result beside the store.

    Returns:
        ``(N,)`` fp32 on the CPU; infinite for an image alone in its class.
    """
    name = f"nearest{'-label' if conditional else ''}{'-flip' if flip else ''}.npy"
    path = store.path / name
    if path.is_file():
        with contextlib.suppress(Exception):  # a damaged file is made anew
            found = np.load(path, allow_pickle=False)
            if found.shape == (len(store),) and found.dtype == np.float32:
                return torch.from_numpy(found)
    result = torch.full((len(store),), torch.inf)
    groups = [np.arange(len(store))]
    if conditional:
        assert store.labels is not None
        groups = [np.flatnonzero(store.labels == label) for label in range(store.num_classes)]
    for rows, block in _progress(groups, chunk):
        x = _floats(store, block, device)
        best = torch.full((len(block),), torch.inf, dtype=torch.float64, device=device)
        for start in range(0, len(rows), chunk):
            y = _floats(store, rows[start : start + chunk], device)
            for other in (y, y.flip(-1)) if flip else (y,):
                with full_fp32():
                    best = torch.minimum(best, _nearest(x.flatten(1), other.flatten(1)))
        result[torch.from_numpy(block)] = best.sqrt().float().cpu()
    if not keep:
        return result
    with contextlib.suppress(OSError), replacing(path) as partial:
        np.save(partial, result.numpy(), allow_pickle=False)
    return result  # a cache that cannot be written is computed again


def _floats(store: ImageStore, rows: npt.NDArray[np.int64], device: torch.device) -> Tensor:
    return to_float(torch.from_numpy(np.ascontiguousarray(store.images[rows])).to(device))


def _nearest(x: Tensor, y: Tensor) -> Tensor:
    """Smallest squared distance of each row of x to a row of y that is not a duplicate, (B,)."""
    norms = x.square().sum(1)[:, None] + y.square().sum(1)
    squares = (norms - 2 * x @ y.T).double()
    # one grey level in one pixel is a squared distance of 6e-5; rounding reaches 1e-5 of the norms
    close = squares < 1e-4 * (1 + norms)
    for pairs in torch.split(close.nonzero(), 1024):
        i, j = pairs.T
        exact = (x[i].double() - y[j].double()).square().sum(1)
        squares[i, j] = torch.where(exact > 0, exact, torch.inf)
    return squares.clamp_min(0).min(1).values


def _progress(
    groups: list[npt.NDArray[np.int64]], chunk: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Pairs of (rows of a group, block of them), with a bar if it takes a while."""
    from tqdm import tqdm

    total = sum(len(rows) for rows in groups)
    with tqdm(total=total, desc="nearest images", unit="img", delay=3.0) as bar:
        for rows in groups:
            for start in range(0, len(rows), chunk):
                block = rows[start : start + chunk]
                yield rows, block
                bar.update(len(block))
