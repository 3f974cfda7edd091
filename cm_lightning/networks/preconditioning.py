"""Preconditioning: from a raw network F to a denoiser D."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor, nn

from cm_lightning.types import Denoiser, InputError, expand

__all__ = ["ConsistencyPrecond", "EDMPrecond", "Precond", "edm_coefficients"]


def edm_coefficients(sigma: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""EDM's coefficients (arXiv:2206.00364, Table 1).

    .. math:: c_\text{skip} = \frac{\sigma_d^2}{\sigma^2 + \sigma_d^2}, \quad
              c_\text{out} = \frac{\sigma \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
              c_\text{in} = \frac{1}{\sqrt{\sigma^2 + \sigma_d^2}}, \quad
              c_\text{noise} = \tfrac14 \ln \sigma

    Args:
        sigma: Noise levels > 0, any shape.
        sigma_data: Standard deviation of the data.

    Returns:
        ``(c_skip, c_out, c_in, c_noise)``, each with the shape of ``sigma``.
    """
    variance = sigma.square() + sigma_data**2
    root = variance.sqrt()
    return sigma_data**2 / variance, sigma * sigma_data / root, 1 / root, sigma.log() / 4


class Precond(Denoiser):
    r"""A raw network F made a denoiser: base of the two forms below.

    .. math:: D(x, \sigma) = c_\text{skip} x + c_\text{out} F(c_\text{in} x, c_\text{noise})

    Coefficients are computed in fp32 (float64 for float64 images) whatever the precision inside F,
    which is that of its parameters. The backbone is stored under the name it has in public
    checkpoints, ``stored_as``.

    Args:
        backbone: Raw network F(x, c_noise, class labels).
        sigma_data: Standard deviation of the data, > 0.
        noise_scale: Factor on :math:`c_\text{noise}`, > 0: 1, or 1000 for OpenAI's networks, which
            embed times as diffusion steps.

    Raises:
        InputError: If an argument is outside its range.
    """

    stored_as = "model"
    channels_last = False
    """Whether the backbone gets images with the channels of a pixel side by side in memory."""

    def __init__(
        self, backbone: nn.Module, sigma_data: float = 0.5, noise_scale: float = 1.0
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if not sigma_data > 0:
            raise InputError(f"{name}: sigma_data must be positive, got {sigma_data}.")
        if not noise_scale > 0:
            raise InputError(f"{name}: noise_scale must be positive, got {noise_scale}.")
        taken = getattr(backbone, "in_channels", None)
        given = getattr(backbone, "out_channels", taken)
        if taken is not None and given != taken:
            raise InputError(
                f"{name}: the backbone takes images of {taken} channels and gives {given}: set its "
                "in_channels and out_channels to those of the images."
            )
        self.add_module(self.stored_as, backbone)
        self.sigma_data = sigma_data
        self.noise_scale = noise_scale

    @abstractmethod
    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give ``(c_skip, c_out, c_in, c_noise)``, each with the shape of ``sigma``."""

    @property
    def backbone(self) -> nn.Module:
        """The raw network F."""
        backbone: nn.Module = getattr(self, self.stored_as)
        return backbone

    @property
    def image_shape(self) -> tuple[int, int, int] | None:
        """Shape ``(C, H, W)`` the backbone was built for."""
        size = getattr(self.backbone, "img_resolution", None)
        return None if size is None else (int(self.backbone.in_channels), int(size), int(size))  # type: ignore[arg-type]

    @property
    def num_classes(self) -> int:
        """Classes of the backbone, 0 if unconditional."""
        return int(getattr(self.backbone, "label_dim", 0))

    @property
    def label_dropout(self) -> float | None:
        """That of the backbone, ``None`` if it names none."""
        dropped: float | None = getattr(self.backbone, "label_dropout", None)
        return dropped

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Denoise.

        Args:
            x: Noisy images, ``(B, C, H, W)``.
            sigma: Noise levels > 0, ``(B,)``.
            labels: Class indices ``(B,)``, whole numbers with -1 for "no class", or ``None``. Those
                outside the classes mean "no class" too, as looking at them would wait for a GPU.
            augment_labels: What augmentation did to the images, ``(B, augment_dim)``, or ``None``
                for nothing.

        Returns:
            ``(B, C, H, W)``, fp32 or float64 as ``x``.

        Raises:
            InputError: If labels are given to an unconditional network or are not ``(B,)`` whole
                numbers, or if the backbone gives other shapes than it takes.
        """
        classes = self.num_classes
        if labels is not None and not classes:
            raise InputError("Labels were given to an unconditional network (label_dim 0).")
        if labels is not None and (labels.is_floating_point() or labels.shape != x.shape[:1]):
            raise InputError(
                f"labels must be {len(x)} whole numbers, one per image, got {labels.dtype} of "
                f"shape {tuple(labels.shape)}."
            )
        dtype = torch.promote_types(torch.float32, x.dtype)
        x, sigma = x.to(dtype), sigma.to(dtype)
        c_skip, c_out, c_in, c_noise = self.coefficients(sigma)
        rows = None
        if labels is not None:
            rows = (labels[:, None] == torch.arange(classes, device=labels.device)).to(dtype)
        inside = next(self.backbone.parameters(), x).dtype
        noise = c_noise * self.noise_scale
        told = () if augment_labels is None else (augment_labels,)
        scaled = (expand(c_in, x) * x).to(inside)
        if self.channels_last:  # a clone, as images of one channel count as laid out either way
            scaled = scaled.clone(memory_format=torch.channels_last)
        raw: Tensor = self.backbone(scaled, noise, rows, *told)
        if raw.shape != x.shape:
            raise InputError(
                f"The backbone got images of shape {tuple(x.shape)} and gave {tuple(raw.shape)}."
            )
        return expand(c_skip, x) * x + expand(c_out, x) * raw.to(dtype)


class EDMPrecond(Precond):
    r"""Denoiser with EDM's preconditioning (Karras et al. 2022, arXiv:2206.00364, Eq. 7).

    The coefficients are those of :func:`edm_coefficients`. D(x, sigma) goes to x as sigma goes to 0
    (at 0 itself c_noise is not finite), so the same form serves diffusion models and ECT.

    Args:
        backbone: Raw network F(x, c_noise, class labels).
        sigma_data: Standard deviation of the data, > 0.
        noise_scale: Factor on :math:`c_\text{noise}`: 1, or 1000 for OpenAI's networks.

    Raises:
        InputError: If an argument is outside its range.
    """

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give ``(c_skip, c_out, c_in, c_noise)``, each with the shape of ``sigma``."""
        return edm_coefficients(sigma, self.sigma_data)


class ConsistencyPrecond(Precond):
    r"""Denoiser that is the identity at the smallest noise level exactly (CD, CT, iCT, GC).

    .. math:: c_\text{skip} = \frac{\sigma_d^2}{(\sigma - \epsilon)^2 + \sigma_d^2}, \qquad
              c_\text{out} = \frac{(\sigma - \epsilon)\, \sigma_d}{\sqrt{\sigma^2 + \sigma_d^2}}

    with :math:`\epsilon` = ``sigma_min``; the other coefficients are EDM's. Song et al. 2023,
    arXiv:2303.01469. The official PyTorch code takes ``noise_scale`` 1000, the JAX
    code and iCT 1.

    Args:
        backbone: Raw network F(x, c_noise, class labels).
        sigma_data: Standard deviation of the data, > 0.
        sigma_min: Noise level at which f is the identity, >= 0.
        noise_scale: Factor on :math:`c_\text{noise}`: 1, or 1000 for OpenAI's networks.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sigma_data: float = 0.5,
        sigma_min: float = 0.002,
        noise_scale: float = 1.0,
    ) -> None:
        super().__init__(backbone, sigma_data, noise_scale)
        if not sigma_min >= 0:
            raise InputError(f"ConsistencyPrecond: sigma_min must be 0 or more, got {sigma_min}.")
        self.sigma_min = sigma_min

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give ``(c_skip, c_out, c_in, c_noise)``, each with the shape of ``sigma``."""
        _, _, c_in, c_noise = edm_coefficients(sigma, self.sigma_data)
        above = sigma - self.sigma_min
        c_skip = self.sigma_data**2 / (above.square() + self.sigma_data**2)
        return c_skip, above * self.sigma_data * c_in, c_in, c_noise
