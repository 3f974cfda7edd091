"""CD: consistency distillation of a diffusion model (Song et al. 2023, arXiv:2303.01469)."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.cli import OptimizerCallable

from cm_lightning.ema import ConstantEMA, EMAProfile
from cm_lightning.objective import (
    LPIPS,
    Coupling,
    Discretization,
    Distance,
    Euler,
    Heun,
    Independent,
    KarrasGrid,
    Objective,
    TeacherMean,
    Uniform,
    Weighting,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule, radam_cm
from cm_lightning.regimes.checks import load_teacher
from cm_lightning.sampling import GuidedDenoiser
from cm_lightning.types import Denoiser, InputError, check_word
from cm_lightning.weights import Pretrained, start_from

__all__ = ["CD"]


class CD(ConsistencyModule):
    r"""A student that maps noise to where its teacher's ODE solver would arrive.

    .. math:: \mathcal L = E\bigl[d\bigl(f_\theta(x_t, t),\; f_{\theta^-}(\hat x_r, r)
              \bigr)\bigr], \qquad \hat x_r = \text{one solver step of the teacher from } x_t,
              \qquad \theta^- \leftarrow \mu\,\theta^- + (1 - \mu)\,\theta

    with (t, r) uniform neighbours on a Karras grid (arXiv:2303.01469, Algorithm 2). The best
    student equals the teacher's solver on that grid, not the exact flow. The teacher is frozen, in
    eval mode, and part of neither optimizer, averages nor checkpoints.

    Guidance distils :math:`D_u + w (D_c - D_u)` at one fixed scale w; the student sees only the
    label.

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with boundary-condition preconditioning.
        teacher: A diffusion model: a run of the regime Diffusion, or imported weights.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 409,600.
        optimizer: Called with the parameters. CIFAR-10: RAdam 4e-4; ImageNet-64: RAdam 8e-6.
        learning_rate: Factor on the optimizer's rate; constant as published.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r). CIFAR-10: 18 levels; ImageNet-64: 40.
        coupling: Law of (x0, z).
        solver: ``"heun"`` (published) or ``"euler"``.
        guidance: Guidance scale w of the teacher, >= 0; 1 for none: D(x, t) + w (D(x, t, c) - D(x,
            t)), with w = 1 in one call. LCM's and Meng et al.'s w is this one minus 1.
        distance: Distance of the two ends, as published LPIPS (CIFAR-10: ``pooling: max``).
        weighting: Weight of the distance.
        target: Profile of the target network. CIFAR-10: rate 0, which is the student itself;
            ImageNet-64: rate 0.95.
        seed: Seed of noise levels, noise and dropout.
        init: ``"teacher"`` (published), ``"random"``, or other weights.

    Raises:
        InputError: If the teacher is missing, no diffusion model, of another resolution or number
            of classes, or cannot be guided.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        teacher: Pretrained,
        total_kimg: float = 409600.0,
        optimizer: OptimizerCallable = radam_cm,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = KarrasGrid(18),
        coupling: Coupling = Independent(),
        solver: Literal["heun", "euler"] = "heun",
        guidance: float = 1.0,
        distance: Distance = LPIPS(),
        weighting: Weighting = Uniform(),
        target: EMAProfile = ConstantEMA(0.0),
        seed: int = 0,
        init: Literal["teacher", "random"] | Pretrained = "teacher",
    ) -> None:
        check_word("model.solver", solver, ("heun", "euler"))
        weights = init if isinstance(init, Pretrained) else None
        if weights is None:
            check_word("model.init", init, ("teacher", "random"))
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, weights)
        loaded = load_teacher(denoiser, teacher, type(self).__name__)
        self.borrow("teacher", loaded.denoiser, teacher.path, loaded.info)
        if init == "teacher":
            start_from(denoiser, loaded.denoiser, teacher.path)
        try:
            mean = TeacherMean(GuidedDenoiser(loaded.denoiser, None, guidance))
        except InputError as error:
            raise InputError(
                f"model.guidance {guidance:g} of the teacher {teacher.path}: {error}"
            ) from error
        step = Heun(mean) if solver == "heun" else Euler(mean)
        self.assemble(Objective(discretization, coupling, step, distance, weighting), target)
