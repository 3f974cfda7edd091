r"""Estimates of the posterior mean :math:`E[x_0 \mid x_t]`, in which regimes differ."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from cm_lightning.transfer import full_fp32, may_pick
from cm_lightning.types import Batch, ClassLayout, Denoiser, InputError, References, expand

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
    """A pretrained diffusion model's estimate (CD).

    Args:
        teacher: The diffusion model, guided or not, called as it is (in eval mode) and without
            gradient.
    """

    teacher: Denoiser

    def __call__(self, x_t: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """Denoise with the labels of the batch."""
        with torch.no_grad():
            mean: Tensor = self.teacher(x_t, t.to(x_t.dtype), batch.labels)
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
    r"""Sums over the union of two disjoint sets of references.

    .. math:: m = \max(m_a, m_b), \qquad S = e^{m_a - m} S_a + e^{m_b - m} S_b

    for weights and images; the sum of squares takes the squares of the factors. A set without a
    reference for a row has :math:`m = -\infty` there and adds nothing.

    Args:
        a: Sums over one set.
        b: Sums over the other.
    """
    top = torch.maximum(a.top, b.top)
    parts = []
    for sums in (a, b):
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
    ``x0``; on a CPU they are not computed. Where references lie class by class, rows meet those of
    their class alone, a tenth of the products for ten classes. References are streamed in chunks,
    so memory does not grow with their number beyond that of the set itself; all is computed in
    fp32 (float64 for float64 images) outside autocast and without TF32, which would pull the
    average towards the own image.

    Args:
        chunk: References per chunk, >= 1; ``None`` for as many as a CPU core's cache holds as
            floats (2 MiB), or 256 MiB of a GPU.
        skip: Rows whose nearest other reference is at least ``skip * t`` away keep ``x0``: a
            single other image at that distance has a weight of about 5e-5 at 8 (2e-3 at 6), and
            all together about 4e-6 (2e-3 to 8e-3) on images such as CIFAR-10's; 1,300 all
            at the very distance 8 would have 7e-2. ``None`` never skips.

    Raises:
        InputError: If an argument is outside its range, or a batch carries no references.
    """

    chunk: int | None = None
    skip: float | None = 8.0

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
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
        eligible = active
        if self.skip is not None and references.nearest is not None:
            active = active & (references.nearest < self.skip * t)
        with torch.no_grad(), torch.autocast(x_t.device.type, enabled=False), full_fp32():
            sums = merge_sums(
                own_sums(x_t, t, batch), self._sums_by_part(x_t, t, batch, references, active)
            )
            average = (sums.images / sums.weights[:, None]).reshape(x_t.shape)
        mean = torch.where(expand(active, x_t), average.to(x_t.dtype), batch.x0)
        if batch.notes is not None:
            weights = sums.weights.double()
            ess, largest = weights.square() / sums.squares, 1 / weights
            shift = (mean - batch.x0).flatten(1).square().mean(1)
            batch.notes["ess"] = torch.where(active, ess, 1).to(t.dtype)
            batch.notes["largest_weight"] = torch.where(active, largest, 1).to(t.dtype)
            batch.notes["skipped"] = (eligible & ~active).to(t.dtype)
            batch.notes["discrepancy"] = shift / t.square()
        return mean

    def _sums_by_part(
        self, x_t: Tensor, t: Tensor, batch: Batch, references: References, active: Tensor
    ) -> ReferenceSums:
        """Sums of each row over the part of the references that holds its class."""
        rows, parts = references.layout or ClassLayout(
            torch.arange(len(x_t), device=x_t.device), ((0, len(x_t), 0, len(references.images)),)
        )
        if may_pick(x_t.device):
            kept = active[rows]
            rows, ends = rows[kept], [0, *kept.cumsum(0).tolist()]
            parts = tuple((ends[first], ends[last], *part) for first, last, *part in parts)
        x_t, t, index = x_t[rows], t[rows], batch.index[rows]
        labels = None if batch.labels is None else batch.labels[rows]
        found = []
        for first, last, start, stop in parts:
            if last > first:
                own = batch._replace(
                    index=index[first:last], labels=None if labels is None else labels[first:last]
                )
                those = References(
                    references.images[start:stop],
                    None if references.labels is None else references.labels[start:stop],
                    references.index[start:stop],
                    squares=None if references.squares is None else references.squares[start:stop],
                )
                found.append(self.sums(x_t[first:last], t[first:last], own, those))
        whole = no_sums(batch.x0)
        if found:
            for values, sums in zip(whole, zip(*found, strict=True), strict=True):
                values[rows] = torch.cat(sums)
        return whole

    def sums(self, x_t: Tensor, t: Tensor, batch: Batch, references: References) -> ReferenceSums:
        """Sums over references, without the rows' own images.

        Args:
            x_t: Noisy images, ``(B, C, H, W)``.
            t: Their noise levels, ``(B,)``.
            batch: The batch.
            references: Any part of the references.

        Raises:
            InputError: If the references have labels and the batch has none.
        """
        dtype = torch.promote_types(torch.float32, x_t.dtype)
        x, inverse = x_t.flatten(1).to(dtype), 0.5 / t.double().square()
        total: ReferenceSums | None = None
        block = (1 << 21 if x.device.type == "cpu" else 1 << 28) // (4 * x.shape[1])
        chunk = self.chunk or max(block, 1)
        # no weight and no square of one underflows, where processors are ten times slower: logits
        # end at half of ln(tiny), and 1e-19 beside the largest weight, 1, does not count
        least = math.log(torch.finfo(dtype).tiny) / 2
        for start in range(0, len(references.images), chunk):
            part = slice(start, start + chunk)
            y = references.images[part].flatten(1)
            y = y.to(dtype).div_(127.5).sub_(1) if y.dtype == torch.uint8 else y.to(dtype)
            known = references.squares
            squares = (
                known[part] if known is not None and known.dtype == dtype else y.square().sum(1)
            )
            # |x|^2 is the same for all references and leaves the soft-max alone
            logits = torch.addmm(squares, x, y.T, beta=-1, alpha=2).double()
            logits *= inverse[:, None]
            hidden = batch.index[:, None] == references.index[part]
            if references.labels is not None:
                if batch.labels is None:
                    raise InputError("The references have labels and the batch has none.")
                hidden |= batch.labels[:, None] != references.labels[part]
            logits.masked_fill_(hidden, -torch.inf)
            top = logits.amax(1)
            # where all are hidden top is -inf, and merge_sums counts the chunk as nothing
            logits -= top.clamp_min(torch.finfo(top.dtype).min)[:, None]
            weights = logits.clamp_min_(least).to(dtype).exp_()
            sums = ReferenceSums(top, weights.sum(1), weights.square().sum(1), weights @ y)
            total = sums if total is None else merge_sums(total, sums)
        return no_sums(x_t) if total is None else total


