"""The Frechet distance, and the torchmetrics metric that measures it over all processes."""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from scipy.linalg import lapack
from torch import Tensor, distributed
from torchmetrics.image.fid import FrechetInceptionDistance

from cm_lightning.evaluation.features import FeatureExtractor
from cm_lightning.evaluation.reference import Statistics
from cm_lightning.types import InputError

__all__ = ["FrechetDistance", "frechet_distance"]


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    r"""Squared Frechet distance of two normal distributions (Heusel et al., arXiv:1706.08500).

    .. math::
        |\mu_1 - \mu_2|^2 + \mathrm{Tr}\,(\Sigma_1 + \Sigma_2 - 2 (\Sigma_1 \Sigma_2)^{1/2})

    The trace of the root is that of :math:`(F^\top \Sigma_2 F)^{1/2}` for any
    :math:`F F^\top = \Sigma_1`, a symmetric matrix. F is the Cholesky factor, with pivots and as
    many columns as the rank where that is not full. Computed in float64.

    Args:
        mu1: Mean :math:`\mu_1`, shape ``(D,)``.
        sigma1: Covariance :math:`\Sigma_1`, shape ``(D, D)``.
        mu2: Mean :math:`\mu_2`, shape ``(D,)``.
        sigma2: Covariance :math:`\Sigma_2`, shape ``(D, D)``.

    Returns:
        The distance, >= 0.

    Raises:
        InputError: If shapes do not match, a value is not finite, or a matrix is no covariance.
    """
    _check(mu1, sigma1, len(mu2))
    _check(mu2, sigma2, len(mu1))
    mu1, sigma1, mu2, sigma2 = (value.double() for value in (mu1, sigma1, mu2, sigma2))
    factor = _factor(sigma1)
    product = factor.T @ sigma2 @ factor
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * cross
    return max(float(distance), 0.0)


def _factor(sigma: Tensor) -> Tensor:
    r"""F with :math:`F F^\top` a covariance ``(D, D)``; ``(D, rank)``."""
    factor, failed = torch.linalg.cholesky_ex(sigma)
    if not bool(failed):
        return cast("Tensor", factor)
    lower, pivots, rank, _ = lapack.dpstrf(sigma.cpu().numpy(), lower=1)
    columns = np.empty((len(lower), rank))
    columns[pivots - 1] = np.tril(lower)[:, :rank]
    return torch.from_numpy(columns).to(sigma.device)


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance between real and generated images, reduced over all processes.

    Use as any metric of torchmetrics: ``update(images, real=...)`` with uint8 images
    ``(B, C, H, W)``, then ``compute()``. :meth:`reset` forgets the generated images alone.

    Args:
        features: Feature extractor.
    """

    def __init__(self, features: FeatureExtractor) -> None:
        super().__init__(
            feature=features.load(), reset_real_features=False, normalize=False, antialias=False
        )

    def prime(self, mu: Tensor, sigma: Tensor, n: int) -> None:
        """Set the real side from statistics, as if ``n`` real images had been seen.

        All processes call it with the same statistics.

        Args:
            mu: Mean of the real features, ``(D,)``.
            sigma: Covariance of the real features, ``(D, D)``.
            n: Number of real images, >= 2; the distance does not depend on it.

        Raises:
            InputError: If the shapes are not those of the features or a value is not finite.
        """
        device = self.real_features_sum.device
        _check(mu, sigma, len(self.real_features_sum))
        if n < 2:
            raise InputError(f"Statistics of real images need n of 2 or more, got {n}.")
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            n, mu, sigma = 0, torch.zeros_like(mu), torch.zeros_like(sigma)
        mu, sigma = mu.to(device, torch.float64), sigma.to(device, torch.float64)
        self.real_features_sum = n * mu
        self.real_features_cov_sum = (n - 1) * sigma + n * torch.outer(mu, mu)
        self.real_features_num_samples = torch.tensor(n, device=device)
        self._computed = None

    def statistics(self) -> Statistics:
        """Statistics of the real side over all processes; all of them must call it.

        Raises:
            InputError: If fewer than two real images were seen.
        """
        with self.sync_context(dist_sync_fn=self.dist_sync_fn):
            return self._side("real")

    def compute(self) -> Tensor:
        """Distance between all real and generated images seen so far, a float64 scalar.

        Raises:
            InputError: If fewer than two real or two generated images were seen.
        """
        real, fake = self._side("real"), self._side("fake")
        value = frechet_distance(real.mu, real.sigma, fake.mu, fake.sigma)
        return torch.tensor(value, dtype=torch.float64, device=real.mu.device)

    def set_dtype(self, dst_type: str | torch.dtype) -> FrechetDistance:
        """Do nothing: sums and weights keep their precision, or the distance would be wrong."""
        return self

    def _side(self, side: str) -> Statistics:
        n = int(getattr(self, f"{side}_features_num_samples"))
        if n < 2:
            kind = "real" if side == "real" else "generated"
            raise InputError(f"A Frechet distance needs at least 2 {kind} images, got {n}.")
        return Statistics.from_sums(
            getattr(self, f"{side}_features_sum"), getattr(self, f"{side}_features_cov_sum"), n
        )


def _check(mu: Tensor, sigma: Tensor, d: int) -> None:
    if mu.shape != (d,) or sigma.shape != (d, d):
        raise InputError(
            f"Statistics of {d} features need a mean of shape ({d},) and a covariance of shape "
            f"({d}, {d}), got {tuple(mu.shape)} and {tuple(sigma.shape)}."
        )
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise InputError("Statistics of features must be finite, got NaN or infinite values.")
    # features that are all alike leave rounding alone
    slack = 1e-6 * float(sigma.abs().max()) + 1e-10 * (1 + float(mu.square().max()))
    if float(sigma.diagonal().min()) < -slack or float((sigma - sigma.T).abs().max()) > slack:
        raise InputError("A covariance of features must be symmetric, with variances of 0 or more.")
