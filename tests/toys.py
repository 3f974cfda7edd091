"""Denoisers with known answers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cm_lightning import regimes
from cm_lightning.types import Denoiser, expand

REGIMES = tuple(name.lower() for name in regimes.__all__ if name != "ConsistencyModule")
"""Every regime of the package by the name its configs begin with."""


class FunctionDenoiser(Denoiser):
    """A denoiser given by a function of (x, sigma with image shape)."""

    def __init__(self, function, sigma_data: float = 0.5) -> None:
        super().__init__()
        self.function = function
        self.sigma_data = sigma_data

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.function(x, expand(sigma, x))


def gaussian_denoiser(s: float = 0.5, m: float = 0.0) -> FunctionDenoiser:
    """E[x0 | x_t] for data N(m, s^2)."""
    return FunctionDenoiser(lambda x, t: (s * s * x + t * t * m) / (s * s + t * t))


def gaussian_endpoint(s: float = 0.5, m: float = 0.0) -> FunctionDenoiser:
    """Exact consistency function for data N(m, s^2), to noise level 0."""
    return FunctionDenoiser(lambda x, t: m + s / (s * s + t * t).sqrt() * (x - m))


class TinyNetwork(nn.Module):
    """A backbone with one dropout layer, for tests of plumbing."""

    def __init__(self, features: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(features + 1, 32)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(32, features)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        flat = torch.cat([x.flatten(1), noise_labels[:, None].to(x.dtype)], 1)
        return self.last(self.dropout(torch.tanh(self.first(flat)))).reshape(x.shape)


class TinyDenoiser(Denoiser):
    """TinyNetwork under EDM preconditioning, written out."""

    def __init__(self, features: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.sigma_data = 0.5
        self.model = TinyNetwork(features, dropout)

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None) -> Tensor:
        t, sd = expand(sigma, x), self.sigma_data
        root = (t * t + sd * sd).sqrt()
        out = self.model(x / root, sigma.log() / 4)
        return sd * sd / (t * t + sd * sd) * x + t * sd / root * out
