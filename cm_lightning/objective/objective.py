r"""The algorithm box shared by every discrete consistency objective.

CT, iCT, ECT, SCT and CD are one ODE step from t down to r under different estimates of
:math:`E[x_0 \mid x_t]`; what follows the step is the same for all and is written here once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from cm_lightning.dropout import DropoutKey, shared_dropout
from cm_lightning.objective.coupling import Coupled, Coupling, Denoise, Independent
from cm_lightning.objective.discretization import Discretization
from cm_lightning.objective.distance import Distance
from cm_lightning.objective.phases import Phases, jump
from cm_lightning.objective.solver import Solver
from cm_lightning.objective.weighting import Weighting
from cm_lightning.types import Batch, Denoiser, LossOutput, expand

__all__ = ["Draw", "Objective", "paired_forward", "transport_notes"]


@dataclass(frozen=True)
class Draw:
    """The randomness of one batch: a pure function of the seed, the clock and the rows it covers.

    Noise is drawn for the whole global batch of the optimizer step and each rank or micro-batch
    keeps its own rows, so the noise of an image does not depend on how the batch is split.

    Args:
        seed: Seed of the run.
        nimg: Images seen before this optimizer step.
        start: First row of this micro-batch within the global batch.
        total: Number of images in the global batch.
        device: Where to draw.
        skipped: Images whose batches were skipped, which moves the random stream on.
    """

    seed: int
    nimg: int
    start: int
    total: int
    device: torch.device
    skipped: int = 0

    def generator(self) -> torch.Generator:
        """A fresh generator; equal for every rank and micro-batch of the step."""
        words = (self.seed, self.nimg + self.skipped)
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)
        return torch.Generator(self.device).manual_seed(int(state[0]) >> 1)

    def dropout(self) -> DropoutKey:
        """Key of the dropout masks, which belong to the rows of the global batch as well."""
        words = (self.seed, self.nimg + self.skipped, 1)
        state = np.random.SeedSequence(words).generate_state(1, np.uint64)
        return DropoutKey(int(state[0]) >> 1, self.start)

    def rows(self, values: Tensor, n: int) -> Tensor:
        """Keep this micro-batch's ``n`` rows of values drawn for the global batch."""
        return values[self.start : self.start + n]

    def normal(self, like: Tensor, generator: torch.Generator) -> Tensor:
        """Unit normal noise with the shape and dtype of ``like``."""
        shape = (self.total, *like.shape[1:])
        noise = torch.randn(shape, device=self.device, dtype=like.dtype, generator=generator)
        return self.rows(noise, len(like))


