r"""One step of the probability-flow ODE :math:`dx/dt = (x - E[x_0 \mid x_t]) / t` from t to r."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_lightning.objective.phases import jump
from cm_lightning.objective.posterior import PosteriorMean
from cm_lightning.types import Batch, expand

__all__ = ["Euler", "Heun", "Solver"]


class Solver(ABC):
    """One ODE step from t down to r."""

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """Step.

        Args:
            x_t: Noisy images at level t, ``(B, C, H, W)``.
            t: Larger levels, ``(B,)``.
            r: Smaller levels, ``(B,)``, ``0 <= r < t``.
            batch: The batch whose ``x0`` made ``x_t``.

        Returns:
            Images at level r, ``(B, C, H, W)``.
        """


@dataclass(frozen=True)
class Euler(Solver):
    r"""Euler (equivalently DDIM) step.

    .. math:: x_r = \bar x + \tfrac{r}{t}(x_t - \bar x), \qquad \bar x \approx E[x_0 \mid x_t]

    Error per step :math:`O((t-r)^2)`. With :class:`~cm_lightning.objective.SampleMean` it is
    :math:`x_0 + r z` with the same noise. At r = 0 it is the posterior mean itself.

    Args:
        posterior: Estimate of the posterior mean.
    """

    posterior: PosteriorMean

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """Step from t to r."""
        return jump(self.posterior(x_t, t, batch), x_t, t, r)


@dataclass(frozen=True)
class Heun(Solver):
    r"""Heun step: the average of the slopes at both ends of an Euler step.

    .. math:: d = \frac{x_t - \bar x(x_t, t)}{t}, \quad x' = x_t + (r - t)\,d, \quad
              d' = \frac{x' - \bar x(x', r)}{r}, \quad x_r = x_t + (r - t)\,\frac{d + d'}{2}

    Error per step :math:`O((t-r)^3)`, two estimates of the posterior mean (CD, arXiv:2303.01469).
    Where r = 0 the second slope does not exist and the step is Euler's. Rows that the first
    estimate leaves at their own image by its skip rule get the second one like all others: the rule
    is about :math:`x_0 + t z` and does not hold for :math:`x'`.

    Args:
        posterior: Estimate of the posterior mean.
    """

    posterior: PosteriorMean

    def __call__(self, x_t: Tensor, t: Tensor, r: Tensor, batch: Batch) -> Tensor:
        """Step from t to r."""
        at_zero = r == 0
        safe_r = torch.where(at_zero, t, r)
        step = expand(r - t, x_t)
        slope = (x_t - self.posterior(x_t, t, batch)) / expand(t, x_t)
        euler = x_t + step * slope
        batch = batch._replace(notes=None)
        if batch.references is not None:
            batch = batch._replace(references=batch.references._replace(nearest=None))
        second = (euler - self.posterior(euler, safe_r, batch)) / expand(safe_r, x_t)
        return torch.where(expand(at_zero, x_t), euler, x_t + step * (slope + second) / 2)
