r"""Distances between two batches of images, one number per image, ``(B,)``.

Those of pixels are taken over the **whole** image (channels and pixels), summed unless told
otherwise, and computed in fp32 or better.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_lightning.types import InputError

__all__ = ["L1", "L2", "Distance", "PseudoHuber", "SquaredL2"]


def _squared_norm(a: Tensor, b: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.float32, a.dtype)
    return (a.to(dtype) - b.to(dtype)).square().flatten(1).sum(1)


class Distance(ABC):
    """Distance between images, one number per image."""

    def prepare(self, image_shape: tuple[int, int, int] | None) -> None:  # noqa: B027
        """Check images of shape ``(C, H, W)`` and read what is needed, before training starts.

        Raises:
            InputError: If the distance does not suit such images, or something is missing.
        """

    @abstractmethod
    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Distance of ``a`` and ``b``, both ``(B, C, H, W)``; returns ``(B,)``, >= 0."""


@dataclass(frozen=True)
class SquaredL2(Distance):
    r"""Squared Euclidean distance :math:`\lVert a - b \rVert_2^2`.

    Args:
        mean: Divide by the number of values per image, as OpenAI's CD and CT code does ("l2"). It
            matters for RAdam's first five steps, which follow the gradient's size.
    """

    mean: bool = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum (or mean) of squared differences, ``(B,)``."""
        squared = _squared_norm(a, b)
        return squared / a[0].numel() if self.mean else squared


@dataclass(frozen=True)
class L1(Distance):
    r"""Sum of absolute differences :math:`\lVert a - b \rVert_1`.

    Args:
        mean: Divide by the number of values per image, as OpenAI's CD and CT code does ("l1").
    """

    mean: bool = False

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum (or mean) of absolute differences, ``(B,)``."""
        dtype = torch.promote_types(torch.float32, a.dtype)
        total = (a.to(dtype) - b.to(dtype)).abs().flatten(1).sum(1)
        return total / a[0].numel() if self.mean else total


@dataclass(frozen=True)
class L2(Distance):
    r"""Euclidean distance :math:`\lVert a - b \rVert_2`, not squared: ECT's metric with c = 0.

    The gradient at ``a == b`` is set to 0 (the root alone would give NaN there; the official ECT
    code zeroes the whole batch's gradient in that case).
    """

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Euclidean norm of the difference, ``(B,)``."""
        squared = _squared_norm(a, b)
        zero = squared == 0
        return torch.where(zero, 0, torch.where(zero, 1, squared).sqrt())


@dataclass(frozen=True)
class PseudoHuber(Distance):
    r"""Pseudo-Huber distance :math:`\sqrt{\lVert a - b \rVert_2^2 + c^2} - c` over the whole image.

    Song and Dhariwal 2023 (iCT), arXiv:2310.14189. Evaluated as :math:`S / (\sqrt{S + c^2} + c)`,
    the same number without cancellation.

    Args:
        c: Width of the quadratic region, > 0, in units of the image norm; or ``"ict"`` for iCT's
            rule :math:`c = 0.00054 \sqrt{D}` with D numbers per image (0.0299 for 3x32x32). ECT on
            ImageNet-64 uses 0.06. For c = 0 use :class:`L2`.

    Raises:
        InputError: If ``c`` is a number that is not positive, or another word.
    """

    c: float | str = "ict"

    def __post_init__(self) -> None:
        if isinstance(self.c, str) and self.c != "ict":
            raise InputError(f"PseudoHuber: c must be a positive number or 'ict', got '{self.c}'.")
        if not isinstance(self.c, str) and not self.c > 0:
            raise InputError(f"PseudoHuber: c must be positive, got {self.c} (use L2 for c = 0).")

    def width(self, dimension: int) -> float:
        """Value of c for images of ``dimension`` numbers."""
        return 0.00054 * math.sqrt(dimension) if isinstance(self.c, str) else self.c

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Pseudo-Huber distance, ``(B,)``."""
        c = self.width(a[0].numel())
        squared = _squared_norm(a, b)
        return squared / ((squared + c * c).sqrt() + c)
