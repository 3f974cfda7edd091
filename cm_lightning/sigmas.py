"""The grid of noise levels shared by training and sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from cm_lightning.types import InputError

__all__ = ["karras_sigmas"]


def karras_sigmas(
    n: int,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    device: torch.device | None = None,
) -> Tensor:
    r"""Karras grid of ``n`` decreasing noise levels (arXiv:2206.00364, Eq. 5).

    .. math:: \sigma_i = \bigl(\sigma_\text{max}^{1/\rho} + \tfrac{i}{n-1}
              (\sigma_\text{min}^{1/\rho} - \sigma_\text{max}^{1/\rho})\bigr)^\rho

    Args:
        n: Number of levels, >= 2.
        sigma_min: Last level, > 0.
        sigma_max: First level, > sigma_min.
        rho: Curvature, > 0.
        device: Where to make it.

    Returns:
        float64 tensor ``(n,)``; both ends are exact, free of the formula's rounding.

    Raises:
        InputError: If an argument is outside its range.
    """
    if n < 2:
        raise InputError(f"a Karras grid needs at least 2 levels, got {n}.")
    if not 0 < sigma_min < sigma_max:
        raise InputError(
            f"noise levels need 0 < sigma_min < sigma_max, got {sigma_min:g} and {sigma_max:g}."
        )
    if not rho > 0:
        raise InputError(f"rho must be positive, got {rho}.")
    ramp = torch.arange(n, dtype=torch.float64, device=device) / (n - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid: Tensor = (high + ramp * (low - high)) ** rho
    grid[0], grid[-1] = sigma_max, sigma_min
    return grid
