r"""LPIPS, the learned perceptual distance of CD and CT as published."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.files import find_weights, read_weights
from cm_lightning.objective.distance import Distance
from cm_lightning.transfer import constant
from cm_lightning.types import InputError

__all__ = ["LPIPS"]

_URL = "https://download.pytorch.org/models/vgg16-397923af.pth"
_CUTS = (4, 9, 16, 23, 30)
"""VGG16's layers up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3."""


@dataclass(frozen=True)
class LPIPS(Distance):
    r"""Learned perceptual distance over VGG16 (Zhang et al. 2018, arXiv:1801.03924).

    .. math:: d(a, b) = \sum_l \sum_c w_{lc} \Bigl\langle \bigl(\hat F_{lc}(a) -
              \hat F_{lc}(b)\bigr)^2 \Bigr\rangle_\text{pixels}, \qquad
              \hat F_l = F_l / (\lVert F_l \rVert_\text{channels} + 10^{-10})

    Images are read as in [-1, 1], enlarged bilinearly to 224 if their side is below 256 (as
    OpenAI's code does), mapped to [0, 1] and normalised as ImageNet.

    The LPIPS of OpenAI's PyTorch code (ImageNet-64, LSUN) is that of the package piq with VGG's
    max-pooling **replaced by average pooling**, which is not the standard LPIPS:
    ``pooling="average"``, the default, computes that one (it equals piq's to fp32 rounding on the
    same weights, tests/objective/test_lpips.py), ``pooling="max"`` the standard one, as their JAX
    code (CIFAR-10) has it. VGG16 is torchvision's with its ImageNet weights; the
    channel weights are those of LPIPS 0.1, which come with torchmetrics. Distances over ImageNet
    features make FID look better than other distances do (argued in arXiv:2310.14189).

    Args:
        weights: File with torchvision's VGG16 weights (``vgg16-397923af.pth`` or
            ``.safetensors``). ``None`` for the file named by the environment variable
            ``CM_VGG16_WEIGHTS``, else for the copy in the cache of ``torch.hub``, downloaded if it
            is missing and ``CM_OFFLINE`` is not 1.
        pooling: ``"average"`` (OpenAI's PyTorch code) or ``"max"`` (standard, their JAX code).

    Raises:
        InputError: If the weights are missing or of another network, or images have other than 1
            or 3 channels.
    """

    weights: str | None = None
    pooling: Literal["average", "max"] = "average"
    _loaded: list[nn.ModuleList] = field(default_factory=list, init=False, repr=False)

    def prepare(self, image_shape: tuple[int, int, int] | None) -> None:
        """Check the number of channels and read the weights, once.

        Raises:
            InputError: If images have other than 1 or 3 channels, or the weights are missing.
        """
        if image_shape is not None and image_shape[0] not in (1, 3):
            raise InputError(f"LPIPS compares images with 1 or 3 channels, got {image_shape[0]}.")
        if not self._loaded:
            path = find_weights("VGG16", self.weights, "CM_VGG16_WEIGHTS", _URL)
            self._loaded.append(_vgg16(path, self.pooling))

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """Perceptual distance, ``(B,)``."""
        self.prepare((a.shape[1], a.shape[2], a.shape[3]))
        network = self._loaded[0].to(a.device)
        with torch.autocast(a.device.type, enabled=False):
            x, y = _prepare(a.float()), _prepare(b.float())
            total = torch.zeros(len(a), device=a.device)
            for part in network:
                x, y = part[0](x), part[0](y)  # type: ignore[index]
                difference = (_unit(x) - _unit(y)).square()
                total = total + part[1](difference).mean((1, 2, 3))  # type: ignore[index]
        return total


def _prepare(images: Tensor) -> Tensor:
    """From [-1, 1] to ImageNet's normalisation, at least 224 pixels wide."""
    if images.shape[-1] < 256:
        images = functional.interpolate(images, size=(224, 224), mode="bilinear")
    mean = constant((0.485, 0.456, 0.406), images.dtype, images.device).view(3, 1, 1)
    std = constant((0.229, 0.224, 0.225), images.dtype, images.device).view(3, 1, 1)
    return ((images.expand(-1, 3, -1, -1) + 1) / 2 - mean) / std


def _unit(features: Tensor) -> Tensor:
    # the small number inside the root keeps the gradient finite where all channels are zero
    norm = (features.square().sum(1, keepdim=True) + 1e-20).sqrt()
    return features / (norm + 1e-10)


def _vgg16(path: Path, pooling: str) -> nn.ModuleList:
    """Five frozen pairs: convolutions up to a compared layer, and the weights of its channels."""
    from torchmetrics.functional.image import lpips
    from torchvision.models import vgg16

    tensors = read_weights(path).items()
    wanted = {k.removeprefix("features."): v for k, v in tensors if k.startswith("features.")}
    with torch.device("meta"):
        layers = vgg16(weights=None).features
    try:
        layers.load_state_dict(wanted, assign=True)
    except RuntimeError as error:
        raise InputError(f"{path} does not hold the weights of torchvision's VGG16.") from error
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.ReLU):
            layers[number] = nn.ReLU()  # not in place
        if isinstance(layer, nn.MaxPool2d) and pooling == "average":
            layers[number] = nn.AvgPool2d(2, 2)
    file = Path(inspect.getfile(lpips)).parent / "lpips_models" / "vgg.pth"
    pairs = nn.ModuleList()
    for cut, (start, end) in enumerate(pairwise((0, *_CUTS))):
        weights = read_weights(file)[f"lin{cut}.model.1.weight"]
        channels = nn.Conv2d(weights.shape[1], 1, 1, bias=False, device="meta")
        channels.load_state_dict({"weight": weights.float()}, assign=True)
        pairs.append(nn.ModuleList([layers[start:end], channels]))
    return pairs.requires_grad_(False).eval()
