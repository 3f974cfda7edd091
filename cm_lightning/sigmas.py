"""Grids of noise levels shared by training and sampling."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from cm_lightning.transfer import constant
from cm_lightning.types import InputError

__all__ = ["LARGEST", "SMALLEST", "check_edges", "karras_sigmas", "phase_edges", "segments"]

SMALLEST, LARGEST = 1e-12, 1e12
"""Noise levels whose squares fp32 holds."""


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
        sigma_min: Last level, >= 1e-12.
        sigma_max: First level, > sigma_min, <= 1e12.
        rho: Curvature, > 0.
        device: Where to make it.

    Returns:
        float64 tensor ``(n,)``; both ends are exact, free of the formula's rounding.

    Raises:
        InputError: If an argument is outside its range.
    """
    if n < 2:
        raise InputError(f"a Karras grid needs at least 2 levels, got {n}.")
    if not SMALLEST <= sigma_min < sigma_max <= LARGEST:
        raise InputError(
            f"noise levels need {SMALLEST:g} <= sigma_min < sigma_max <= {LARGEST:g}, got "
            f"{sigma_min:g} and {sigma_max:g}."
        )
    if not rho > 0:
        raise InputError(f"rho must be positive, got {rho}.")
    ramp = torch.arange(n, dtype=torch.float64, device=device) / (n - 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    grid: Tensor = (high + ramp * (low - high)) ** rho
    # slices: a number for a single element would be copied, and wait for a GPU
    grid[:1], grid[-1:] = sigma_max, sigma_min
    return grid


def phase_edges(phases: int) -> tuple[float, ...]:
    """Edges of ``phases`` segments of the noise axis up to 80: a Karras grid with 0 as its lowest.

    SCT's own edges are not recoverable from what is public (arXiv:2410.18958); 2 phases meet at
    2.515, 4 at 0.170, 2.515 and 17.53.

    Args:
        phases: Number of segments, 1 to 100.

    Returns:
        ``phases + 1`` increasing numbers from 0 to 80.

    Raises:
        InputError: If ``phases`` is outside its range.
    """
    if not 1 <= phases <= 100:
        raise InputError(f"phases must be 1 to 100, got {phases}.")
    levels = karras_sigmas(phases + 1).flip(0).tolist()
    return (0.0, *levels[1:])


_ABOVE = 1e-4
"""A level up to this much (relatively) above an edge counts to the segment below: sampling asks the
model exactly at edges, and t minus the edge would vanish in fp32."""


def segments(sigma: Tensor, edges: Sequence[float]) -> Tensor:
    """Index m of the segment (e_m, e_{m+1}] of each level; levels outside go to the end segments.

    Args:
        sigma: Noise levels, ``(B,)``.
        edges: Increasing edges, two or more.

    Returns:
        ``(B,)`` int64.
    """
    inner = constant(tuple(edges[1:-1]), torch.float64, sigma.device)
    return torch.bucketize(sigma.double() / (1 + _ABOVE), inner)


def check_edges(edges: Sequence[float]) -> None:
    """Check edges of phases.

    Raises:
        InputError: If they do not start at 0 and increase.
    """
    text = ", ".join(f"{edge:g}" for edge in edges)
    if len(edges) < 2 or edges[0] != 0:
        raise InputError(f"edges must start at 0 and have at least one more, got {text}.")
    if not all(low < high <= LARGEST for low, high in pairwise(edges)):
        raise InputError(f"edges must increase and be {LARGEST:g} at most, got {text}.")