def no_sums(x_t: Tensor) -> ReferenceSums:
    r"""Sums over no reference: :math:`m = -\infty`, all else 0.

    Args:
        x_t: Images ``(B, C, H, W)``, for their number, size and type.
    """
    images = torch.zeros_like(x_t.flatten(1), dtype=torch.promote_types(torch.float32, x_t.dtype))
    weights, squares = images.new_zeros(2, len(images))
    top = torch.full((len(images),), -torch.inf, dtype=torch.float64, device=x_t.device)
    return ReferenceSums(top, weights, squares, images)


def own_sums(x_t: Tensor, t: Tensor, batch: Batch) -> ReferenceSums:
    r"""Sums over the row's own image alone: its weight is 1 at the logit m.

    .. math:: m = \frac{2 \langle x_t, x_0 \rangle - \lVert x_0 \rVert^2}{2 t^2}

    which is :math:`-\lVert x_t - x_0 \rVert^2 / 2 t^2` but for a part that all images share.

    Args:
        x_t: Noisy images, ``(B, C, H, W)``.
        t: Their noise levels, ``(B,)``.
        batch: The batch.
    """
    dtype = torch.promote_types(torch.float32, x_t.dtype)
    x, y = x_t.flatten(1).to(dtype), batch.x0.flatten(1).to(dtype)
    top = (2 * (x * y).sum(1) - y.square().sum(1)).double() * (0.5 / t.double().square())
    ones = torch.ones(len(x), dtype=dtype, device=x.device)
    return ReferenceSums(top, ones, ones, y)
