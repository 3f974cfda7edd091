"""Data: sources, the memory-mapped store, the order of images, and the LightningDataModule."""

from cm_lightning.data.augment import EDMAugment
from cm_lightning.data.convert import TRANSFORMS, Transform, convert
from cm_lightning.data.layouts import KINDS, ImageFiles, open_images
from cm_lightning.data.module import BatchPlan, ImageDataModule, RawBatch
from cm_lightning.data.readers import IDX, Digits, Source, Store, read_idx
from cm_lightning.data.references import ReferenceBank, ReferenceSet, nearest_distances
from cm_lightning.data.sampler import Order, Rows, StepSampler
from cm_lightning.data.store import ImageStore, Resize, default_cache, to_float, write_store

__all__ = [
    "IDX",
    "KINDS",
    "TRANSFORMS",
    "BatchPlan",
    "Digits",
    "EDMAugment",
    "ImageDataModule",
    "ImageFiles",
    "ImageStore",
    "Order",
    "RawBatch",
    "ReferenceBank",
    "ReferenceSet",
    "Resize",
    "Rows",
    "Source",
    "StepSampler",
    "Store",
    "Transform",
    "convert",
    "default_cache",
    "nearest_distances",
    "open_images",
    "read_idx",
    "to_float",
    "write_store",
]
