"""The one LightningDataModule: a source, its store, and batches addressed by images seen."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from cm_lightning.data.readers import Source
from cm_lightning.data.references import (
    WHOLE,
    ReferenceBank,
    ReferenceSet,
    nearest_distances,
)
from cm_lightning.data.sampler import Rows, StepSampler
from cm_lightning.data.store import (
    ImageStore,
    Resize,
    default_cache,
    to_float,
    write_store,
)
from cm_lightning.types import Batch, ClassLayout, InputError, References

__all__ = ["BatchPlan", "ImageDataModule", "RawBatch"]


class RawBatch(NamedTuple):
    """A batch as the loader delivers it.

    Attributes:
        images: ``(B, C, H, W)`` uint8, or ``None`` if the images are resident on the device.
        labels: ``(B,)`` int64 or ``None``.
        index: Positions in the store, ``(B,)``.
        flip: Whether to mirror each image, ``(B,)`` bool.
        references: Those of this batch, where every batch has its own; without images if these
            are resident.
        layout: Where the references of each row are, by class.
    """

    images: Tensor | None
    labels: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    flip: Tensor
    references: References | None = None
    layout: ClassLayout | None = None


class BatchPlan(NamedTuple):
    """How a global batch is split.

    Attributes:
        global_batch: Images per optimizer step.
        world: Number of devices.
        micro_batch: Images per device and forward pass.
        accumulation: Forward passes per device and optimizer step.
    """

    global_batch: int
    world: int
    micro_batch: int
    accumulation: int


class _StoreDataset(Dataset[RawBatch]):
    """Whole micro-batches of a store, by :class:`Rows`."""

    def __init__(
        self, store: ImageStore, labels: bool, images: bool, bank: ReferenceBank | None = None
    ) -> None:
        self.store, self.labels, self.images, self.bank = store, labels, images, bank

    def __getitem__(self, rows: Rows) -> RawBatch:
        index, flip = torch.from_numpy(rows.index), torch.from_numpy(rows.flip)
        labels = found = references = layout = None
        if self.labels:
            assert self.store.labels is not None
            found = self.store.labels[rows.index]
            labels = torch.from_numpy(found)
        images = self.store[rows.index][0] if self.images else None
        if self.bank is not None:
            layout = self.bank.layout(found)
        if self.bank is not None and self.bank.fetched:
            if self.images:
                references = self.bank(labels, rows.nimg, torch.device("cpu"))
            else:
                references = self.bank.announce(labels, rows.nimg)
        return RawBatch(images, labels, index, flip, references, layout)


class ImageDataModule(L.LightningDataModule):
    """Images from any source, as batches in [-1, 1] on the training device.

    The source is converted once into a memory-mapped uint8 store in the cache; afterwards it is
    opened at once. The order of images is a function of (seed, images seen), flips happen on the
    device, and there is no validation loader: evaluation compares with the store itself.

    Args:
        source: Where the images come from.
        global_batch: Images per optimizer step, over all devices and accumulation.
        micro_batch: Largest batch per device and forward pass; accumulation follows. ``None``:
            the global batch is split over the devices and not accumulated.
        resolution: Height and width of the images, ``None`` to keep them.
        resize: ``"pad"``, centred on black, or ``"resize"``, bicubic.
        conditional: Whether batches carry labels.
        flip: Mirror half of the images.
        num_workers: Processes that read ahead; 0 reads in the training process.
        resident: Keep all images in the memory of the training device.
        cache: Folder of the store, by default ``$CM_HOME`` or ``~/.cache/cm_lightning``.
        seed: Seed of order and flips, >= 0.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        source: Source,
        global_batch: int = 128,
        micro_batch: int | None = None,
        resolution: int | None = None,
        resize: Literal["pad", "resize"] = "pad",
        conditional: bool = True,
        flip: bool = False,
        num_workers: int = 0,
        resident: bool = False,
        cache: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("global_batch", global_batch, 1),
            ("micro_batch", 1 if micro_batch is None else micro_batch, 1),
            ("num_workers", num_workers, 0),
            ("seed", seed, 0),
        ):
            if value < least:
                raise InputError(f"data.{name} must be {least} or more, got {value}.")
        most = 16 * (os.cpu_count() or 1)
        if num_workers > most:
            raise InputError(
                f"data.num_workers must be {most} at most (16 per core), got {num_workers}."
            )
        self.source = source
        self.global_batch = global_batch
        self.micro_batch = micro_batch
        self.transform = Resize(resolution, resize)
        self.conditional = conditional
        self.flip = flip
        self.num_workers = num_workers
        self.resident = resident
        self.cache_dir = default_cache() if cache is None else Path(cache).expanduser()
        self.seed = seed
        self._store: ImageStore | None = None
        self._resident: Tensor | None = None
        self._bank: ReferenceBank | None = None
        self._everything: ReferenceBank | None = None
        self._nearest: Tensor | None = None
        self._trial = False

    def plan(self, world: int) -> BatchPlan:
        """Split the global batch over ``world`` devices.

        Raises:
            InputError: If it does not divide.
        """
        share, rest = divmod(self.global_batch, world)
        if rest or not share:
            raise InputError(
                f"data.global_batch {self.global_batch} is not divisible by {world} devices."
            )
        micro = share if self.micro_batch is None else min(self.micro_batch, share)
        if share % micro:
            below = max(m for m in range(1, micro) if share % m == 0)
            above = min(m for m in range(micro, share + 1) if share % m == 0)
            raise InputError(
                f"data.micro_batch {micro} does not divide the {share} images per device "
                f"(global_batch {self.global_batch} / {world}): use {below} or {above}."
            )
        return BatchPlan(self.global_batch, world, micro, share // micro)

    @property
    def store(self) -> ImageStore:
        """The opened store.

        Raises:
            InputError: If ``setup`` has not run.
        """
        if self._store is None:
            raise InputError("The data are opened by prepare_data() and setup(): call them first.")
        return self._store

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)`` of the images."""
        return self.store.image_shape

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 if batches carry no labels."""
        return self.store.num_classes if self.conditional else 0

    @property
    def fingerprint(self) -> str:
        """Fingerprint of the store."""
        return self.store.fingerprint

    def prepare_data(self) -> None:
        """Convert the source into its store unless that was done before (one process per node).

        Raises:
            InputError: If the source cannot be read; nothing is written then.
        """
        path = self.source.folder(self.cache_dir, self.transform)
        if not path.is_dir():
            identity = self.source.identity()
            images, labels = self.source.read()
            write_store(path, images, labels, source=identity, transform=self.transform)

    def setup(self, stage: str | None = None) -> None:
        """Open the store and split the batch.

        Raises:
            InputError: If labels are wanted but missing, or the batch does not divide.
        """
        if self._trial:  # whose folder is this process's own
            self.prepare_data()
        self._store = ImageStore(self.source.folder(self.cache_dir, self.transform))
        if self.conditional and not self._store.num_classes:
            raise InputError(
                f"data.conditional is true, but {self.source.name} has no labels: set it to false."
            )
        if self.trainer is not None:
            plan = self.plan(self.trainer.world_size)
            given = self.trainer.accumulate_grad_batches
            if given not in (1, plan.accumulation):
                raise InputError(
                    f"trainer.accumulate_grad_batches is {given}: leave it out and set "
                    "data.micro_batch; accumulation follows from data.global_batch."
                )
            self.trainer.accumulate_grad_batches = plan.accumulation

    def use_references(self, spec: ReferenceSet, skip: bool) -> None:
        """Give every batch references from the bank (after ``setup``).

        Args:
            spec: Which ones.
            skip: Whether batches carry the distance to the nearest other image; it is computed
                once and kept beside the store.

        Raises:
            InputError: If there are fewer than asked for.
        """
        conditional = bool(self.num_classes)
        self._bank = ReferenceBank(self.store, spec, conditional, self.flip, self.seed)
        if skip:
            device = torch.device("cpu")
            if self.trainer is not None:
                device = self.trainer.strategy.root_device
            self._nearest = nearest_distances(
                self.store, conditional, self.flip, device, keep=not self._trial
            )

    @property
    def reference_bytes(self) -> int:
        """Bytes of references that stay on the device for all batches."""
        return 0 if self._bank is None else self._bank.nbytes

    @property
    def held_bytes(self) -> int:
        """Bytes of images that stay on the device: all where ``resident``, and references."""
        return (self.store.images.nbytes if self.resident else 0) + self.reference_bytes

    def all_references(self, batch: Batch) -> References | None:
        """Every image of a batch's classes, for exact posterior means.

        Args:
            batch: A batch of this module.

        Returns:
            The references, ``None`` where there are too many of them to hold at once.
        """
        conditional = bool(self.num_classes)
        if not conditional and self.store.images.nbytes * (1 + self.flip) > WHOLE:
            return None
        if self._bank is not None and not self._bank.fetched:
            return self._bank(batch.labels, 0, batch.x0.device, self._resident)
        if self._everything is None:
            self._everything = ReferenceBank(
                self.store, ReferenceSet(), conditional, self.flip, self.seed, floats=False
            )
        return self._everything(batch.labels, 0, batch.x0.device, self._resident)

    def train_dataloader(self) -> DataLoader[RawBatch]:
        """Endless micro-batches of this rank, starting at the module's count of images.

        Raises:
            InputError: If the images seen so far are not whole global batches, or there is no
                trainer, whose devices share a batch.
        """
        if self.trainer is None:
            raise InputError(
                "Batches are made for a trainer: trainer.fit(module, datamodule=data). To look at "
                "images take data.store."
            )
        plan = self.plan(self.trainer.world_size)
        sampler = StepSampler(
            len(self.store),
            self.seed,
            plan.global_batch,
            plan.micro_batch,
            rank=self.trainer.global_rank,
            world=plan.world,
            start_nimg=getattr(self.trainer.lightning_module, "position", 0),
        )
        device = self.trainer.strategy.root_device
        if self.resident and (self._resident is None or self._resident.device != device):
            self._resident = torch.from_numpy(self.store.images.copy()).to(device)
        return DataLoader(
            _StoreDataset(self.store, bool(self.num_classes), not self.resident, self._bank),
            sampler=sampler,
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=device.type == "cuda",
            persistent_workers=self.num_workers > 0,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Batch:
        """Turn grey levels into [-1, 1] and mirror, on the device."""
        images = batch.images
        if images is None:
            assert self._resident is not None
            images = self._resident[batch.index]
        x0, index = to_float(images), batch.index
        if self.flip:
            x0 = torch.where(batch.flip[:, None, None, None], x0.flip(-1), x0)
            index = index + len(self.store) * batch.flip
        references = batch.references
        if references is not None and self._resident is not None:
            assert self._bank is not None
            references = self._bank.fill(references, self._resident)
        if references is None and self._bank is not None:
            nimg = int(getattr(self.trainer.lightning_module, "position", 0)) if self.trainer else 0
            references = self._bank(batch.labels, nimg, x0.device, self._resident)
        if references is not None and self._nearest is not None:
            self._nearest = self._nearest.to(x0.device)
            references = references._replace(nearest=self._nearest[batch.index])
        if references is not None:
            references = references._replace(layout=batch.layout)
        return Batch(x0, batch.labels, index, references)

    def use_temporary_cache(self, folder: Path) -> None:
        """Write nothing outside ``folder``: read the store if it exists, else make it there."""
        self._trial = True
        if not self.source.folder(self.cache_dir, self.transform).is_dir():
            self.cache_dir = folder
