"""Samplers as configuration: what to draw, with how many network calls, under which name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isclose

from torch import Tensor

from cm_lightning.sampling.consistency import check_eta, check_sigmas, multistep, phased
from cm_lightning.sampling.ode import euler, heun
from cm_lightning.sigmas import check_edges, karras_sigmas
from cm_lightning.types import Denoiser, InputError

__all__ = [
    "DEFAULT_SAMPLERS",
    "EulerSampler",
    "HeunSampler",
    "MultistepSampler",
    "PhasedSampler",
    "Sampler",
    "check_phases",
    "check_samplers",
]


class Sampler(ABC):
    """A way to turn noise into images."""

    @property
    @abstractmethod
    def nfe(self) -> int:
        """Number of function evaluations: network calls per image."""

    @property
    @abstractmethod
    def noises(self) -> int:
        """Number of unit-noise images consumed per image."""

    @property
    def start(self) -> float:
        """Level of the noise that sampling starts from, 0 where that is not known."""
        return 0.0

    @property
    def name(self) -> str:
        """Short name in logs and files, such as ``nfe2``."""
        return f"nfe{self.nfe}"

    @property
    def words(self) -> str:
        """What it does, in the rows of tables."""
        return str(self)

    @abstractmethod
    def __call__(self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Draw images from noise ``(noises, B, C, H, W)``; returns ``(B, C, H, W)``."""


