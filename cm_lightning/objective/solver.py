r"""One step of the probability-flow ODE :math:`dx/dt = (x - E[x_0 \mid x_t]) / t` from t to r."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from cm_lightning.objective.posterior import PosteriorMean
from cm_lightning.types import Batch, expand

__all__ = ["Euler", "Solver"]


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
        mean = self.posterior(x_t, t, batch)
        return mean + expand(r / t, x_t) * (x_t - mean)
