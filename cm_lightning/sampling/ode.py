r"""Deterministic samplers of the probability-flow ODE for diffusion models."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cm_lightning.types import Denoiser, InputError

__all__ = ["heun", "karras_sigmas"]


def karras_sigmas(
    n: int, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    r"""Karras grid of ``n`` decreasing noise levels (arXiv:2206.00364, Eq. 5).

    .. math:: \sigma_i = \bigl(\sigma_\text{max}^{1/\rho} + \tfrac{i}{n-1}
              (\sigma_\text{min}^{1/\rho} - \sigma_\text{max}^{1/\rho})\bigr)^\rho

    Args:
        n: Number of levels, >= 2.
        sigma_min: Last level, > 0.
        sigma_max: First level, > sigma_min.
        rho: Curvature, > 0.

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
    ramp = torch.arange(n, dtype=torch.float64) / (n - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid: Tensor = (high + ramp * (low - high)) ** rho
    grid[0], grid[-1] = sigma_max, sigma_min
    return grid


@torch.no_grad()
def heun(denoiser: Denoiser, noise: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Deterministic second-order sampler (arXiv:2206.00364, Algorithm 1), 2N - 1 network calls.

    The state is float64; the last step, to noise level 0, is an Euler step.

    Args:
        denoiser: A diffusion model.
        noise: Unit noise ``(B, C, H, W)``.
        sigmas: N decreasing levels > 0, see :func:`karras_sigmas`; 0 is appended.
        labels: Class indices ``(B,)`` or ``None``.

    Returns:
        Images ``(B, C, H, W)`` in the dtype of the noise.
    """

    def slope(x: Tensor, sigma: Tensor) -> Tensor:
        level = torch.full((len(x),), float(sigma), device=x.device, dtype=noise.dtype)
        clean: Tensor = denoiser(x.to(noise.dtype), level, labels)
        return (x - clean.double()) / sigma

    grid = torch.cat([sigmas.double().cpu(), torch.zeros(1, dtype=torch.float64)])
    x = noise.double() * grid[0]
    for here, there in pairwise(grid):
        d = slope(x, here)
        euler = x + (there - here) * d
        x = euler if there == 0 else x + (there - here) * (d + slope(euler, there)) / 2
    return x.to(noise.dtype)
