"""Diffusion pretraining with the EDM loss (Karras et al. 2022, arXiv:2206.00364)."""

from __future__ import annotations

import torch
from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.data import EDMAugment
from cm_lightning.dropout import shared_dropout
from cm_lightning.objective import EDM, Draw, LogNormal, SquaredL2, Weighting
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule
from cm_lightning.types import Batch, Denoiser, InputError, LossOutput, expand
from cm_lightning.weights import Pretrained

__all__ = ["Diffusion", "adam"]


def adam(parameters: object) -> torch.optim.Optimizer:
    """Adam with rate 1e-3, betas (0.9, 0.999): EDM on CIFAR-10."""
    return torch.optim.Adam(parameters, lr=1e-3)  # type: ignore[arg-type]


class Diffusion(ConsistencyModule):
    r"""A denoiser trained to predict :math:`E[x_0 \mid x_t]`: CD's teacher, ECT's start.

    .. math:: \mathcal L = E\bigl[\lambda(t)\,\lVert D_\theta(x_0 + t z, t) - x_0 \rVert_2^2\bigr],
              \qquad \lambda(t) = \tfrac{t^2 + \sigma_d^2}{(t \sigma_d)^2}

    summed over the image and averaged over the batch, as in the official code (arXiv:2206.00364,
    Eq. 8). It starts near 1 per number of the image when the network's output starts at zero.

    If the denoiser learns a log-variance u (an :class:`~cm_lightning.networks.EDM2Precond` with
    ``learn_variance``) the loss is EDM2's, :math:`\lambda(t) e^{-u(t)} \lVert D - x_0 \rVert^2 +
    D\, u(t)` with D values per image (arXiv:2312.02696); recipe of EDM2-S on ImageNet-64: noise
    (-0.8, 1.6), Adam 1e-2 with betas (0.9, 0.99), ramp 10,000 and decay 71,680 kimg, infinities in
    gradients to 0, PowerEMA 0.05 and 0.10.

    Args:
        denoiser: :math:`D_\theta(x, \sigma)` with EDM preconditioning.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 200,000.
        optimizer: Called with the parameters.
        learning_rate: CIFAR-10 and ImageNet-64: ramp over 10,000 kimg.
        gradients: Sanitising of gradients.
        noise: Law of the noise level.
        weighting: Weight of the squared error.
        seed: Seed of noise levels, noise and dropout.
        init: Weights to start from, ``None`` for random ones.
        augment: EDM's augmentation, for a backbone with ``augment_dim: 9``. CIFAR-10: p 0.12.

    Raises:
        InputError: If the backbone takes no augmentation labels.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 200000.0,
        optimizer: OptimizerCallable = adam,
        learning_rate: LearningRate = LearningRate(ramp_kimg=10000.0),
        gradients: GradientGuard = GradientGuard(),
        noise: LogNormal = LogNormal(),
        weighting: Weighting = EDM(),
        seed: int = 0,
        init: Pretrained | None = None,
        augment: EDMAugment | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        self.noise = noise
        self.weighting = weighting
        self.distance = SquaredL2()
        self.augment = augment
        takes = getattr(getattr(denoiser, "backbone", None), "augment_dim", 0)
        if augment is not None and takes != augment.labels:
            raise InputError(
                f"model.augment tells the network {augment.labels} numbers per image, and its "
                f"backbone takes {takes}: set augment_dim to {augment.labels}."
            )

    def loss(self, batch: Batch, draw: Draw) -> LossOutput:
        """Loss of each image, ``(B,)``; r is 0."""
        n, x0 = len(batch.x0), batch.x0
        generator = draw.generator()
        t = draw.rows(self.noise.sample(draw.total, draw.device, generator), n)
        r = torch.zeros_like(t)
        z = draw.normal(x0, generator)
        told = {}
        if self.augment is not None:
            u = torch.rand(
                draw.total, self.augment.uniforms, device=draw.device, generator=generator
            )
            w = torch.randn(
                draw.total, self.augment.normals, device=draw.device, generator=generator
            )
            x0, told["augment_labels"] = self.augment(x0, draw.rows(u, n), draw.rows(w, n))
        x_t = x0 + expand(t, x0) * z
        with shared_dropout(self.denoiser, draw.dropout(), x0.device):
            prediction = self.denoiser(x_t, t.to(x0.dtype), batch.labels, **told)
        distance = self.distance(prediction, x0)
        weight = self.weighting(t, r, self.denoiser.sigma_data).to(distance.dtype)
        loss = distance * weight
        if self.denoiser.learn_variance:
            u = self.denoiser.log_variance(t.to(x0.dtype))  # type: ignore[operator]
            loss = loss * (-u).exp() + x0[0].numel() * u
        return LossOutput(loss, distance.detach(), t, r)
