"""CT: consistency training as first published (Song et al. 2023, arXiv:2303.01469)."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.ema import EMAProfile
from cm_lightning.objective import (
    LPIPS,
    Coupling,
    Discretization,
    Distance,
    Euler,
    GrowingGrid,
    Independent,
    Objective,
    SampleMean,
    Uniform,
    Weighting,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule, radam_cm
from cm_lightning.types import Denoiser, InputError
from cm_lightning.weights import Pretrained

__all__ = ["CT", "GridEMA"]


@dataclass(frozen=True)
class GridEMA(EMAProfile):
    r"""Rate :math:`\mu` of a :class:`~cm_lightning.objective.GrowingGrid`.

    Args:
        grid: The grid, with its length.
    """

    grid: GrowingGrid

    @property
    def name(self) -> str:
        """``ema_grid``."""
        return "ema_grid"

    def beta(self, nimg: int, batch: int) -> float:
        """The grid's rate after ``nimg`` images."""
        return self.grid.target_rate(nimg)


class CT(ConsistencyModule):
    r"""Consistency training with an EMA target on a grid that grows with training.

    .. math:: \mathcal L = E\bigl[d\bigl(f_\theta(x_0 + t z, t),\; f_{\theta^-}(x_0 + r z, r)
              \bigr)\bigr], \qquad \theta^- \leftarrow \mu(p)\,\theta^- + (1 - \mu(p))\,\theta

    with (t, r) uniform neighbours on N(p) levels and N, mu the official code's functions of
    progress, see :class:`~cm_lightning.objective.GrowingGrid`. Superseded by iCT, which shows that
    the EMA target biases CT; kept as the baseline that papers compare with.

    Public discrepancies: for ImageNet-64 the paper gives the rate 8e-6, the launch script 1e-4;
    the launch script starts CT from the teacher's weights, the paper and the JAX code from random
    ones (our default, see ``init``).

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with boundary-condition preconditioning.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 409,600.
        optimizer: Called with the parameters. CIFAR-10: RAdam 4e-4.
        learning_rate: Factor on the optimizer's rate; constant as published.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r). ImageNet-64: s1 200, mu0 0.95.
        coupling: Law of (x0, z).
        distance: Distance of the two ends, as published LPIPS (CIFAR-10: ``pooling: max``).
        weighting: Weight of the distance.
        target: Profile of the target network, ``None`` for that of a GrowingGrid.
        seed: Seed of noise levels, noise and dropout.
        init: Weights to start from, ``None`` for random ones; give a diffusion run to start from
            a teacher.

    Raises:
        InputError: If ``target`` is missing for a grid without a rate of its own.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 409600.0,
        optimizer: OptimizerCallable = radam_cm,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = GrowingGrid(),
        coupling: Coupling = Independent(),
        distance: Distance = LPIPS(),
        weighting: Weighting = Uniform(),
        target: EMAProfile | None = None,
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        if target is None:
            if not isinstance(discretization, GrowingGrid):
                raise InputError(
                    f"CT with a {type(discretization).__name__} needs model.target, the profile of "
                    "its target network, such as ConstantEMA; only a GrowingGrid has its own."
                )
            target = GridEMA(discretization.spanning(total_kimg))
        solver = Euler(SampleMean())
        self.assemble(Objective(discretization, coupling, solver, distance, weighting), target)
