r"""Laws of the pair (x0, z) of image and noise.

A coupling is deterministic: whatever it needs to choose at random arrives as ``u``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from cm_lightning.ema import EMAProfile, WarmupEMA
from cm_lightning.types import Batch, InputError, check_word, expand

__all__ = ["Coupled", "Coupling", "Denoise", "GeneratorCoupling", "Independent", "MinibatchOT"]


class Denoise(Protocol):
    r"""The endpoint prediction :math:`f(x, \sigma)` of the batch's rows, without gradient."""

    def __call__(self, x: Tensor, sigma: Tensor, *, dropout: bool = False) -> Tensor:
        """Predict the endpoints.

        Args:
            x: Noisy images, ``(B, C, H, W)``.
            sigma: Their noise levels > 0, ``(B,)``.
            dropout: Whether the network drops out.
        """


class Coupled(NamedTuple):
    """A coupled pair.

    Attributes:
        x0: Clean endpoint, ``(B, C, H, W)``.
        z: Unit noise, ``(B, C, H, W)``.
        generated: ``(B,)`` bool, true where ``x0`` was predicted by a network rather than taken
            from the data; such rows have no reference posterior. ``None`` for a coupling that
            predicts no images.
    """

    x0: Tensor
    z: Tensor
    generated: Tensor | None = None


class Coupling(ABC):
    """Joint law of image and noise.

    Attributes:
        endpoint: Which network predicts endpoints: ``"online"`` for the one being trained,
            ``"ema"`` for an average of it, ``"frozen"`` for weights of another run, ``None`` if
            the coupling asks none.
        independent: Whether image and noise of rows that it does not generate are independent, as
            E[x0 | x_t] over images of the data takes them to be.
    """

    endpoint: str | None = None
    independent = False

    @abstractmethod
    def __call__(
        self, batch: Batch, z: Tensor, u: Tensor, t: Tensor, r: Tensor, nimg: int, denoise: Denoise
    ) -> Coupled:
        """Couple the images of a batch with noise.

        Args:
            batch: Images and labels.
            z: Unit noise, ``(B, C, H, W)``.
            u: Uniform numbers in [0, 1), ``(B,)``, drawn by the caller.
            t: Larger levels, ``(B,)``.
            r: Smaller levels, ``(B,)``.
            nimg: Images seen so far.
            denoise: Prediction of endpoints.
        """

    def spanning(self, total_kimg: float) -> Coupling:
        """The same law, its schedule stretched over a run of ``total_kimg`` thousand images."""
        return self


@dataclass(frozen=True)
class Independent(Coupling):
    """Image and noise are independent: the pair is returned as it came."""

    independent = True

    def __call__(
        self, batch: Batch, z: Tensor, u: Tensor, t: Tensor, r: Tensor, nimg: int, denoise: Denoise
    ) -> Coupled:
        """Return ``(x0, z)`` unchanged."""
        return Coupled(batch.x0, z)


@dataclass(frozen=True)
class MinibatchOT(Coupling):
    r"""Noise permuted within the batch for the least transport cost (the baseline of GC's paper).

    .. math:: \min_\pi \sum_b \lVert x_0^{(b)} - z^{(\pi(b))} \rVert_2^2

    The squared cost, as theory asks; the helper in GC's official code takes the unsquared norm and
    is never called there. Images with labels are matched within their class, so that the noise of
    a class stays normal. The batch is what one device sees at a time: with several devices or
    micro-batches each solves its own assignment. Solved by
    :func:`scipy.optimize.linear_sum_assignment` on the CPU, which waits for the device.
    """

    def __call__(
        self, batch: Batch, z: Tensor, u: Tensor, t: Tensor, r: Tensor, nimg: int, denoise: Denoise
    ) -> Coupled:
        """Permute ``z``."""
        from scipy.optimize import linear_sum_assignment

        # minimal squared distance is maximal inner product: the norms do not depend on the pairing
        gain = (batch.x0.flatten(1).double() @ z.flatten(1).double().T).cpu()
        order = torch.arange(len(z))
        labels = torch.zeros_like(order) if batch.labels is None else batch.labels.cpu()
        for label in torch.unique(labels):
            rows = (labels == label).nonzero()[:, 0]
            images, noises = linear_sum_assignment(gain[rows][:, rows].numpy(), maximize=True)
            order[rows[torch.as_tensor(images)]] = rows[torch.as_tensor(noises)]
        return Coupled(batch.x0, z[order.to(z.device)])