def paired_forward(
    online: Denoiser,
    target: Denoiser,
    x_t: Tensor,
    t: Tensor,
    x_r: Tensor,
    r: Tensor,
    labels: Tensor | None,
    dropout: DropoutKey,
    end: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Evaluate both ends of a pair under one dropout mask.

    .. math:: \bigl(f_\theta(x_t, t),\; \mathrm{sg}\, f_{\theta^-}(x_r, r)\bigr)

    Where r = 0 the target is ``x_r`` itself, since f(x, 0) = x; the network is never evaluated
    there (its noise input ln 0 is not finite). With phases f goes to ``end`` in the place of 0.

    Args:
        online: Network that receives the gradient.
        target: Network of the target; may be the same object. No gradient flows through it.
        x_t: Images at the larger level, ``(B, C, H, W)``.
        t: Larger levels, ``(B,)``.
        x_r: Images at the smaller level, ``(B, C, H, W)``.
        r: Smaller levels, ``(B,)``, zero allowed.
        labels: Class indices ``(B,)`` or ``None``.
        dropout: Key of both passes' dropout masks.
        end: Level at which f is the identity, ``(B,)``, ``0 <= end <= r``; ``None`` for 0.

    Returns:
        ``(prediction, target)``, each ``(B, C, H, W)``.
    """
    at_end = r == (0 if end is None else end)
    with torch.no_grad(), shared_dropout(target, dropout, x_t.device):
        safe_r = torch.where(at_end, t, r)
        goal = target(x_r, safe_r.to(x_r.dtype), labels)
        if end is not None:
            goal = jump(goal, x_r, safe_r, end)
        goal = torch.where(expand(at_end, goal), x_r, goal)
    with shared_dropout(online, dropout, x_t.device):
        prediction = online(x_t, t.to(x_t.dtype), labels)
    return prediction if end is None else jump(prediction, x_t, t, end), goal


@dataclass(frozen=True)
class Objective:
    r"""Discrete consistency objective assembled from its five leaves.

    .. math:: \mathcal L = E\bigl[w(t, r)\, d\bigl(f_\theta(x_t, t),
              \mathrm{sg}\, f_{\theta^-}(x_r, r)\bigr)\bigr], \qquad x_t = x_0 + t z,\;
              x_r = \mathrm{solver}(x_t, t, r)

    Song et al. 2023, arXiv:2303.01469. Every random number is drawn here, in a fixed order
    (levels, noise, u); the leaves are deterministic.

    Args:
        discretization: Law of (t, r).
        coupling: Law of (x0, z).
        solver: Step from t to r, with its estimate of the posterior mean.
        distance: Distance of the two ends.
        weighting: Weight w(t, r).
        phases: Segments of the noise axis with ends of their own, ``None`` for one that ends at 0.
    """

    discretization: Discretization
    coupling: Coupling
    solver: Solver
    distance: Distance
    weighting: Weighting
    phases: Phases | None = None

    def spanning(self, total_kimg: float) -> Objective:
        """The same objective, its schedules stretched over ``total_kimg`` thousand images."""
        return replace(
            self,
            discretization=self.discretization.spanning(total_kimg),
            coupling=self.coupling.spanning(total_kimg),
        )

    def __call__(
        self,
        online: Denoiser,
        target: Denoiser,
        batch: Batch,
        draw: Draw,
        endpoint: Denoiser | None = None,
    ) -> LossOutput:
        """Draw noise and return the loss of each image.

        Args:
            online: Network that receives the gradient.
            target: Network of the target, may be ``online``.
            batch: Images ``(B, C, H, W)`` and labels.
            draw: Source of randomness; its ``nimg`` decides the discretization.
            endpoint: Network that predicts endpoints for the coupling, ``None`` for ``online``.
        """
        n = len(batch.x0)
        generator = draw.generator()
        t, r = self.discretization.sample(
            draw.total,
            draw.nimg,
            draw.device,
            generator,
            None if self.phases is None or not self.phases.uniform else self.phases.edges,
        )
        t, r = draw.rows(t, n), draw.rows(r, n)
        z = draw.normal(batch.x0, generator)
        u = torch.rand(draw.total, device=draw.device, dtype=torch.float64, generator=generator)
        return self.evaluate(
            online,
            target,
            batch,
            t,
            r,
            z,
            draw.rows(u, n),
            endpoint=endpoint,
            nimg=draw.nimg,
            dropout=draw.dropout(),
        )

    def evaluate(
        self,
        online: Denoiser,
        target: Denoiser,
        batch: Batch,
        t: Tensor,
        r: Tensor,
        z: Tensor,
        u: Tensor,
        *,
        endpoint: Denoiser | None = None,
        nimg: int = 0,
        dropout: DropoutKey = DropoutKey(0),
    ) -> LossOutput:
        """The deterministic part: the loss at given levels and noise.

        Args:
            online: Network that receives the gradient.
            target: Network of the target.
            batch: Images ``(B, C, H, W)`` and labels.
            t: Larger levels, ``(B,)`` float64.
            r: Smaller levels, ``(B,)`` float64.
            z: Unit noise, ``(B, C, H, W)``.
            u: Uniform numbers for the coupling, ``(B,)``.
            endpoint: Network that predicts endpoints, ``None`` for ``online``.
            nimg: Images seen so far, for the coupling's schedule.
            dropout: Key of the dropout masks.
        """
        end = None
        if self.phases is not None:
            end = self.phases.end(t)
            r = torch.maximum(r, end)
        denoise = _prediction(online if endpoint is None else endpoint, batch, dropout)
        coupled = self.coupling(batch, z, u, t, r, nimg, denoise)
        notes: dict[str, Tensor] = {}
        if not isinstance(self.coupling, Independent):
            notes |= transport_notes(coupled, batch.x0, z)
        x0, z, generated = coupled
        batch = batch._replace(x0=x0, generated=generated, notes=notes)
        x_t = x0 + expand(t, x0) * z
        x_r = self.solver(x_t, t, r, batch)
        prediction, goal = paired_forward(
            online, target, x_t, t, x_r, r, batch.labels, dropout, end
        )
        if self.phases is not None and self.phases.normalize:
            scale = expand(1 / (1 - self.phases.end(t) / t), x0)
            prediction, goal = prediction * scale, goal * scale
        distance = self.distance(prediction, goal)
        weight = self.weighting(t, r, online.sigma_data)
        return LossOutput(distance * weight.to(distance.dtype), distance.detach(), t, r, notes)


def transport_notes(coupled: Coupled, x0: Tensor, z: Tensor) -> dict[str, Tensor]:
    r"""What a coupling saves: its transport cost, beside that of the independent pair.

    .. math:: c = \tfrac{1}{D} \lVert x_0 - z \rVert_2^2

    with D the number of values of an image and z unit noise (arXiv:2406.09570, Lemma 1, there not
    divided by D). The mean over rows of a generator coupling mixes generated rows with others.

    Args:
        coupled: The coupled pair.
        x0: Images as they came, ``(B, C, H, W)``.
        z: Noise as it came, ``(B, C, H, W)``.

    Returns:
        ``transport_cost`` and ``independent_cost`` of each row and, if the coupling tells, whether
        it was ``generated``, each ``(B,)`` without gradient.
    """
    notes = {
        "transport_cost": (coupled.x0 - coupled.z).detach().flatten(1).square().mean(1),
        "independent_cost": (x0 - z).flatten(1).square().mean(1),
    }
    if coupled.generated is not None:
        notes["generated"] = coupled.generated.to(x0.dtype)
    return notes


def _prediction(network: Denoiser, batch: Batch, key: DropoutKey) -> Denoise:
    """The network's prediction of endpoints, under dropout masks of its own if it drops out."""
    own = key._replace(seed=key.seed ^ 1)

    def denoise(x: Tensor, sigma: Tensor, *, dropout: bool = False) -> Tensor:
        training = network.training
        network.train(dropout)
        try:
            with torch.no_grad(), shared_dropout(network, own, x.device):
                endpoint: Tensor = network(x, sigma.to(x.dtype), batch.labels)
        finally:
            network.train(training)
        return endpoint.to(x.dtype)

    return denoise
