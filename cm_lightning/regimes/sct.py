"""SCT: stable consistency tuning (Wang et al. 2024, arXiv:2410.18958)."""

from __future__ import annotations

from typing import Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from cm_lightning.data import ReferenceSet
from cm_lightning.objective import (
    Coupling,
    Discretization,
    Distance,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Heun,
    Independent,
    InverseStep,
    Objective,
    Phases,
    PseudoHuber,
    ReferenceMean,
    Weighting,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes.base import ConsistencyModule, radam
from cm_lightning.types import Batch, Denoiser, InputError, References, check_word
from cm_lightning.weights import Pretrained

__all__ = ["SCT"]


class SCT(ConsistencyModule):
    r"""ECT with a variance-reduced target: many images instead of one estimate E[x0 | x_t].

    .. math:: \mathcal L = E\Bigl[\tfrac{1}{t - r}\, d\bigl(f_\theta(x_t, t),\;
              \mathrm{sg}\, f_\theta(\bar x + \tfrac{r}{t}(x_t - \bar x),\, r)\bigr)\Bigr],
              \qquad \bar x = \sum_i w_i x^{(i)}

    with :math:`\bar x` from :class:`~cm_lightning.objective.ReferenceMean` and :math:`r` from
    ECT's mapping in smoother steps; where r = 0 the target is :math:`\bar x`. With one reference,
    one substep per stage and ECT's distance it is ECT. The authors released no code; weighting,
    schedule and constants that the paper's public traces leave open have ECT's values.

    The distance decides how much the lower variance can do. In two-dimensional toys it was much
    with the squared norm and nothing with the unsquared one (ECT's c = 0), under which every row's
    gradient has length one however noisy its target. On digits, tuned from a diffusion model with
    a learning rate per arm, it helped under all of them in one call, and the unsquared norm was the
    best distance for ECT and for SCT alike (README, "SCT against ECT"). The default is iCT's
    pseudo-Huber distance, whose small c makes it nearly that norm; ``distance: L2`` is the strict
    ECT arm.

    Other projects call simplified continuous-time consistency training "sCT"; this is not it.

    Args:
        denoiser: :math:`f_\theta(x, \sigma)` with EDM preconditioning, so that f(x, 0) = x.
        total_kimg: Length of the run in thousands of images. CIFAR-10: 51,200 (400k steps of 128).
        optimizer: Called with the parameters. CIFAR-10: RAdam 1e-4.
        learning_rate: Factor on the optimizer's rate. CIFAR-10: constant.
        gradients: Sanitising of gradients.
        discretization: Law of (t, r).
        coupling: Law of (x0, z). Rows that a GeneratorCoupling makes keep the one-sample step.
        references: Which images estimate the posterior mean.
        posterior: How they are averaged into E[x0 | x_t].
        solver: ``"euler"``, or ``"heun"`` for a second posterior mean at r.
        distance: Distance of the two ends.
        weighting: CIFAR-10: InverseStep; ImageNet-64: COut.
        phases: Segments of the noise axis for deterministic multistep sampling, ``None`` for one.
        seed: Seed of noise levels, noise, dropout and random references.
        init: Weights to start from, as published those of a diffusion model.

    Raises:
        InputError: If there are fewer references than asked for; if the coupling, such as
            MinibatchOT, is not ``independent``, as E[x0 | x_t] over the references holds for
            independent x0 and z alone; or if several phases meet a coupling or a weighting that do
            not go with them.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        total_kimg: float = 51200.0,
        optimizer: OptimizerCallable = radam,
        learning_rate: LearningRate = LearningRate(),
        gradients: GradientGuard = GradientGuard(),
        discretization: Discretization = ECTMapping(substeps=4),
        coupling: Coupling = Independent(),
        references: ReferenceSet = ReferenceSet(),
        posterior: ReferenceMean = ReferenceMean(),
        solver: Literal["euler", "heun"] = "euler",
        distance: Distance = PseudoHuber(),
        weighting: Weighting = InverseStep(),
        phases: Phases | None = None,
        seed: int = 0,
        init: Pretrained | None = None,
    ) -> None:
        super().__init__(denoiser, total_kimg, optimizer, learning_rate, gradients, seed, init)
        check_word("model.solver", solver, ("euler", "heun"))
        if not coupling.independent:
            raise InputError(
                f"model.coupling is {type(coupling).__name__}, but SCT's target takes image and "
                "noise to be independent: choose Independent or GeneratorCoupling."
            )
        if phases is not None and len(phases.edges) > 2:
            check_phased(phases, coupling, weighting)
        self.references = references
        self.posterior = posterior
        step = Heun(posterior) if solver == "heun" else Euler(posterior)
        self.assemble(Objective(discretization, coupling, step, distance, weighting, phases))

    def setup(self, stage: str) -> None:
        """Ask the data for references, besides the checks of every regime."""
        super().setup(stage)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and self.references.source == "bank":
            data.use_references(self.references, skip=self.posterior.skip is not None)

    def complete(self, batch: Batch) -> Batch:
        """The batch, with itself as references if they come from there."""
        if self.references.source == "batch":
            batch = batch._replace(references=self._from_batch(batch))
        return batch

    def _from_batch(self, batch: Batch) -> References:
        """The batch as its own references, of all devices if asked."""
        x0, labels, index = batch.x0, batch.labels, batch.index
        if self.references.gather and self.trainer.world_size > 1:
            x0, index = self._gather(x0), self._gather(index)
            labels = None if labels is None else self._gather(labels)
        return References(x0, labels, index)

    def _gather(self, values: Tensor) -> Tensor:
        """Rows of all devices."""
        gathered = self.all_gather(values)
        assert isinstance(gathered, Tensor)
        return gathered.flatten(0, 1)


def check_phased(phases: Phases, coupling: Coupling, weighting: Weighting) -> None:
    """Check what several phases do not go with.

    Args:
        phases: Two or more segments.
        coupling: Law of (x0, z).
        weighting: Weight w(t, r).

    Raises:
        InputError: If the coupling takes its endpoints from the network in training, which goes to
            the end of its segment and not to 0; or if differences are normalised under
            InverseStep, which contains the factor already: next to an edge 1 / (1 - s/t) grows
            without bound, and a few rows become all of the gradient.
    """
    if isinstance(coupling, GeneratorCoupling) and coupling.endpoint != "frozen":
        raise InputError(
            f"model.coupling takes endpoints from the network in training (endpoint "
            f"{coupling.endpoint}), and with model.phases that has none: leave one of the two out, "
            "or set endpoint to frozen with weights of a model without phases."
        )
    if phases.normalize and isinstance(weighting, InverseStep):
        raise InputError(
            "model.phases.normalize is true, but the weighting InverseStep contains that factor "
            "already: set it to false, or choose model.weighting COut."
        )
