r"""Laws of the noise-level pair :math:`(t, r)` with :math:`0 \le r < t`.

A discretization is a pure function of the number of images seen: it keeps no state, so a resumed
run, another batch size or another number of GPUs cannot change it. Levels are float64.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Self

import torch
from torch import Tensor

from cm_lightning.sigmas import karras_sigmas, segments
from cm_lightning.transfer import constant
from cm_lightning.types import InputError, check_word

__all__ = [
    "Discretization",
    "DoublingGrid",
    "ECTMapping",
    "Grid",
    "GrowingGrid",
    "KarrasGrid",
    "LogNormal",
]


@dataclass(frozen=True)
class LogNormal:
    r"""Law of a single noise level: :math:`\ln \sigma \sim N(p_\text{mean}, p_\text{std}^2)`.

    Karras et al. 2022, arXiv:2206.00364. Not truncated, as in the official EDM and ECT code.

    Args:
        p_mean: Mean of the logarithm.
        p_std: Standard deviation of the logarithm, > 0.

    Raises:
        InputError: If ``p_std`` is not positive, or one of the two is not finite.
    """

    p_mean: float = -1.2
    p_std: float = 1.2

    def __post_init__(self) -> None:
        if not 0 < self.p_std < math.inf:
            raise InputError(f"LogNormal: p_std must be positive and finite, got {self.p_std}.")
        if not math.isfinite(self.p_mean):
            raise InputError(f"LogNormal: p_mean must be finite, got {self.p_mean}.")

    def sample(self, n: int, device: torch.device, generator: torch.Generator) -> Tensor:
        """Draw ``n`` noise levels, float64, shape ``(n,)``."""
        normal = torch.randn(n, device=device, generator=generator, dtype=torch.float64)
        return (self.p_mean + self.p_std * normal).exp()

    def sample_segments(
        self, n: int, edges: Sequence[float], device: torch.device, generator: torch.Generator
    ) -> Tensor:
        """Draw ``n`` levels that fall into every segment equally often, ``(n,)`` float64.

        Args:
            n: Number of levels.
            edges: Increasing edges; the end segments reach to 0 and to infinity.
            device: Where to draw.
            generator: Source of randomness on that device.
        """
        inner = constant(tuple(edges[1:-1]), torch.float64, device).log()
        below = torch.special.ndtr((inner - self.p_mean) / self.p_std)
        below = torch.cat([below.new_zeros(1), below, below.new_ones(1)])
        place = torch.rand(n, device=device, generator=generator, dtype=torch.float64)
        place *= len(below) - 1
        segment = place.long().clamp_max(len(below) - 2)
        mass = below[segment] + (place - segment) * below.diff()[segment]
        normal: Tensor = torch.special.ndtri(mass.clamp(1e-15, 1 - 1e-15))
        levels: Tensor = (self.p_mean + self.p_std * normal).exp()
        return levels


class Discretization(ABC):
    """Law of the pair (t, r) of noise levels that an objective compares."""

    @abstractmethod
    def sample(
        self,
        n: int,
        nimg: int,
        device: torch.device,
        generator: torch.Generator,
        edges: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs.

        Args:
            n: Number of pairs.
            nimg: Images seen so far, by all ranks.
            device: Where to draw.
            generator: Source of randomness on that device.
            edges: Edges of segments that t shall fall into equally often, following its law within
                each; ``None`` for the law itself.

        Returns:
            ``(t, r)``, each ``(n,)`` float64, ``0 <= r < t``.
        """

    @abstractmethod
    def stage(self, nimg: int) -> int:
        """Index of the discretization stage after ``nimg`` images, from 0."""

    def spanning(self, total_kimg: float) -> Discretization:
        """The same law, its schedule stretched over a run of ``total_kimg`` thousand images.

        A schedule that was given a length of its own keeps it.
        """
        return self


