"""Frechet distances of generated images, and pictures of them."""

from __future__ import annotations

from cm_lightning.evaluation.digits import DigitsFeatures
from cm_lightning.evaluation.fashion import FashionFeatures
from cm_lightning.evaluation.features import DINOv2, FeatureExtractor, Inception, Timm
from cm_lightning.evaluation.figures import (
    diagnostics_figure,
    read_metrics,
    save_figure,
    schedules_figure,
)
from cm_lightning.evaluation.images import (
    count_nonfinite,
    grid_columns,
    image_grid,
    save_npz,
    save_png,
    to_uint8,
)
from cm_lightning.evaluation.reference import (
    Statistics,
    load_statistics,
    reference_name,
    reference_statistics,
)

# FrechetDistance stays in cm_lightning.evaluation.frechet: importing it imports torchmetrics.
__all__ = [
    "DINOv2",
    "DigitsFeatures",
    "FashionFeatures",
    "FeatureExtractor",
    "Inception",
    "Statistics",
    "Timm",
    "count_nonfinite",
    "diagnostics_figure",
    "grid_columns",
    "image_grid",
    "load_statistics",
    "read_metrics",
    "reference_name",
    "reference_statistics",
    "save_figure",
    "save_npz",
    "save_png",
    "schedules_figure",
    "to_uint8",
]
