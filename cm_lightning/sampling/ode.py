r"""Deterministic samplers of the probability-flow ODE for diffusion models."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from cm_lightning.types import Denoiser

__all__ = ["heun"]


@torch.no_grad()
def heun(denoiser: Denoiser, noise: Tensor, sigmas: Tensor, labels: Tensor | None = None) -> Tensor:
    r"""Deterministic second-order sampler (arXiv:2206.00364, Algorithm 1), 2N - 1 network calls.

    The state is float64; the last step, to noise level 0, is an Euler step.

    Args:
        denoiser: A diffusion model.
        noise: Unit noise ``(B, C, H, W)``.
        sigmas: N decreasing levels > 0, see :func:`~cm_lightning.sigmas.karras_sigmas`; 0 is
            appended.
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
