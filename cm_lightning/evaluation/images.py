"""From network output to stored images: quantisation, grids, PNG and NPZ files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cm_lightning.files import replacing
from cm_lightning.types import InputError

__all__ = [
    "count_nonfinite",
    "grid_columns",
    "image_grid",
    "save_npz",
    "save_png",
    "to_uint8",
]

GREY = 128
"""Grey level between the images of a grid."""

VISIBLE = 32
"""Pixels that an image in a grid has at least along its shorter side."""


def to_uint8(x: Tensor) -> Tensor:
    r"""Quantise images to grey levels, :math:`\lfloor 127.5 x + 128 \rfloor` in [0, 255].

    This is the rounding of EDM (arXiv:2206.00364), the inverse of :math:`x = v / 127.5 - 1` for
    every grey level :math:`v`. NaN becomes 0: ask :func:`count_nonfinite` before.

    Args:
        x: Images in [-1, 1], any shape.

    Returns:
        Grey levels of the same shape, uint8.

    Raises:
        InputError: If they are whole numbers, so perhaps grey levels already.
    """
    if not x.is_floating_point():
        raise InputError(f"to_uint8 takes images in [-1, 1] as floats, got {x.dtype}.")
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return (x * 127.5 + 128).clip(0, 255).nan_to_num(0).to(torch.uint8)


def count_nonfinite(x: Tensor) -> int:
    """Number of images with a NaN or infinite value among ``x``, shape ``(B, ...)``."""
    return int((~x.isfinite()).flatten(1).any(1).sum())


def grid_columns(classes: int) -> int | None:
    """Images per row of a grid whose images are of class 0, 1, 2, ...: 16 at most.

    Args:
        classes: Number of classes, 0 for none.
    """
    return min(classes, 16) or None


def image_grid(
    images: Tensor, columns: int | None = None, padding: int = 1, scale: int | None = None
) -> npt.NDArray[np.uint8]:
    """Arrange images in rows, left to right, top to bottom, with grey lines between them.

    Args:
        images: Grey levels, shape ``(N, C, H, W)``, uint8, ``N >= 1``.
        columns: Images per row, ``None`` for a square grid.
        padding: Width of the lines in pixels of the grid.
        scale: Enlargement: each pixel becomes ``scale x scale`` pixels. ``None`` for the smallest
            that makes images at least 32 pixels wide and high.

    Returns:
        The grid, shape ``(height, width, C)``.

    Raises:
        InputError: If ``images`` are no uint8 images or an argument is out of range.
    """
    _check_images(images)
    n, channels, height, width = images.shape
    columns = math.ceil(math.sqrt(n)) if columns is None else columns
    scale = math.ceil(VISIBLE / min(height, width)) if scale is None else scale
    if columns < 1 or scale < 1 or padding < 0:
        raise InputError(
            "image_grid needs columns >= 1, scale >= 1 and padding >= 0, got "
            f"columns {columns}, scale {scale}, padding {padding}."
        )
    columns = min(columns, n)
    rows = math.ceil(n / columns)
    height, width = height * scale, width * scale
    large = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    grid = torch.full(
        (rows * (height + padding) + padding, columns * (width + padding) + padding, channels),
        GREY,
        dtype=torch.uint8,
    )
    for i, image in enumerate(large.permute(0, 2, 3, 1).cpu()):
        top = padding + i // columns * (height + padding)
        left = padding + i % columns * (width + padding)
        grid[top : top + height, left : left + width] = image
    return grid.numpy()


def save_png(path: str | Path, array: npt.NDArray[np.uint8]) -> None:
    """Write a picture, shape ``(H, W, C)`` with 1 or 3 channels; the file is never half written.

    Raises:
        InputError: If the array has another shape or type.
    """
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3):
        raise InputError(
            f"A PNG needs uint8 pixels of shape (H, W, 1) or (H, W, 3), got {array.dtype} "
            f"{array.shape} for {path}."
        )
    with replacing(path) as partial:
        Image.fromarray(array[..., 0] if array.shape[2] == 1 else array).save(partial, format="PNG")


def save_npz(path: str | Path, images: Tensor, labels: Tensor | None = None) -> None:
    """Write samples in the layout of the ADM evaluator (arXiv:2105.05233).

    ``arr_0`` holds the images as ``(N, H, W, C)``, uint8, and ``arr_1`` the labels, if any. The
    evaluator takes three channels, so greyscale images are repeated to three.

    Args:
        path: File to write; it is replaced at once, never half written.
        images: Grey levels, shape ``(N, C, H, W)``, uint8.
        labels: Class indices, shape ``(N,)``.

    Raises:
        InputError: If ``images`` are no uint8 images or the numbers differ.
    """
    _check_images(images)
    if labels is not None and labels.shape != images.shape[:1]:
        raise InputError(
            f"Got {len(images)} images but labels of shape {tuple(labels.shape)} for {path}."
        )
    if images.shape[1] == 1:
        images = images.expand(-1, 3, -1, -1)
    arrays = [np.ascontiguousarray(images.permute(0, 2, 3, 1).cpu().numpy())]
    if labels is not None:
        arrays.append(labels.cpu().numpy().astype(np.int64))
    with replacing(path) as partial, partial.open("wb") as file:  # a name gets a suffix
        np.savez(file, *arrays)


def _check_images(images: Any) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) == 0:
        raise InputError(
            "Images must be uint8 of shape (N, C, H, W) with N >= 1, got "
            f"{images.dtype} {tuple(images.shape)}; to_uint8 converts them."
        )
