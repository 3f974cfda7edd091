r"""Phases: the noise axis in segments, each with its own end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cm_lightning.sigmas import check_edges, segments
from cm_lightning.transfer import constant
from cm_lightning.types import expand

__all__ = ["Phases", "jump"]


def jump(denoised: Tensor, x: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    r"""Carry noisy images to another level along the line to their endpoint (DDIM).

    .. math:: F(x, \sigma, s) = D + \tfrac{s}{\sigma}(x - D)

    Args:
        denoised: :math:`D(x, \sigma)`, ``(B, C, H, W)``.
        x: Noisy images, ``(B, C, H, W)``.
        sigma: Their levels > 0, ``(B,)``.
        end: Levels to reach, ``(B,)``, ``0 <= s <= sigma``.
    """
    return denoised + expand(end / sigma, x) * (x - denoised)


@dataclass(frozen=True)
class Phases:
    r"""Segments of the noise axis: for t in :math:`(e_m, e_{m+1}]` the model goes to :math:`e_m`.

    .. math:: \mathcal L = E\bigl[w(t, r)\, d\bigl(F(x_t, t, s), \mathrm{sg}\, F(x_r, r, s)
              \bigr)\bigr], \qquad s = e_m, \quad r \leftarrow \max(r, s)

    with F of :func:`jump`; where r = s the target is :math:`x_r`. The network is not told s. One
    segment is training without phases. (arXiv:2410.18958, with the mechanism of phased consistency
    models; edges as in :func:`~cm_lightning.sigmas.phase_edges`.)

    Args:
        edges: Increasing levels from 0 to the largest level of sampling.
        normalize: Divide the difference of the two ends by :math:`1 - s/t`, the factor with which
            the network's error enters it. Next to an edge that is large: with a weighting that
            contains 1/(t - r), and with it this factor, single rows become all of the gradient.
        uniform: Draw every segment equally often and t within it; otherwise t keeps its law, under
            which four segments get 37, 48, 13 and 2 % of the pairs.

    Raises:
        InputError: If the edges do not start at 0 and increase.
    """

    edges: Sequence[float]
    normalize: bool = False
    uniform: bool = False

    def __post_init__(self) -> None:
        check_edges(self.edges)

    def end(self, t: Tensor) -> Tensor:
        """Lower edge s of the segment of each level, ``(B,)`` float64."""
        edges = constant(tuple(self.edges), torch.float64, t.device)
        return edges[segments(t, self.edges)]
