"""Data: sources, the memory-mapped store, the order of images, and the LightningDataModule."""

from cm_lightning.data.module import BatchPlan, ImageDataModule, RawBatch
from cm_lightning.data.readers import IDX, Digits, Source, read_idx
from cm_lightning.data.references import ReferenceBank, ReferenceSet, nearest_distances
from cm_lightning.data.sampler import Order, Rows, StepSampler
from cm_lightning.data.store import ImageStore, Resize, default_cache, to_float, write_store

__all__ = [
    "IDX",
    "BatchPlan",
    "Digits",
    "ImageDataModule",
    "ImageStore",
    "Order",
    "RawBatch",
    "ReferenceBank",
    "ReferenceSet",
    "Resize",
    "Rows",
    "Source",
    "StepSampler",
    "default_cache",
    "nearest_distances",
    "read_idx",
    "to_float",
    "write_store",
]
