"""ECT: easy consistency tuning (Geng et al. 2024, arXiv:2406.14548)."""

from __future__ import annotations

from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.objective import (
    L2,
    Coupling,
    Discretization,
    Distance,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    SampleMean,
    Weighting,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule, radam
from cm_lightning.types import Denoiser
from cm_lightning.weights import Pretrained

__all__ = ["ECT"]


class ECT(ConsistencyModule):
    r"""Consistency training whose pairs close in by stages, starting from a diffusion model.

    .. math:: \mathcal L = E\Bigl[\tfrac{1}{t - r}\,\bigl\lVert f_\theta(x_0 + t z, t) -
              \mathrm{sg}\, f_\theta(x_0 + r z, r)\bigr\rVert_2\Bigr], \qquad r = r(t, s)

    with r from :class:`~cm_lightning.objective.ECTMapping` at stage s; where r = 0 the target is
    :math:`x_0`, so stage 0 at small t is diffusion training. The target network is the online
    network without gradient, under the same dropout mask. The official CIFAR-10 code shifts the
    preconditioning by 0.003 when sampling; we use the training form everywhere, as its
    ImageNet-64 branch does.

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with EDM preconditioning, so that f(x, 0) = x.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 25,600.
        optimizer: Called with the parameters. CIFAR-10: RAdam 1e-4.
        learning_rate: Factor on the optimizer's rate. CIFAR-10: constant.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r).
        coupling: Law of (x0, z).
        distance: Distance of the two ends. CIFAR-10: L2; ImageNet-64: PseudoHuber(0.06).
        weighting: CIFAR-10: InverseStep; ImageNet-64: COut.
        seed: Seed of noise levels, noise and dropout.
        init: Weights to start from, as published those of a diffusion model.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 25600.0,
        optimizer: OptimizerCallable = radam,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = ECTMapping(),
        coupling: Coupling = Independent(),
        distance: Distance = L2(),
        weighting: Weighting = InverseStep(),
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        solver = Euler(SampleMean())
        self.assemble(Objective(discretization, coupling, solver, distance, weighting))
