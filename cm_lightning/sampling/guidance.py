r"""Guidance of a model by a worse one, at sampling time."""

from __future__ import annotations

import torch
from torch import Tensor

from cm_lightning.types import Denoiser, InputError

__all__ = ["GuidedDenoiser"]


class GuidedDenoiser(Denoiser):
    r"""A model pushed away from a worse version of itself.

    .. math:: f_w(x, \sigma, c) = f_\text{worse}(x, \sigma, c) +
              w\,\bigl(f(x, \sigma, c) - f_\text{worse}(x, \sigma, c)\bigr)

    SCT's guidance (arXiv:2410.18958) takes an average of the same run from a quarter, half or
    three quarters of the training as the worse version; the paper counts such a step as one
    network call, we count two. Without a worse model the same network without labels takes its
    place (classifier-free guidance). With w = 1 it is the model itself, in one call.

    Args:
        denoiser: The model.
        worse: A worse one with the same images and the same classes or none, or ``None`` for the
            model without labels.
        scale: w >= 0.

    Raises:
        InputError: If the scale is negative, the two do not fit, or the model has no
            label-free case to be guided by.
    """

    def __init__(self, denoiser: Denoiser, worse: Denoiser | None, scale: float) -> None:
        super().__init__()
        if not scale >= 0:
            raise InputError(f"The guidance scale must be 0 or more (1 for none), got {scale:g}.")
        if worse is None and scale != 1 and not (denoiser.num_classes and denoiser.label_dropout):
            raise InputError(
                "Classifier-free guidance needs a model trained with and without labels "
                "(label_dropout in its backbone); this one was not. Give a worse model instead."
            )
        if worse is not None and (
            worse.image_shape != denoiser.image_shape
            or worse.num_classes not in (0, denoiser.num_classes)
        ):
            raise InputError(
                f"The guiding model makes images of shape {worse.image_shape} of "
                f"{worse.num_classes} classes, the model {denoiser.image_shape} of "
                f"{denoiser.num_classes}: they must be equal, or the guiding one without classes."
            )
        self.denoiser = denoiser
        self.worse = worse
        self.scale = scale
        self.sigma_data = denoiser.sigma_data

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """That of the model."""
        return self.denoiser.image_shape

    @property
    def num_classes(self) -> int:
        """That of the model."""
        return self.denoiser.num_classes

    @property
    def label_dropout(self) -> float | None:
        """That of the model."""
        return self.denoiser.label_dropout

    @property
    def calls(self) -> int:
        """Network calls per evaluation."""
        return 1 if self.scale == 1 else 2

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        """Denoise with guidance.

        Raises:
            InputError: If it is guided by missing labels and gets none.
        """
        good: Tensor = self.denoiser(x, sigma, labels)
        if self.scale == 1:
            return good
        if self.worse is not None:
            bad: Tensor = self.worse(x, sigma, labels if self.worse.num_classes else None)
        else:
            if labels is None:
                raise InputError("Classifier-free guidance needs labels, got None.")
            bad = self.denoiser(x, sigma, torch.full_like(labels, -1))
        return bad + self.scale * (good - bad)
