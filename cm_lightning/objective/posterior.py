r"""Estimates of the posterior mean :math:`E[x_0 \mid x_t]`, in which regimes differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from cm_lightning.types import Batch

__all__ = ["PosteriorMean", "SampleMean"]


class PosteriorMean(ABC):
    """An estimate of E[x0 | x_t]."""

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Estimate the mean.

        Args:
            x_t: Noisy images, ``(B, C, H, W)``.
            t: Their noise levels, ``(B,)``.
            batch: The batch whose ``x0`` made ``x_t``.

        Returns:
            Estimate, ``(B, C, H, W)``.
        """


@dataclass(frozen=True)
class SampleMean(PosteriorMean):
    """The one image that made x_t: unbiased, with the largest variance (CT, iCT, ECT)."""

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Return ``batch.x0``."""
        return batch.x0
