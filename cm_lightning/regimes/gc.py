"""GC: generator-augmented flows (Issenhuth et al. 2024, arXiv:2406.09570)."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.objective import (
    Discretization,
    Distance,
    DoublingGrid,
    Euler,
    GeneratorCoupling,
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

__all__ = ["GC"]


class GC(ConsistencyModule):
    r"""iCT whose noisy images start, for a share of the rows, from what the model makes of them.

    .. math:: \mathcal L = \mu\, \mathcal L_\text{GC} + (1 - \mu)\, \mathcal L_\text{iCT},
              \qquad \hat x = \mathrm{sg}\, f(x_0 + \sigma_i z, \sigma_i)

    (arXiv:2406.09570, Eq. 15 and 21): :math:`\mathcal L_\text{GC}` is iCT's loss with
    :math:`\hat x` in the place of :math:`x_0`, see
    :class:`~cm_lightning.objective.GeneratorCoupling` for the choices in it and for where paper
    and code differ. The coupling serves every other regime too. With ``mix`` 0 it is iCT.

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with boundary-condition preconditioning.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 51,200.
        optimizer: Called with the parameters. The official code takes Lion at 1e-4, which torch
            lacks; the default is iCT's RAdam 1e-4.
        learning_rate: Factor on the optimizer's rate; constant as published.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r).
        coupling: Which rows are generated, and how.
        distance: Distance of the two ends.
        weighting: Weight of the distance.
        seed: Seed of noise levels, noise and dropout.
        init: Weights to start from, ``None`` (published) for random ones.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 51200.0,
        optimizer: OptimizerCallable = radam,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = DoublingGrid(),
        coupling: GeneratorCoupling = GeneratorCoupling(),
        distance: Distance = PseudoHuber(),
        weighting: Weighting = InverseStep(),
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        solver = Euler(SampleMean())
        self.assemble(Objective(discretization, coupling, solver, distance, weighting))