@dataclass(frozen=True)
class GeneratorCoupling(Coupling):
    r"""Generator-augmented flows: the image is replaced by what the model makes of it.

    .. math:: \hat x = \mathrm{sg}\, f(x_0 + r z, r), \qquad
              \tilde x_t = \hat x + t z, \quad \tilde x_r = \hat x + r z

    for a share ``mix`` of the rows, drawn anew each step; the others stay as they are (Issenhuth
    et al., arXiv:2406.09570, Eq. 13-15 and 21). Where r is 0 the row stays as it is, so
    under ECT's mapping the method acts from the stage on where r > 0.

    Paper and official code differ: the paper's endpoint is the network being trained, the code's
    (and the paper's better ablation) an average of it, which we follow; the code's
    ``mix_gen_induced_traj`` is the share of rows left alone, ours the paper's :math:`\mu`.
    The code's average stays in training mode unless its FID is on; ours is in eval mode, which
    matters only with dropout. The whole batch is predicted, as in the code: one more forward pass.

    Args:
        mix: Share :math:`\mu` of generated rows, in [0, 1]. From scratch 0.5; on ECT 0.3.
        mix_end: Share at the end of the run, reached linearly; ``None`` for a constant.
        endpoint: ``"ema"``, ``"online"`` or ``"frozen"``.
        average: Profile of the endpoint's average, for ``"ema"``.
        weights: Run directory or weights folder of the endpoint network, for ``"frozen"``.
        level: Which end of the pair is denoised: ``"lower"`` (r, as published) or ``"upper"`` (t).
        dropout: Whether the endpoint's network drops out.
        start_kimg: Thousands of images before which no row is generated.
        total_kimg: Length of the ramp to ``mix_end``, ``None`` for that of the run.

    Raises:
        InputError: If an argument is outside its range, or ``weights`` and ``endpoint`` do not
            belong together.
    """

    independent = True

    mix: float = 0.5
    mix_end: float | None = None
    endpoint: Literal["ema", "online", "frozen"] = "ema"
    average: EMAProfile = WarmupEMA()
    weights: str | None = None
    level: Literal["lower", "upper"] = "lower"
    dropout: bool = False
    start_kimg: float = 0.0
    total_kimg: float | None = None

    def __post_init__(self) -> None:
        check_word("GeneratorCoupling: endpoint", self.endpoint, ("ema", "online", "frozen"))
        check_word("GeneratorCoupling: level", self.level, ("lower", "upper"))
        for name, value in (("mix", self.mix), ("mix_end", self.mix_end)):
            if value is not None and not 0 <= value <= 1:
                raise InputError(f"GeneratorCoupling: {name} must lie in [0, 1], got {value}.")
        if not self.start_kimg >= 0:
            raise InputError(
                f"GeneratorCoupling: start_kimg must be 0 or more, got {self.start_kimg}."
            )
        if self.total_kimg is not None and not self.total_kimg > 0:
            raise InputError(
                f"GeneratorCoupling: total_kimg must be positive, got {self.total_kimg}."
            )
        if (self.endpoint == "frozen") != (self.weights is not None):
            raise InputError(
                "GeneratorCoupling: endpoint frozen needs weights (a run directory or weights "
                f"folder) and no other endpoint takes them; got endpoint {self.endpoint} and "
                f"weights {self.weights}."
            )

    def spanning(self, total_kimg: float) -> GeneratorCoupling:
        """The coupling with ``total_kimg`` as the length of its ramp unless it has one."""
        return self if self.total_kimg is not None else replace(self, total_kimg=total_kimg)

    def share(self, nimg: int) -> float:
        """Share of generated rows after ``nimg`` images.

        Raises:
            InputError: If it is to change over a run whose length it does not know.
        """
        if nimg < 1000 * self.start_kimg:
            return 0.0
        if self.mix_end is None:
            return self.mix
        if self.total_kimg is None:
            raise InputError("GeneratorCoupling: mix_end needs a length: give total_kimg.")
        return self.mix + (self.mix_end - self.mix) * min(nimg / (1000 * self.total_kimg), 1)

    def __call__(
        self, batch: Batch, z: Tensor, u: Tensor, t: Tensor, r: Tensor, nimg: int, denoise: Denoise
    ) -> Coupled:
        """Replace the images of the rows with ``u < mix`` and a pair that ends above 0."""
        share = self.share(nimg)
        if share == 0:
            none = torch.zeros(len(z), dtype=torch.bool, device=z.device)
            return Coupled(batch.x0, z, none)
        level = r if self.level == "lower" else t
        positive = r > 0  # where it is 0 the image is the target
        noisy = batch.x0 + expand(level, z) * z
        endpoint = denoise(noisy, torch.where(positive, level, t), dropout=self.dropout)
        generated = (u < share) & positive
        x0 = torch.where(expand(generated, z), endpoint, batch.x0)
        return Coupled(x0, z, generated)
