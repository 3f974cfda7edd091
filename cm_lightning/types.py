"""The nouns every other file uses: a batch, a denoiser, a loss, and the error that speaks to users.

Shapes are written ``(B, C, H, W)``: batch, channels, height, width. Images lie in ``[-1, 1]``.
Noise levels are standard deviations in the same units and are always ``(B,)``; :func:`expand`
gives them image shape where they are used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = [
    "Batch",
    "ClassLayout",
    "Denoiser",
    "InputError",
    "LossOutput",
    "References",
    "TrainingStopped",
    "check_word",
    "expand",
]


class InputError(ValueError):
    """A mistake in the user's input, told in one sentence: what was given, what is allowed, where.

    The command line prints the sentence alone and exits with code 2.
    """


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to try.

    Attributes:
        code: Exit code of ``cm-fit``.
    """

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class ClassLayout(NamedTuple):
    """Which references lie together with those of a row's class.

    Attributes:
        rows: Rows of the batch, class after class, ``(<= B,)`` int64; those without a class are
            left out.
        parts: Stretches of ``rows`` and of the references of all their classes: first row, end of
            the rows, first reference, end of the references.
    """

    rows: Tensor
    parts: tuple[tuple[int, int, int, int], ...]


class References(NamedTuple):
    """Images of the data among which a posterior mean is estimated.

    Attributes:
        images: ``(M, C, H, W)``, uint8 grey levels or floats in [-1, 1].
        labels: Class indices ``(M,)`` or ``None``; rows of a batch use those of their own class.
        index: Positions ``(M,)`` in the numbering of :class:`Batch`, so that an image is not
            counted twice.
        nearest: Distance from each image of the *batch* to its nearest other reference (a lower
            bound of it), ``(B,)``, or ``None`` if it is not known.
        squares: Squared norms of the images as floats, ``(M,)``, or ``None`` to compute them.
        layout: Where the references of each row of the *batch* are, ``None`` for anywhere.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    nearest: Tensor | None = None
    squares: Tensor | None = None
    layout: ClassLayout | None = None


class Batch(NamedTuple):
    """One batch of training images, already on the device.

    Attributes:
        x0: Clean images in [-1, 1], shape ``(B, C, H, W)``.
        labels: Class indices ``(B,)``, int64, or ``None`` for an unconditional model.
            The value -1 stands for "no class".
        index: Position of each image in the data store, ``(B,)``, int64; mirrored images count
            on from the store's length.
        references: Other images of the data, for regimes that use them.
        generated: ``(B,)`` bool, rows whose ``x0`` a coupling made; ``None`` for none.
        notes: Where leaves put values per image, ``(B,)``, for the logs; ``None`` if nobody asks.
    """

    x0: Tensor
    labels: Tensor | None
    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    references: References | None = None
    generated: Tensor | None = None
    notes: dict[str, Tensor] | None = None


class LossOutput(NamedTuple):
    """What an objective returns: one number per image, each ``(B,)``.

    Attributes:
        loss: Weighted distance; its mean is minimised.
        distance: Distance before weighting, without gradient.
        t: Larger noise level of the pair.
        r: Smaller noise level of the pair, ``0 <= r < t``.
        notes: More values per image for the logs, by name.
    """

    loss: Tensor
    distance: Tensor
    t: Tensor
    r: Tensor
    notes: Mapping[str, Tensor] = MappingProxyType({})


class Denoiser(nn.Module, ABC):
    r"""A function :math:`D(x, \sigma)` that maps a noisy image to an estimate of the clean one.

    Diffusion models return :math:`E[x_0 \mid x_\sigma]`, consistency models the endpoint of the
    probability-flow ODE. Both take and return fp32 (or float64) images whatever the precision
    inside.

    Attributes:
        sigma_data: Standard deviation of the data, 0.5 in all published recipes.
        learn_variance: Whether it predicts a log-variance as well, as EDM2's diffusion models do.
    """

    sigma_data: float
    learn_variance = False

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Shape ``(C, H, W)`` of the images the network takes, ``None`` if it takes any."""
        return None

    @property
    def num_classes(self) -> int:
        """Number of classes the network is conditioned on, 0 if unconditional."""
        return 0

    @property
    def label_dropout(self) -> float | None:
        """Share of images that training shows without their label; ``None`` if not known."""
        return None

    @abstractmethod
    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        r"""Denoise.

        Args:
            x: Noisy images :math:`x_0 + \sigma z`, shape ``(B, C, H, W)``.
            sigma: Noise levels > 0, shape ``(B,)``.
            labels: Class indices ``(B,)``, -1 for "no class", or ``None``.

        Returns:
            Estimate of ``x0``, shape ``(B, C, H, W)``.
        """


def check_word(name: str, value: object, allowed: Collection[str]) -> None:
    """Check an argument that is one of a few words.

    Args:
        name: What it is, for the message.
        value: What was given.
        allowed: The words.

    Raises:
        InputError: If it is none of them.
    """
    if value not in allowed:
        raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}.")


def expand(values: Tensor, like: Tensor) -> Tensor:
    """Give ``(B,)`` values the shape ``(B, 1, 1, 1)`` and the dtype of the images ``like``."""
    values = values if values.dtype == torch.bool else values.to(like.dtype)
    return values.reshape(-1, *([1] * (like.ndim - 1)))
