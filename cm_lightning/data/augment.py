"""EDM's non-leaky augmentation: geometric changes that the network is told of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cm_lightning.transfer import constant, may_pick
from cm_lightning.types import InputError

__all__ = ["EDMAugment"]

SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
"""Low-pass filter of the wavelet sym6; its even shifts are orthonormal."""

_SCALE, _TRANSLATE = 0.2, 0.125


@dataclass(frozen=True)
class EDMAugment:
    r"""Flips, scaling, rotation, stretching and translation, each with probability p per image.

    The network receives nine numbers that say what was done and are zero for an untouched image
    (Karras et al. 2022, arXiv:2206.00364, Appendix F.2, after arXiv:2006.06676), so it does not
    learn to make augmented images. In order, with :math:`w \sim N(0, 1)`:

    1. mirrored left to right by a fair coin, always; label 0 or 1;
    2. upside down by a coin; label 0 or 1;
    3. scaled by :math:`2^{0.2 w}`; label w;
    4. rotated by :math:`w \sim U(-\pi, \pi)`; labels :math:`\cos w - 1, \sin w`;
    5. stretched by :math:`2^{\pm 0.2 w}` along axes at the angle r, uniform in half of the cases,
       else 0; labels :math:`w \cos r, w \sin r`;
    6. moved by 0.125 of the width times two normal numbers, which are the labels.

    Images are reflected at their borders, enlarged twice by the wavelet sym6, sampled bilinearly
    and reduced by the same filter.

    Args:
        p: Probability of each change but the first, in [0, 1]. CIFAR-10: 0.12.

    Raises:
        InputError: If p is outside [0, 1].
    """

    p: float = 0.12

    uniforms = 9
    normals = 4
    labels = 9

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError(f"EDMAugment: p must lie in [0, 1], got {self.p}.")

    def __call__(self, images: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Augment.

        Args:
            images: ``(B, C, H, H)``, H >= 2.
            u: Uniform numbers in [0, 1), ``(B, 9)``.
            w: Normal numbers, ``(B, 4)``.

        Returns:
            Images, and labels ``(B, 9)``.
        """
        with torch.autocast(images.device.type, enabled=False):  # positions need fp32
            return self._augment(images, u, w)

    def _augment(self, images: Tensor, u: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        mirror = (u[:, 0] < 0.5).to(w)
        upside = ((u[:, 1] < self.p) & (u[:, 2] < 0.5)).to(w)
        scale = w[:, 0] * (u[:, 3] < self.p)
        angle = (2 * u[:, 5].to(w) - 1) * math.pi * (u[:, 4] < self.p)
        stretch = w[:, 1] * (u[:, 6] < self.p)
        # a number below one half decides that the axes turn, its place below by how much
        axis = (4 * u[:, 7].to(w) - 1) * math.pi * (u[:, 7] < 0.5)
        shift = w[:, 2:4] * (u[:, 8] < self.p)[:, None]
        images = torch.where(mirror[:, None, None, None] > 0, images.flip(3), images)
        images = torch.where(upside[:, None, None, None] > 0, images.flip(2), images)
        # from the place of an output pixel to that of the input, in units of half the width
        size = 2 ** (-_SCALE * scale)
        inverse = _linear(size, size)
        inverse = inverse @ _rotation(angle)
        longer = 2 ** (-_SCALE * stretch)
        inverse = inverse @ _rotation(-axis) @ _linear(longer, 1 / longer) @ _rotation(axis)
        inverse = inverse @ _translation(-2 * _TRANSLATE * shift)
        changed = (scale != 0) | (angle != 0) | (stretch != 0) | (shift != 0).any(1)
        images = _warp_changed(images, inverse, changed)
        labels = torch.stack(
            [
                mirror,
                upside,
                scale,
                angle.cos() - 1,
                angle.sin(),
                stretch * axis.cos(),
                stretch * axis.sin(),
                shift[:, 0],
                shift[:, 1],
            ],
            1,
        )
        return images, labels


def _matrix(rows: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _linear(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _rotation(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    c, s = angle.cos(), angle.sin()
    return _matrix([[c, -s, zero], [s, c, zero], [zero, zero, one]])


def _translation(shift: Tensor) -> Tensor:
    zero, one = torch.zeros_like(shift[:, 0]), torch.ones_like(shift[:, 0])
    return _matrix([[one, zero, shift[:, 0]], [zero, one, shift[:, 1]], [zero, zero, one]])


def _warp_changed(images: Tensor, inverse: Tensor, changed: Tensor) -> Tensor:
    """Resample the rows of images that are ``changed``, ``(B,)`` bool."""
    if not may_pick(images.device):
        return torch.where(changed[:, None, None, None], _warp(images, inverse), images)
    rows = changed.nonzero()[:, 0]
    if len(rows):
        images = images.clone()
        images[rows] = _warp(images[rows], inverse[rows])
    return images


def _warp(images: Tensor, inverse: Tensor) -> Tensor:
    """Resample images ``(B, C, H, H)`` by maps ``(B, 3, 3)`` from output to input places."""
    margin = images.shape[-1] - 1
    padded = functional.pad(images, [margin] * 4, mode="reflect")
    theta = inverse[:, :2].to(images.dtype).clone()
    theta[:, :, 2] *= images.shape[-1] / padded.shape[-1]  # units of half the padded width
    large = _enlarge(_enlarge(padded).mT).mT
    grid = functional.affine_grid(theta, list(large.shape), align_corners=False)
    moved = functional.grid_sample(large, grid, mode="bilinear", align_corners=False)
    small = _reduce(_reduce(moved).mT).mT
    return small[..., margin:-margin, margin:-margin]


def _enlarge(x: Tensor) -> Tensor:
    """Twice as many columns: the transpose of :func:`_reduce`."""
    lines = x.reshape(-1, 1, x.shape[-1])
    kernel = constant(SYM6, x.dtype, x.device)[None, None]
    longer = functional.conv_transpose1d(lines, kernel, stride=2)
    return longer[..., 5 : 5 + 2 * x.shape[-1]].reshape(*x.shape[:-1], -1)


def _reduce(x: Tensor) -> Tensor:
    """Half as many columns, through the low-pass filter."""
    lines = functional.pad(x.reshape(-1, 1, x.shape[-1]), [5, 5])
    kernel = constant(SYM6, x.dtype, x.device)[None, None]
    return functional.conv1d(lines, kernel, stride=2).reshape(*x.shape[:-1], -1)
