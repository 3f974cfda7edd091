r"""Estimates of the posterior mean :math:`E[x_0 \mid x_t]`, in which regimes differ."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cm_lightning.types import Batch, Denoiser, InputError, References

__all__ = [
    "PosteriorMean",
    "ReferenceMean",
    "ReferenceSums",
    "SampleMean",
    "TeacherMean",
    "merge_sums",
]


class PosteriorMean(ABC):
    """An estimate of E[x0 | x_t]."""

    @abstractmethod
    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Estimate the mean.

        Args:
            x_t: Noisy images, ``(B, C, H, W)``.
            t: Their noise levels, ``(B,)``.
            batch: The batch whose ``x0`` made ``x_t``.

        Returns:
            Estimate, ``(B, C, H, W)``.
        """


@dataclass(frozen=True)
class SampleMean(PosteriorMean):
    """The one image that made x_t: unbiased, with the largest variance (CT, iCT, ECT)."""

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Return ``batch.x0``."""
        return batch.x0


@dataclass(frozen=True)
class TeacherMean(PosteriorMean):
    r"""A pretrained diffusion model's estimate, optionally guided (CD).

    .. math:: D_w(x, t, c) = D(x, t) + w\,\bigl(D(x, t, c) - D(x, t)\bigr)

    With w = 1 it is :math:`D(x, t, c)` itself, one call instead of two. LCM's and Meng et al.'s
    w is this one minus 1.

    Args:
        teacher: The diffusion model, called as it is (in eval mode) and without gradient.
        guidance: Guidance scale w, >= 0.
    """

    teacher: Denoiser
    guidance: float = 1.0

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Denoise with the labels of the batch."""
        sigma = t.to(x_t.dtype)
        with torch.no_grad():
            mean: Tensor = self.teacher(x_t, sigma, batch.labels)
            if self.guidance != 1:
                assert batch.labels is not None
                free = self.teacher(x_t, sigma, torch.full_like(batch.labels, -1))
                mean = free + self.guidance * (mean - free)
        return mean


class ReferenceSums(NamedTuple):
    """A soft-max over references under way; sums over disjoint sets can be merged.

    Attributes:
        top: Largest logit so far, ``(B,)`` float64.
        weights: Sum of ``exp(logit - top)``, ``(B,)``.
        squares: Sum of its squares, ``(B,)``.
        images: Weighted sum of images, ``(B, D)``.
    """

    top: Tensor
    weights: Tensor
    squares: Tensor
    images: Tensor


def merge_sums(a: ReferenceSums, b: ReferenceSums) -> ReferenceSums:
    """Sums over the union of two disjoint sets of references."""
    top = torch.maximum(a.top, b.top)
    parts = []
    for sums in (a, b):
        # a set without any reference of the row's class has top -inf and adds nothing
        scale = (sums.top - top).nan_to_num(nan=-torch.inf, neginf=-torch.inf).exp()
        scale = scale.to(sums.weights.dtype)
        parts.append((sums.weights * scale, sums.squares * scale**2, sums.images * scale[:, None]))
    (w_a, s_a, x_a), (w_b, s_b, x_b) = parts
    return ReferenceSums(top, w_a + w_b, s_a + s_b, x_a + x_b)