@dataclass(frozen=True)
class MultistepSampler(Sampler):
    """Multistep consistency sampling, see :func:`~cm_lightning.sampling.multistep`.

    Args:
        sigmas: Decreasing noise levels, one network call each. Usual second levels: 0.821
            (CIFAR-10) and 1.526 (ImageNet-64).

    Raises:
        InputError: If the levels are not positive and decreasing.
    """

    sigmas: Sequence[float] = (80.0,)

    def __post_init__(self) -> None:
        check_sigmas(self.sigmas)

    @property
    def nfe(self) -> int:
        """One per level."""
        return len(self.sigmas)

    @property
    def noises(self) -> int:
        """One per level."""
        return len(self.sigmas)

    @property
    def start(self) -> float:
        """The largest level."""
        return self.sigmas[0]

    @property
    def words(self) -> str:
        """Such as ``sigmas 80 0.821``."""
        return "sigmas " + " ".join(f"{sigma:g}" for sigma in self.sigmas)

    def __call__(self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Draw images."""
        return multistep(denoiser, noise, self.sigmas, labels)


@dataclass(frozen=True)
class _GridSampler(Sampler):
    """A deterministic sampler of the probability-flow ODE on a Karras grid."""

    steps: int = 18
    sigma_min: float = 0.002
    sigma_max: float = 80.0

    def __post_init__(self) -> None:
        self.grid()

    def grid(self) -> Tensor:
        """The levels."""
        return karras_sigmas(self.steps, self.sigma_min, self.sigma_max)

    @property
    def noises(self) -> int:
        """Only the initial noise."""
        return 1

    @property
    def start(self) -> float:
        """The largest level."""
        return self.sigma_max

    @property
    def words(self) -> str:
        """Such as ``heun, 35 calls``."""
        usual = (self.sigma_min, self.sigma_max) == (_GridSampler.sigma_min, _GridSampler.sigma_max)
        ends = "" if usual else f" from {self.sigma_max:g} to {self.sigma_min:g}"
        return f"{type(self).__name__.removesuffix('Sampler').lower()}, {self.nfe} calls{ends}"


@dataclass(frozen=True)
class EulerSampler(_GridSampler):
    """First-order deterministic sampler, see :func:`~cm_lightning.sampling.euler`.

    Args:
        steps: Number of noise levels N >= 2 and of network calls.
        sigma_min: Last positive level.
        sigma_max: First level.

    Raises:
        InputError: If an argument is outside its range.
    """

    @property
    def nfe(self) -> int:
        """One per level."""
        return self.steps

    @property
    def name(self) -> str:
        """Such as ``euler_nfe18``."""
        return f"euler_nfe{self.nfe}"

    def __call__(self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Draw images."""
        return euler(denoiser, noise[0], self.grid(), labels)


@dataclass(frozen=True)
class HeunSampler(_GridSampler):
    """EDM's deterministic sampler for diffusion models, see :func:`~cm_lightning.sampling.heun`.

    Args:
        steps: Number of noise levels N >= 2; costs 2N - 1 network calls. CIFAR-10: 18.
        sigma_min: Last positive level.
        sigma_max: First level.

    Raises:
        InputError: If an argument is outside its range.
    """

    @property
    def nfe(self) -> int:
        """Two calls per step but one in the last."""
        return 2 * self.steps - 1

    def __call__(self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Draw images."""
        return heun(denoiser, noise[0], self.grid(), labels)


@dataclass(frozen=True)
class PhasedSampler(Sampler):
    """Deterministic sampling phase by phase, see :func:`~cm_lightning.sampling.phased`.

    Args:
        edges: The edges the model was trained with, from 0 upwards.
        eta: Edge skipping in (0, 1]; 1 for none.

    Raises:
        InputError: If the edges do not start at 0 and increase, or eta is outside (0, 1].
    """

    edges: Sequence[float]
    eta: float = 1.0

    def __post_init__(self) -> None:
        check_edges(self.edges)
        check_eta(self.eta)

    @property
    def nfe(self) -> int:
        """One per phase."""
        return len(self.edges) - 1

    @property
    def noises(self) -> int:
        """Only the initial noise."""
        return 1

    @property
    def name(self) -> str:
        """Such as ``phased_nfe4`` or ``phased_nfe4_eta0.8``."""
        return f"phased_nfe{self.nfe}" + ("" if self.eta == 1 else f"_eta{self.eta:g}")

    @property
    def words(self) -> str:
        """Such as ``phases 0 2.5 80, eta 0.8``."""
        eta = "" if self.eta == 1 else f", eta {self.eta:g}"
        return "phases " + " ".join(f"{edge:.4g}" for edge in self.edges) + eta

    @property
    def start(self) -> float:
        """The largest level."""
        return self.edges[-1]

    def __call__(self, denoiser: Denoiser, noise: Tensor, labels: Tensor | None) -> Tensor:
        """Draw images."""
        return phased(denoiser, noise[0], self.edges, labels, self.eta)


DEFAULT_SAMPLERS: tuple[Sampler, ...] = (
    MultistepSampler((80.0,)),
    MultistepSampler((80.0, 0.821)),
)
"""One step, and two steps with the middle level published for CIFAR-10."""


def check_samplers(samplers: Sequence[Sampler]) -> None:
    """Check that samplers can be told apart in logs.

    Raises:
        InputError: If there is none, or two share a name.
    """
    names = [sampler.name for sampler in samplers]
    if not names:
        raise InputError("samplers is empty: give at least one sampler.")
    if len(set(names)) < len(names):
        raise InputError(f"samplers must differ in their names, got {', '.join(names)}.")


def check_phases(edges: Sequence[float] | None, samplers: Sequence[Sampler], owner: str) -> None:
    """Check that a model trained in two phases or more is sampled by its own edges.

    It goes to the lower end of a level's phase and not to 0: what multistep sampling or other edges
    draw is no image.

    Args:
        edges: Edges of the model's phases, ``None`` without phases, where any sampler will do.
        samplers: The samplers.
        owner: Whose samplers they are, for messages.

    Raises:
        InputError: If one does not have these edges (relative tolerance 1e-4).
    """
    if edges is None or len(edges) == 2:
        return
    for sampler in samplers:
        its = sampler.edges if isinstance(sampler, PhasedSampler) else ()
        pairs = zip(its, edges, strict=False)
        if len(its) != len(edges) or not all(isclose(*pair, rel_tol=1e-4) for pair in pairs):
            text = ", ".join(f"{edge:g}" for edge in edges)
            raise InputError(
                f"The model is trained in phases with the edges {text}, and {owner} would draw it "
                f"by {sampler}: only PhasedSampler with these edges (--phases of cm-sample and "
                "cm-eval) follows them."
            )
