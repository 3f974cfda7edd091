"""Laws of the pair (x0, z) of image and noise.

A coupling is deterministic: whatever it needs to choose at random arrives as ``u``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cm_lightning.types import Batch

__all__ = ["Coupled", "Coupling", "Denoise", "Independent"]

Denoise = Callable[[Tensor, Tensor], Tensor]
"""``(x (B, C, H, W), sigma (B,)) -> endpoint (B, C, H, W)``, without gradient."""


class Coupled(NamedTuple):
    """A coupled pair.

    Attributes:
        x0: Clean endpoint, ``(B, C, H, W)``.
        z: Unit noise, ``(B, C, H, W)``.
        generated: ``(B,)`` bool, true where ``x0`` was predicted by a network rather than taken
            from the data; such rows have no reference posterior.
    """

    x0: Tensor
    z: Tensor
    generated: Tensor


class Coupling(ABC):
    """Joint law of image and noise."""

    @abstractmethod
    def __call__(self, batch: Batch, z: Tensor, u: Tensor, r: Tensor, denoise: Denoise) -> Coupled:
        """Couple the images of a batch with noise.

        Args:
            batch: Images and labels.
            z: Unit noise, ``(B, C, H, W)``.
            u: Uniform numbers in [0, 1), ``(B,)``, drawn by the caller.
            r: Smaller noise levels, ``(B,)``.
            denoise: The model's endpoint prediction.
        """


@dataclass(frozen=True)
class Independent(Coupling):
    """Image and noise are independent: the pair is returned as it came."""

    def __call__(self, batch: Batch, z: Tensor, u: Tensor, r: Tensor, denoise: Denoise) -> Coupled:
        """Return ``(x0, z)`` unchanged; no row is generated."""
        return Coupled(batch.x0, z, torch.zeros_like(u, dtype=torch.bool))
