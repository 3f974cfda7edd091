r"""Averages of the weights along training, as pure functions of the number of images seen.

A profile says how much of the old average survives one optimizer step,
:math:`\bar\theta \leftarrow \beta \bar\theta + (1 - \beta)\,\theta`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cm_lightning.types import InputError

__all__ = [
    "ConstantEMA",
    "EMAProfile",
    "HalfLifeEMA",
    "PowerEMA",
    "WarmupEMA",
    "posthoc_coefficients",
    "power_exponent",
    "snapshot_nimg",
    "snapshot_of",
    "update_average",
]


class EMAProfile(ABC):
    """One way to average weights over training."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name used in logs, files and on the command line, such as ``ema_0.9999``."""

    @abstractmethod
    def beta(self, nimg: int, batch: int) -> float:
        """Share of the old average that survives the step.

        Args:
            nimg: Images seen *before* the optimizer step.
            batch: Images in the step's global batch.

        Returns:
            A number in [0, 1).
        """


@dataclass(frozen=True)
class ConstantEMA(EMAProfile):
    r"""Constant rate :math:`\beta` per optimizer step, as published for CM, iCT and ECT.

    Its half-life is :math:`\ln 2 / (1 - \beta)` steps: 0.9993 is 990 steps, 0.9999 is 6,931.

    Args:
        rate: :math:`\beta` in [0, 1).

    Raises:
        InputError: If the rate is outside [0, 1).
    """

    rate: float = 0.9999

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise InputError(f"ConstantEMA: rate must lie in [0, 1), got {self.rate}.")

    @property
    def name(self) -> str:
        """``ema_`` and the rate."""
        return f"ema_{self.rate:g}" if self.rate < 0.99999 else f"ema_{self.rate!r}"

    def beta(self, nimg: int, batch: int) -> float:
        """The rate."""
        return self.rate


@dataclass(frozen=True)
class HalfLifeEMA(EMAProfile):
    r"""Half-life in images with a ramp-up, as in EDM (arXiv:2206.00364).

    .. math:: \beta = 0.5^{B / \max(h, 10^{-8})}, \qquad h = \min(H, \rho \cdot \text{nimg})

    with B images per step and nimg counted before the step; the first step copies the weights.

    Args:
        kimg: Half-life H in thousands of images, > 0. EDM CIFAR-10: 500, ImageNet-64: 50,000.
        rampup_ratio: :math:`\rho` > 0, or ``None`` for no ramp-up.

    Raises:
        InputError: If an argument is not positive.
    """

    kimg: float = 500.0
    rampup_ratio: float | None = 0.05

    def __post_init__(self) -> None:
        if not self.kimg > 0:
            raise InputError(f"HalfLifeEMA: kimg must be positive, got {self.kimg}.")
        if self.rampup_ratio is not None and not self.rampup_ratio > 0:
            raise InputError(
                f"HalfLifeEMA: rampup_ratio must be positive or null, got {self.rampup_ratio}."
            )

    @property
    def name(self) -> str:
        """``ema_halflife`` and the half-life, such as ``ema_halflife500k``."""
        return f"ema_halflife{self.kimg:g}k"

    def beta(self, nimg: int, batch: int) -> float:
        """Share that survives; 0 at nimg = 0 when there is a ramp-up."""
        halflife = self.kimg * 1000
        if self.rampup_ratio is not None:
            halflife = min(halflife, nimg * self.rampup_ratio)
        return float(0.5 ** (batch / max(halflife, 1e-8)))


@dataclass(frozen=True)
class PowerEMA(EMAProfile):
    r"""Power-function profile of EDM2 (Karras et al. 2024, arXiv:2312.02696, Eq. 127).

    .. math:: \beta = (1 - B / \text{nimg}')^{\gamma + 1}

    with nimg' counted after the step and :math:`\gamma` from the relative width
    :math:`\sigma_\text{rel}`, see :func:`power_exponent`. The first step copies the weights.

    Args:
        std: Relative width in (0, 0.289). EDM2 tracks 0.05 and 0.10.

    Raises:
        InputError: If ``std`` is outside its range.
    """

    std: float = 0.05

    def __post_init__(self) -> None:
        power_exponent(self.std)

    @property
    def name(self) -> str:
        """``ema_std`` and the width with three decimals or more, such as ``ema_std0.050``."""
        rounded = f"{self.std:.3f}"
        return f"ema_std{rounded if float(rounded) == self.std else repr(self.std)}"

    def beta(self, nimg: int, batch: int) -> float:
        """Share that survives; 0 at nimg = 0."""
        return float((1 - batch / (nimg + batch)) ** (power_exponent(self.std) + 1))


