r"""Deterministic samplers of the probability-flow ODE for diffusion models."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cm_lightning.sampling.consistency import check_labels, check_sigmas
from cm_lightning.types import Denoiser

__all__ = ["euler", "heun"]


@torch.no_grad()
def euler(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float] | Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Deterministic first-order sampler (DDIM in this parametrisation), N network calls.

    The state is float64. No gradient is kept.

    Args:
        denoiser: A diffusion model.
        noise: Unit noise ``(B, C, H, W)``.
        sigmas: N decreasing levels > 0; 0 is appended.
        labels: Class indices ``(B,)`` or ``None``.

    Returns:
        Images ``(B, C, H, W)`` in the dtype of the noise.

    Raises:
        InputError: If the levels are not positive and decreasing, or labels not the model's.
    """
    grid = [*check_sigmas(sigmas), 0.0]
    check_labels(denoiser, labels, len(noise))
    x = noise.double() * grid[0]
    for here, there in pairwise(grid):
        x = x + (there - here) * _slope(denoiser, x, here, labels, noise.dtype)
    return x.to(noise.dtype)


@torch.no_grad()
def heun(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float] | Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Deterministic second-order sampler (arXiv:2206.00364, Algorithm 1), 2N - 1 network calls.

    The state is float64; the last step, to noise level 0, is an Euler step. No gradient is kept.

    Args:
        denoiser: A diffusion model.
        noise: Unit noise ``(B, C, H, W)``.
        sigmas: N decreasing levels > 0, see :func:`~cm_lightning.sigmas.karras_sigmas`; 0 is
            appended.
        labels: Class indices ``(B,)`` or ``None``.

    Returns:
        Images ``(B, C, H, W)`` in the dtype of the noise.

    Raises:
        InputError: If the levels are not positive and decreasing, or labels not the model's.
    """
    grid = [*check_sigmas(sigmas), 0.0]
    check_labels(denoiser, labels, len(noise))

    def slope(x: Tensor, sigma: float) -> Tensor:
        return _slope(denoiser, x, sigma, labels, noise.dtype)

    x = noise.double() * grid[0]
    for here, there in pairwise(grid):
        d = slope(x, here)
        first = x + (there - here) * d
        x = first if there == 0 else x + (there - here) * (d + slope(first, there)) / 2
    return x.to(noise.dtype)


def _slope(
    denoiser: Denoiser, x: Tensor, sigma: float, labels: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """dx/dsigma of the probability-flow ODE, float64."""
    level = torch.full((len(x),), sigma, device=x.device, dtype=dtype)
    clean: Tensor = denoiser(x.to(dtype), level, labels)
    return (x - clean.double()) / sigma
