"""Weights of the distance as functions of the noise levels, one number per image, ``(B,)``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cm_lightning.types import check_word

__all__ = ["EDM", "SNR", "COut", "InverseStep", "Uniform", "Weighting"]


class Weighting(ABC):
    """Weight of the distance at a pair of noise levels."""

    @abstractmethod
    def __call__(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Weight.

        Args:
            t: Larger levels, ``(B,)`` float64, > 0.
            r: Smaller levels, ``(B,)`` float64, ``0 <= r < t``.
            sigma_data: Standard deviation of the data.

        Returns:
            Weights, ``(B,)`` float64, > 0.
        """


@dataclass(frozen=True)
class Uniform(Weighting):
    """Weight 1 (CD, CT)."""

    def __call__(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Ones, ``(B,)``."""
        return torch.ones_like(t)


@dataclass(frozen=True)
class InverseStep(Weighting):
    """Weight :math:`1 / (t - r)` (iCT, arXiv:2310.14189; ECT on CIFAR-10)."""

    def __call__(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Inverse of the step, ``(B,)``."""
        return 1 / (t - r)


@dataclass(frozen=True)
class COut(Weighting):
    r"""Weight :math:`1 / c_\text{out}(t)^2 = 1/t^2 + 1/\sigma_d^2` (ECT on ImageNet-64)."""

    def __call__(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Inverse square of the output scaling, ``(B,)``."""
        return 1 / t.square() + 1 / sigma_data**2


@dataclass(frozen=True)
class EDM(COut):
    r"""EDM's loss weight :math:`\lambda(\sigma) = (\sigma^2 + \sigma_d^2)/(\sigma \sigma_d)^2`.

    Karras et al. 2022, arXiv:2206.00364, Table 1. The same function as :class:`COut`, under the
    name that diffusion training knows.
    """


@dataclass(frozen=True)
class SNR(Weighting):
    r"""Signal-to-noise weights of OpenAI's code, all of the larger level t.

    ``snr``: :math:`1/t^2`; ``snr+1``: :math:`1/t^2 + 1`; ``truncated-snr``:
    :math:`\max(1/t^2, 1)`. The code's signal-to-noise ratio leaves :math:`\sigma_d^2` out; its
    "karras" weight is :class:`COut`.

    Args:
        kind: ``"snr"``, ``"snr+1"`` or ``"truncated-snr"``.

    Raises:
        InputError: If it is another word.
    """

    kind: Literal["snr", "snr+1", "truncated-snr"] = "snr"

    def __post_init__(self) -> None:
        check_word("SNR: kind", self.kind, ("snr", "snr+1", "truncated-snr"))

    def __call__(self, t: Tensor, r: Tensor, sigma_data: float) -> Tensor:
        """Weight by the signal-to-noise ratio, ``(B,)``."""
        snr = 1 / t.square()
        if self.kind == "snr+1":
            return snr + 1
        return snr.clamp_min(1) if self.kind == "truncated-snr" else snr