@dataclass(frozen=True)
class ECTMapping(Discretization):
    r"""ECT's continuous pairs whose gap shrinks by a factor ``q`` per stage.

    .. math:: \ln t \sim N(p_\text{mean}, p_\text{std}^2), \qquad
              r = \max\bigl(0,\; t\,(1 - n(t)\, q^{-(s+1)})\bigr), \qquad
              n(t) = 1 + k\,\mathrm{sigmoid}(-b t)

    with stage :math:`s = \lfloor m\, \text{nimg} / (1000\,\text{kimg\_per\_stage}) \rfloor / m`, at
    most ``stages - 1``. Geng et al. 2024 (ECT), arXiv:2406.14548. The official code starts a stage
    up to one batch later because it counts in ticks; stages here begin at exact multiples.

    ``substeps`` m = 1 is ECT's staircase. SCT shrinks "smoother" (arXiv:2410.18958, whose formula
    is not recoverable): m = 4 spreads each factor q over four shrinks of :math:`q^{1/4}`, ``None``
    shrinks continuously; both ends stay ECT's.

    Args:
        p_mean: Mean of ln t. CIFAR-10: -1.1, ImageNet-64: -0.8.
        p_std: Standard deviation of ln t. CIFAR-10: 2.0, ImageNet-64: 1.6.
        q: Shrinking factor per stage, > 1. CIFAR-10: 2, ImageNet-64: 4, one-hour recipe: 256 with
            the first stage alone.
        k: Height of the sigmoid, >= 0.
        b: Slope of the sigmoid, >= 0.
        kimg_per_stage: Length of a stage in thousands of images, > 0.
        stages: Number of stages, >= 1; those that a run reaches have ``q**stages`` at most 2^24,
            as closer levels are one and the same in fp32.
        substeps: m >= 1, or ``None`` for infinitely many.

    Raises:
        InputError: If an argument is outside its range.
    """

    p_mean: float = -1.1
    p_std: float = 2.0
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    kimg_per_stage: float = 3200.0
    stages: int = 8
    substeps: int | None = 1

    def __post_init__(self) -> None:
        for name, ok, allowed in (
            ("p_mean", math.isfinite(self.p_mean), "finite"),
            ("p_std", 0 < self.p_std < math.inf, "positive and finite"),
            ("q", 1 < self.q < math.inf, "greater than 1 and finite"),
            ("k", 0 <= self.k < math.inf, "0 or more and finite"),
            ("b", 0 <= self.b < math.inf, "0 or more and finite"),
            ("kimg_per_stage", self.kimg_per_stage > 0, "positive"),
            ("stages", self.stages >= 1, "1 or more"),
            ("substeps", self.substeps is None or self.substeps >= 1, "1 or more, or null"),
        ):
            if not ok:
                raise InputError(
                    f"ECTMapping: {name} must be {allowed}, got {getattr(self, name)}."
                )

    def spanning(self, total_kimg: float) -> ECTMapping:
        """The mapping itself, whose stages have a length of their own.

        Raises:
            InputError: If its last stages in such a run bring t and r closer than fp32 can tell.
        """
        last, most = self.progress(round(1000 * total_kimg)), 24 / math.log2(self.q)
        if last + 1 > most:
            raise InputError(
                f"ECTMapping: with q {self.q:g} and stages of {self.kimg_per_stage:g} kimg t and r "
                f"come closer within {total_kimg:g} kimg than fp32 can tell apart: give at most "
                f"{max(1, int(most))} stages, or longer ones."
            )
        return self

    def progress(self, nimg: int) -> float:
        """Stage after ``nimg`` images, with its fraction."""
        stage = nimg / (1000 * self.kimg_per_stage)
        if self.substeps is not None:
            stage = math.floor(self.substeps * stage) / self.substeps
        return min(stage, self.stages - 1)

    def stage(self, nimg: int) -> int:
        """Index of the whole stage after ``nimg`` images."""
        return math.floor(self.progress(nimg))

    def r(self, t: Tensor, stage: float) -> Tensor:
        """Give the smaller level at a stage, same shape and dtype as ``t``."""
        n = 1 + self.k * torch.sigmoid(-self.b * t)
        gap: Tensor = n * self.q ** -(stage + 1)
        return (t * (1 - gap)).clamp_min(0)

    def sample(
        self,
        n: int,
        nimg: int,
        device: torch.device,
        generator: torch.Generator,
        edges: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs, each ``(n,)`` float64."""
        law = LogNormal(self.p_mean, self.p_std)
        if edges is None:
            t = law.sample(n, device, generator)
        else:
            t = law.sample_segments(n, edges, device, generator)
        return t, self.r(t, self.progress(nimg))


@dataclass(frozen=True, kw_only=True)
class Grid(Discretization):
    r"""Neighbours on a Karras grid :math:`\sigma_1 < \dots < \sigma_N`: base of the grids below.

    .. math:: (t, r) = (\sigma_{i+1}, \sigma_i), \qquad i \sim p(i), \quad i = 1, \dots, N - 1

    with p uniform, or a log-normal law of the level in discrete form (iCT, arXiv:2310.14189):
    :math:`p(i) \propto \mathrm{erf}\bigl(\tfrac{\ln \sigma_{i+1} - p_\text{mean}}{\sqrt 2
    p_\text{std}}\bigr) - \mathrm{erf}\bigl(\tfrac{\ln \sigma_i - p_\text{mean}}{\sqrt 2
    p_\text{std}}\bigr)`. The smallest level is never t. Both ends of the grid are exact, where
    official code leaves a rounding error of 3e-18 at 0.002.

    Args:
        sigma_min: Smallest level, > 0; a denoiser's own ``sigma_min`` should equal it.
        sigma_max: Largest level, > ``sigma_min``.
        rho: Curvature of the grid, > 0.
        noise: Log-normal law of the level, or ``None`` for uniform indices.

    Raises:
        InputError: If an argument is outside its range.
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    noise: LogNormal | None = None

    def __post_init__(self) -> None:
        karras_sigmas(2, self.sigma_min, self.sigma_max, self.rho)

    @abstractmethod
    def size(self, nimg: int) -> int:
        """Number of levels N after ``nimg`` images, >= 2."""

    def levels(self, nimg: int, device: torch.device | None = None) -> Tensor:
        """The levels in increasing order, float64, ``(N,)``."""
        n = self.size(nimg)
        return karras_sigmas(n, self.sigma_min, self.sigma_max, self.rho, device).flip(0)

    def probabilities(self, nimg: int, device: torch.device | None = None) -> Tensor:
        """Probability of each pair of neighbours, float64, ``(N - 1,)``, smallest levels first."""
        levels = self.levels(nimg, device)
        if self.noise is None:
            return torch.ones_like(levels[1:]) / (len(levels) - 1)
        scaled = (levels.log() - self.noise.p_mean) / (math.sqrt(2) * self.noise.p_std)
        mass = torch.erf(scaled).diff()
        return mass / mass.sum()

    def sample(
        self,
        n: int,
        nimg: int,
        device: torch.device,
        generator: torch.Generator,
        edges: Sequence[float] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` pairs of neighbours, each ``(n,)`` float64."""
        levels = self.levels(nimg, device)
        probabilities = self.probabilities(nimg, device)
        if edges is not None:
            segment = segments(levels[1:], edges)
            mass = torch.zeros(len(edges) - 1, dtype=torch.float64, device=device)
            mass.index_add_(0, segment, probabilities)
            probabilities = probabilities / mass[segment] / (mass > 0).sum()
        below = probabilities.cumsum(0)
        u = torch.rand(n, device=device, generator=generator, dtype=torch.float64)
        index = torch.searchsorted(below, u, right=True).clamp_max(len(levels) - 2)
        return levels[index + 1], levels[index]


@dataclass(frozen=True)
class KarrasGrid(Grid):
    """A fixed number of levels (CD, arXiv:2303.01469): 18 on CIFAR-10, 40 on ImageNet-64.

    Args:
        n: Number of levels, >= 2.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: Curvature of the grid, > 0.
        noise: Log-normal law of the level, or ``None`` for uniform indices.

    Raises:
        InputError: If an argument is outside its range.
    """

    n: int = 18

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n < 2:
            raise InputError(f"KarrasGrid: n must be 2 or more, got {self.n}.")

    def size(self, nimg: int) -> int:
        """Always ``n``."""
        return self.n

    def stage(self, nimg: int) -> int:
        """Always 0."""
        return 0


@dataclass(frozen=True)
class _Scheduled(Grid):
    """A grid that grows to ``s1`` intervals over the run."""

    s0: int = 2
    s1: int = 150
    total_kimg: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if not 1 <= self.s0 <= self.s1:
            raise InputError(f"{name}: needs 1 <= s0 <= s1, got s0 {self.s0} and s1 {self.s1}.")
        if self.total_kimg is not None and not 0.001 <= self.total_kimg < math.inf:
            raise InputError(
                f"{name}: total_kimg must be 0.001 (one image) or more and finite, got "
                f"{self.total_kimg}."
            )

    def spanning(self, total_kimg: float) -> Self:
        """The grid with ``total_kimg`` as its length unless it has one."""
        return self if self.total_kimg is not None else replace(self, total_kimg=total_kimg)

    @property
    def total_nimg(self) -> int:
        """Length of the schedule in images.

        Raises:
            InputError: If it has none yet.
        """
        if self.total_kimg is None:
            raise InputError(f"{type(self).__name__} has no length: give total_kimg.")
        return round(1000 * self.total_kimg)


@dataclass(frozen=True)
class GrowingGrid(_Scheduled):
    r"""CT's grid, which grows with the square root of progress, and its target rate.

    .. math:: N(p) = \Bigl\lceil \sqrt{p\,((s_1 + 1)^2 - s_0^2) + s_0^2} - 1 \Bigr\rceil + 1,
              \qquad \mu(p) = \exp\Bigl(\frac{s_0 \ln \mu_0}{N(p) - 1}\Bigr)

    with progress :math:`p = \text{nimg} / \text{total}`, the official code's k / K (Song et al.
    2023, arXiv:2303.01469). The paper divides by N(p) in :math:`\mu`, the code by N(p) - 1;
    ``rate`` chooses.

    Args:
        s0: Levels at the start (two at least), >= 1.
        s1: Intervals at the end. CIFAR-10: 150, ImageNet-64: 200.
        total_kimg: Length of the schedule, ``None`` for that of the run.
        mu0: Target rate at the start, in (0, 1). CIFAR-10: 0.9, ImageNet-64: 0.95.
        rate: ``"code"`` or ``"paper"``.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: Curvature of the grid, > 0.
        noise: Log-normal law of the level, or ``None`` for uniform indices.

    Raises:
        InputError: If an argument is outside its range.
    """

    mu0: float = 0.9
    rate: Literal["code", "paper"] = "code"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_word("GrowingGrid: rate", self.rate, ("code", "paper"))
        if not 0 < self.mu0 < 1:
            raise InputError(f"GrowingGrid: mu0 must lie between 0 and 1, got {self.mu0}.")

    def size(self, nimg: int) -> int:
        """Number of levels N."""
        progress = min(nimg / self.total_nimg, 1)
        intervals = math.sqrt(progress * ((self.s1 + 1) ** 2 - self.s0**2) + self.s0**2) - 1
        return max(math.ceil(intervals), 1) + 1

    def stage(self, nimg: int) -> int:
        """Levels added since the start."""
        return self.size(nimg) - self.size(0)

    def target_rate(self, nimg: int) -> float:
        """Share mu of the target network that survives a step after ``nimg`` images, in (0, 1)."""
        scales = self.size(nimg) - (self.rate == "code")
        return math.exp(self.s0 * math.log(self.mu0) / scales)


@dataclass(frozen=True)
class DoublingGrid(_Scheduled):
    r"""iCT's grid, which doubles its intervals at equal distances, with log-normal indices.

    .. math:: N = \min\bigl(s_0\, 2^{\lfloor \text{nimg} / K' \rfloor}, s_1\bigr) + 1, \qquad
              K' = \Bigl\lfloor \frac{K}{\log_2 \lfloor s_1 / s_0 \rfloor + 1} \Bigr\rfloor

    with K the run's length in images (Song and Dhariwal 2023, arXiv:2310.14189, there in steps).
    The defaults give 11, 21, 41, ..., 1281 levels, an eighth of the run each.

    Args:
        s0: Intervals at the start, >= 1.
        s1: Intervals at the end.
        total_kimg: Length of the schedule, ``None`` for that of the run.
        sigma_min: Smallest level, > 0.
        sigma_max: Largest level.
        rho: Curvature of the grid, > 0.
        noise: Log-normal law of the level, or ``None`` for uniform indices.

    Raises:
        InputError: If an argument is outside its range.
    """

    noise: LogNormal | None = field(default=LogNormal(-1.1, 2.0), kw_only=True)
    s0: int = 10
    s1: int = 1280

    def stage(self, nimg: int) -> int:
        """Number of doublings."""
        stages = math.log2(self.s1 // self.s0) + 1
        length = max(math.floor(self.total_nimg / stages), 1)
        return min(nimg // length, math.ceil(math.log2(self.s1 / self.s0)))

    def size(self, nimg: int) -> int:
        """Number of levels N."""
        return int(min(self.s0 * 2 ** self.stage(nimg), self.s1)) + 1