@dataclass(frozen=True)
class ReferenceMean(PosteriorMean):
    r"""Self-normalised average over reference images by the score identity (SCT).

    .. math:: \bar x = \sum_i w_i\, x^{(i)}, \qquad
              w = \mathrm{softmax}_i\Bigl(-\frac{\lVert x_t - x^{(i)} \rVert^2}{2 t^2}\Bigr)

    over the batch's references of the row's class **and the row's own image**, which always
    belongs to the set, counted once. The estimate is then exactly unbiased for every number of
    references, :math:`E[\bar x \mid x_t] = E[x_0 \mid x_t]`, with a variance that falls with it;
    with the whole data set it is exact for the empirical distribution. (Xu et al. 2023,
    arXiv:2302.00670, for the estimator; arXiv:2410.18958 for its use here. Whether SCT's authors
    include the own image is not stated; Stable Target Field's code does.)

    Rows with label -1, with a generated ``x0`` or without another image of their class keep
    ``x0``. References are streamed in chunks, so memory does not grow with their number; all is
    computed in fp32 (float64 for float64 images) outside autocast.

    Args:
        chunk: References per chunk, >= 1.
        skip: Rows whose nearest other reference is at least ``skip * t`` away keep ``x0``: the
            weight of all others together is then below about 5e-5 at 8 (8e-3 at 6). ``None``
            never skips.

    Raises:
        InputError: If an argument is outside its range, or a batch carries no references.
    """

    chunk: int = 4096
    skip: float | None = 8.0

    def __post_init__(self) -> None:
        if self.chunk < 1:
            raise InputError(f"ReferenceMean: chunk must be 1 or more, got {self.chunk}.")
        if self.skip is not None and not self.skip > 0:
            raise InputError(f"ReferenceMean: skip must be positive or null, got {self.skip}.")

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        r"""Average the references; notes ``ess``, ``largest_weight``, ``skipped``, ``discrepancy``.

        The first two are the effective sample size :math:`1 / \sum w_i^2` and the largest
        weight, the last is :math:`\lVert \bar x - x_0 \rVert^2 / (D t^2)`.
        """
        references = batch.references
        if references is None:
            raise InputError("ReferenceMean needs references, and the batch carries none.")
        active = torch.ones_like(t, dtype=torch.bool)
        if batch.labels is not None:
            active &= batch.labels >= 0
        if batch.generated is not None:
            active &= ~batch.generated
        eligible = active.clone()
        if self.skip is not None and references.nearest is not None:
            active &= references.nearest < self.skip * t
        rows = active.nonzero()[:, 0]
        mean = batch.x0.clone()
        ess, largest = torch.ones_like(t), torch.ones_like(t)
        if len(rows):
            with torch.no_grad(), torch.autocast(x_t.device.type, enabled=False):
                sums = self.sums(x_t, t, batch, references, rows)
                sums = merge_sums(own_sums(x_t, t, batch, rows), sums)
                average = (sums.images / sums.weights[:, None]).reshape(-1, *x_t.shape[1:])
            mean[rows] = average.to(mean.dtype)
            ess[rows] = (sums.weights.double().square() / sums.squares).to(t.dtype)
            largest[rows] = (1 / sums.weights.double()).to(t.dtype)
        if batch.notes is not None and "ess" not in batch.notes:
            shift = (mean - batch.x0).flatten(1).square().mean(1)
            batch.notes["ess"], batch.notes["largest_weight"] = ess, largest
            batch.notes["skipped"] = (eligible & ~active).to(t.dtype)
            batch.notes["discrepancy"] = shift / t.square()
        return mean

    def sums(
        self, x_t: Tensor, t: Tensor, batch: Batch, references: References, rows: Tensor
    ) -> ReferenceSums:
        """Sums of some rows over references, without the rows' own images.

        Args:
            x_t: Noisy images, ``(B, C, H, W)``.
            t: Their noise levels, ``(B,)``.
            batch: The batch.
            references: Any part of the references.
            rows: Which rows, ``(R,)``.
        """
        dtype = torch.promote_types(torch.float32, x_t.dtype)
        x, inverse = x_t[rows].flatten(1).to(dtype), 0.5 / t[rows].double().square()
        zeros = torch.zeros(len(rows), dtype=dtype, device=x.device)
        total = ReferenceSums(
            torch.full_like(inverse, -torch.inf), zeros, zeros, torch.zeros_like(x)
        )
        for start in range(0, len(references.images), self.chunk):
            part = slice(start, start + self.chunk)
            y = references.images[part]
            y = y.to(dtype) / 127.5 - 1 if y.dtype == torch.uint8 else y.to(dtype)
            y = y.flatten(1)
            # |x|^2 is the same for all references and leaves the soft-max alone
            logits = (2 * x @ y.T - y.square().sum(1)).double() * inverse[:, None]
            hidden = batch.index[rows, None] == references.index[part]
            if references.labels is not None:
                assert batch.labels is not None
                hidden |= batch.labels[rows, None] != references.labels[part]
            logits = logits.masked_fill(hidden, -torch.inf)
            top = logits.max(1).values
            weights = (logits - top[:, None]).nan_to_num(nan=-torch.inf).exp().to(dtype)
            total = merge_sums(
                total,
                ReferenceSums(top, weights.sum(1), weights.square().sum(1), weights @ y),
            )
        return total


def own_sums(x_t: Tensor, t: Tensor, batch: Batch, rows: Tensor) -> ReferenceSums:
    """Sums of some rows over their own image alone."""
    dtype = torch.promote_types(torch.float32, x_t.dtype)
    x, y = x_t[rows].flatten(1).to(dtype), batch.x0[rows].flatten(1).to(dtype)
    top = (2 * (x * y).sum(1) - y.square().sum(1)).double() * (0.5 / t[rows].double().square())
    ones = torch.ones(len(rows), dtype=dtype, device=x.device)
    return ReferenceSums(top, ones, ones, y)
