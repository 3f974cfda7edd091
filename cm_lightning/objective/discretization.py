r"""Laws of the noise-level pair :math:`(t, r)` with :math:`0 \le r < t`.

A discretization is a pure function of the number of images seen: it keeps no state, so a resumed
run, another batch size or another number of GPUs cannot change it. Levels are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_lightning.types import InputError

__all__ = ["Discretization", "ECTMapping", "LogNormal"]


@dataclass(frozen=True)
class LogNormal:
    r"""Law of a single noise level: :math:`\ln \sigma \sim N(p_\text{mean}, p_\text{std}^2)`.

    Karras et al. 2022, arXiv:2206.00364. Not truncated, as in the official EDM and ECT code.

    Args:
        p_mean: Mean of the logarithm.
        p_std: Standard deviation of the logarithm, > 0.

    Raises:
        InputError: If ``p_std`` is not positive.
    """

    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        if not self.p_std > 0:
            raise InputError(f"p_std must be positive, got {self.p_std}.")

    def sample(self, n: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """Draw ``n`` noise levels, float64, shape ``(n,)``."""
        normal = torch.randn(n, device=device, generator=generator, dtype=torch.float64)
        return (self.p_mean + self.p_std * normal).exp()


class Discretization(ABC):
    """Law of the pair (t, r) of noise levels that an objective compares."""

    @abstractmethod
    def sample(
        self, n: int, nimg: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs.

        Args:
            n: Number of pairs.
            nimg: Images seen so far, by all ranks.
            device: Where to draw.
            generator: Source of randomness on that device.

        Returns:
            ``(t, r)``, each ``(n,)`` float64, ``0 <= r < t``.
        """

    @abstractmethod
    def stage(self, nimg: int) -> int:
        """Index of the discretization stage after ``nimg`` images, from 0."""


@dataclass(frozen=True)
class ECTMapping(Discretization):
    r"""ECT's continuous pairs whose gap shrinks by a factor ``q`` per stage.

    .. math:: \ln t \sim N(p_\text{mean}, p_\text{std}^2), \qquad
              r = \max\bigl(0,\; t\,(1 - n(t)\, q^{-(s+1)})\bigr), \qquad
              n(t) = 1 + k\,\mathrm{sigmoid}(-b t)

    with stage :math:`s = \lfloor \text{nimg} / (1000\,\text{kimg\_per\_stage}) \rfloor`, at most
    ``stages - 1``. Geng et al. 2024 (ECT), arXiv:2406.14548. The official code starts a stage up to
    one batch later because it counts in ticks; stages here begin at exact multiples.

    Args:
        p_mean: Mean of ln t. CIFAR-10: -1.1, ImageNet-64: -0.8.
        p_std: Standard deviation of ln t. CIFAR-10: 2.0, ImageNet-64: 1.6.
        q: Shrinking factor per stage, > 1. CIFAR-10: 2, ImageNet-64: 4, one-hour recipe: 256.
        k: Height of the sigmoid, >= 0.
        b: Slope of the sigmoid, >= 0.
        kimg_per_stage: Length of a stage in thousands of images, > 0.
        stages: Number of stages, >= 1.

    Raises:
        InputError: If an argument is outside its range.
    """

    p_mean: float = -1.1
    p_std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    kimg_per_stage: float = 3200.0
    stages: int = 8

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("p_std", self.p_std > 0, "positive"),
            ("q", self.q > 1, "greater than 1"),
            ("k", self.k >= 0, "0 or more"),
            ("b", self.b >= 0, "0 or more"),
            ("kimg_per_stage", self.kimg_per_stage > 0, "positive"),
            ("stages", self.stages >= 1, "1 or more"),
        ):
            if not ok:
                raise InputError(
                    f"ECTMapping: {name} must be {allowed}, got {getattr(self, name)}."
                )

    def stage(self, nimg: int) -> int:
        """Index of the stage after ``nimg`` images."""
        return min(math.floor(nimg / (1000 * self.kimg_per_stage)), self.stages - 1)

    def r(self, t: Tensor, stage: int) -> Tensor:
        """Give the smaller level at a stage, same shape and dtype as ``t``."""
        n = 1 + self.k * torch.sigmoid(-self.b * t)
        return (t * (1 - n * self.q ** -(stage + 1))).clamp_min(0)

    def sample(
        self, n: int, nimg: int, device: torch.device, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs, each ``(n,)`` float64."""
        t = LogNormal(self.p_mean, self.p_std).sample(n, device, generator)
        return t, self.r(t, self.stage(nimg))
