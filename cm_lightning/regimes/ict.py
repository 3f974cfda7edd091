"""iCT: improved consistency training (Song and Dhariwal 2023, arXiv:2310.14189)."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.objective import (
    Coupling,
    Discretization,
    Distance,
    DoublingGrid,
    Euler,
    Independent,
    InverseStep,
    Objective,
    PseudoHuber,
    SampleMean,
    Weighting,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule, radam
from cm_lightning.types import Denoiser
from cm_lightning.weights import Pretrained

__all__ = ["ICT"]


class ICT(ConsistencyModule):
    r"""Consistency training from scratch without EMA target or learned distance.

    .. math:: \mathcal L = E\Bigl[\tfrac{1}{\sigma_{i+1} - \sigma_i}\Bigl(\sqrt{\lVert
              f_\theta(x_0 + \sigma_{i+1} z, \sigma_{i+1}) - \mathrm{sg}\, f_\theta(x_0 +
              \sigma_i z, \sigma_i) \rVert_2^2 + c^2} - c\Bigr)\Bigr]

    on a grid that doubles from 10 to 1280 intervals over the run, with log-normal indices and
    :math:`c = 0.00054 \sqrt D` over the whole image; both passes share their dropout mask.
    Several public copies average the pseudo-Huber distance over pixels; the paper does not.

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with boundary-condition preconditioning.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 409,600.
        optimizer: Called with the parameters. CIFAR-10 and ImageNet-64: RAdam 1e-4.
        learning_rate: Factor on the optimizer's rate; constant as published.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r).
        coupling: Law of (x0, z).
        distance: Distance of the two ends.
        weighting: Weight of the distance.
        seed: Seed of noise levels, noise and dropout.
        init: Weights to start from, ``None`` (published) for random ones.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 409600.0,
        optimizer: OptimizerCallable = radam,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = DoublingGrid(),
        coupling: Coupling = Independent(),
        distance: Distance = PseudoHuber(),
        weighting: Weighting = InverseStep(),
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        solver = Euler(SampleMean())
        self.assemble(Objective(discretization, coupling, solver, distance, weighting))
