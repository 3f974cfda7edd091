"""Learning rate as a function of images seen, and what happens to gradients before a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cm_lightning.types import InputError

__all__ = ["GradientGuard", "GradientStats", "LearningRate"]


@dataclass(frozen=True)
class LearningRate:
    r"""Factor on the optimizer's learning rate, a pure function of the images seen.

    .. math:: \min\bigl(\tfrac{n}{R}, 1\bigr) \cdot \max\bigl(\tfrac{n}{S}, 1\bigr)^{-1/2}
              \cdot \min\bigl(\tfrac{T - n}{E}, 1\bigr)

    with n images seen before the step and T in all; a factor whose length is 0 is left out. The
    first is EDM's ramp (arXiv:2206.00364), the second EDM2's inverse square root
    (arXiv:2312.02696), the third a linear fall to zero at the end.

    Args:
        ramp_kimg: R / 1000, >= 0. EDM: 10,000. The very first step then has rate 0, as in EDM.
        decay_kimg: S / 1000, >= 0, where the inverse-square-root decay sets in. EDM2 counts it in
            batches: 35,000 batches of 2048 images are 71,680.
        cooldown_kimg: E / 1000, >= 0, length of the final fall.

    Raises:
        InputError: If a length is negative or not finite.
    """

    ramp_kimg: float = 0.0
    decay_kimg: float = 0.0
    cooldown_kimg: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ramp_kimg", "decay_kimg", "cooldown_kimg"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(
                    f"LearningRate: {name} must be 0 or more and finite, got {getattr(self, name)}."
                )

    def factor(self, nimg: int, total_kimg: float) -> float:
        """Factor after ``nimg`` images of a run of ``total_kimg`` thousand; in [0, 1]."""
        factor = 1.0
        if self.ramp_kimg:
            factor *= min(nimg / (1000 * self.ramp_kimg), 1)
        if self.decay_kimg:
            factor *= max(nimg / (1000 * self.decay_kimg), 1) ** -0.5
        if self.cooldown_kimg:
            factor *= min(max(total_kimg - nimg / 1000, 0) / self.cooldown_kimg, 1)
        return factor


@dataclass
class GradientStats:
    """What the last optimizer steps saw; tensors stay on the device until they are read.

    Attributes:
        norm: Euclidean norm of all gradients before sanitising.
        nonfinite_steps: Number of steps so far with a non-finite gradient.
        streak: Number of such steps in a row, up to now.
    """

    norm: Tensor
    nonfinite_steps: Tensor
    streak: Tensor


@dataclass(frozen=True)
class GradientGuard:
    """Sanitising of gradients before each optimizer step.

    Non-finite entries are replaced as the official codes do, and counted, which they do not. None
    of them clips; ``trainer.gradient_clip_val`` does, after this.

    Args:
        infinity: Replacement of +-inf; NaN becomes 0. EDM and ECT on CIFAR-10: 1e5; EDM2 and ECT
            on ImageNet-64: 0.
        stop_after: Stop the run after this many steps in a row with a non-finite gradient; it is
            looked at every 20 steps.
        returns: How often to go back to the last checkpoint instead of stopping. The images seen
            since, and their noise, are skipped.

    Raises:
        InputError: If an argument is outside its range.
    """

    infinity: float = 1e5
    stop_after: int = 100
    returns: int = 0

    def __post_init__(self) -> None:
        if not self.infinity >= 0:
            raise InputError(f"GradientGuard: infinity must be 0 or more, got {self.infinity}.")
        if self.stop_after < 1:
            raise InputError(f"GradientGuard: stop_after must be 1 or more, got {self.stop_after}.")
        if self.returns < 0:
            raise InputError(f"GradientGuard: returns must be 0 or more, got {self.returns}.")

    @torch.no_grad()
    def __call__(
        self, parameters: Sequence[nn.Parameter], previous: GradientStats | None
    ) -> GradientStats:
        """Sanitise gradients in place, without synchronising with the device.

        Args:
            parameters: Parameters whose ``grad`` is about to be used.
            previous: Statistics after the step before, ``None`` at the first.

        Returns:
            Statistics after this step.

        Raises:
            InputError: If no parameter has a gradient.
        """
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not gradients:
            raise InputError("No parameter of the model received a gradient.")
        norm = torch.stack(torch._foreach_norm(gradients)).float().norm()
        bad = (~norm.isfinite()).long()
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0, posinf=self.infinity, neginf=-self.infinity)
        if previous is None:
            return GradientStats(norm, bad, bad)
        return GradientStats(norm, previous.nonfinite_steps + bad, (previous.streak + bad) * bad)