@dataclass(frozen=True)
class WarmupEMA(EMAProfile):
    r"""Constant rate with a warm-up that forgets the first weights.

    .. math:: \beta = \min\bigl(\beta_\infty,\; 1 - (1 + k)^{-p}\bigr)^{1 / e}, \qquad
              k = \frac{\text{nimg}}{B}

    with B images per step: the average that predicts GC's endpoints in its official code
    (package ema-pytorch), which updates every e = 5 steps; here every step does a fifth of it.

    Args:
        rate: :math:`\beta_\infty` in [0, 1), per e steps.
        power: p > 0.
        every: e >= 1.

    Raises:
        InputError: If an argument is outside its range.
    """

    rate: float = 0.9999
    power: float = 2 / 3
    every: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.rate < 1:
            raise InputError(f"WarmupEMA: rate must lie in [0, 1), got {self.rate}.")
        if not self.power > 0:
            raise InputError(f"WarmupEMA: power must be positive, got {self.power}.")
        if self.every < 1:
            raise InputError(f"WarmupEMA: every must be 1 or more, got {self.every}.")

    @property
    def name(self) -> str:
        """``ema_warmup`` and the rate."""
        return f"ema_warmup{self.rate:g}"

    def beta(self, nimg: int, batch: int) -> float:
        """Share that survives; 0 at nimg = 0."""
        decay = min(self.rate, 1 - (1 + nimg / batch) ** -self.power)
        return float(decay ** (1 / self.every))


def power_exponent(std: float) -> float:
    r"""Exponent of the power-function profile with relative width ``std`` (EDM2, Algorithm 2).

    The largest real root of
    :math:`\gamma^3 + 7\gamma^2 + (16 - \sigma^{-2})\gamma + (12 - \sigma^{-2}) = 0`.

    Args:
        std: Relative width in (0, 0.289).

    Raises:
        InputError: If ``std`` is outside its range.
    """
    if not 0 < std < 0.289:
        raise InputError(f"PowerEMA: std must lie between 0 and 0.289, got {std}.")
    inverse = std**-2
    roots = np.roots([1, 7, 16 - inverse, 12 - inverse])
    return float(roots[np.abs(roots.imag) < 1e-9].real.max())


def posthoc_coefficients(
    snapshots: Sequence[tuple[float, float]], target: tuple[float, float]
) -> np.ndarray:
    r"""Weights with which stored power-function averages combine into another profile.

    Least squares over profiles (EDM2, arXiv:2312.02696, Algorithm 3): :math:`A X = B` with the
    inner products :math:`A_{ij} = \langle p_i, p_j \rangle`,
    :math:`B_i = \langle p_i, p_\text{target} \rangle`,

    .. math:: \langle p_i, p_j \rangle = \frac{(\gamma_i + 1)(\gamma_j + 1)\,
              (t_i / t_j)^{e}}{(\gamma_i + \gamma_j + 1) \max(t_i, t_j)}, \qquad
              e = \gamma_j \text{ if } t_i < t_j \text{ else } -\gamma_i

    normalised to sum 1; the new average is :math:`\sum_i X_i\, \text{snapshot}_i`.

    Args:
        snapshots: ``(time, gamma)`` of each stored average, time in images (any unit).
        target: ``(time, gamma)`` of the wanted average.

    Returns:
        One weight per snapshot, float64, summing to 1.
    """

    def products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        (t_a, g_a), (t_b, g_b) = a.T[:, :, None], b.T[:, None, :]
        exponent = np.where(t_a < t_b, g_b, -g_a)
        ratio = (g_a + 1) * (g_b + 1) * (t_a / t_b) ** exponent
        return np.asarray(ratio / ((g_a + g_b + 1) * np.maximum(t_a, t_b)))

    stored, wanted = np.array(snapshots, np.float64), np.array([target], np.float64)
    weights = np.linalg.solve(products(stored, stored), products(stored, wanted))[:, 0]
    return np.asarray(weights / weights.sum())


def update_average(average: Sequence[Tensor], weights: Sequence[Tensor], beta: float) -> None:
    """Move an average towards the weights, in place: ``beta * average + (1 - beta) * weights``.

    Args:
        average: Tensors, one per parameter, in the precision of the average.
        weights: The parameters, in the same order, shapes and device.
        beta: Share of the average that survives, in [0, 1). 0 copies exactly.
    """
    with torch.no_grad():
        if beta == 0:
            torch._foreach_copy_(list(average), list(weights))
        else:
            same = [w.to(a.dtype) for a, w in zip(average, weights, strict=True)]
            torch._foreach_lerp_(list(average), same, 1 - beta)


def snapshot_of(name: str) -> str | None:
    """Profile of a snapshot's name ``<profile>@<share>``, ``None`` if it is no such name."""
    profile, _, share = name.rpartition("@")
    try:
        return profile if 0 < float(share) < 1 and f"{float(share):g}" == share else None
    except ValueError:
        return None


def snapshot_nimg(name: str, total_nimg: int, batch: int) -> int | None:
    """Images seen by the average of a snapshot.

    Args:
        name: Its name, ``<profile>@<share>``.
        total_nimg: Length of the run in images.
        batch: Images per optimizer step.

    Returns:
        Images after the step that reached the share; ``None`` for the name of a profile.
    """
    if snapshot_of(name) is None:
        return None
    return math.ceil(float(name.rpartition("@")[2]) * total_nimg / batch) * batch
