r"""Estimates of the posterior mean :math:`E[x_0 \mid x_t]`, in which regimes differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_lightning.types import Batch, Denoiser

__all__ = ["PosteriorMean", "SampleMean", "TeacherMean"]


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


@dataclass(frozen=True)
class TeacherMean(PosteriorMean):
    r"""A pretrained diffusion model's estimate, optionally guided (CD).

    .. math:: D_w(x, t, c) = D(x, t) + w\,\bigl(D(x, t, c) - D(x, t)\bigr)

    With w = 1 it is :math:`D(x, t, c)` itself, one call instead of two. LCM's and Meng et al.'s
    w is this one minus 1.

    Args:
        teacher: The diffusion model, called as it is (in eval mode) and without gradient.
        guidance: Guidance scale w, >= 0.
    """

    teacher: Denoiser
    guidance: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Denoise with the labels of the batch."""
        sigma = t.to(x_t.dtype)
        with torch.no_grad():
            mean: Tensor = self.teacher(x_t, sigma, batch.labels)
            if self.guidance != 1:
                assert batch.labels is not None
                free = self.teacher(x_t, sigma, torch.full_like(batch.labels, -1))
                mean = free + self.guidance * (mean - free)
        return mean
