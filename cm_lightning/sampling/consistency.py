r"""Sampling from a consistency model in one or a few network calls."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from cm_lightning.sigmas import LARGEST, SMALLEST, check_edges
from cm_lightning.types import Denoiser, InputError

__all__ = ["check_eta", "check_labels", "check_sigmas", "image_noise", "multistep", "phased"]


def check_sigmas(sigmas: Sequence[float] | Tensor | np.ndarray) -> list[float]:
    """Check a sampling grid.

    Args:
        sigmas: Noise levels.

    Returns:
        The levels.

    Raises:
        InputError: If it is empty, has a level outside 1e-12...1e12, or does not decrease.
    """
    if isinstance(sigmas, (Tensor, np.ndarray)):
        sigmas = sigmas.tolist()
    sigmas = [float(sigma) for sigma in sigmas]
    if not sigmas:
        raise InputError("sigmas is empty: give at least one noise level, such as 80.")
    for sigma in sigmas:
        if not SMALLEST <= sigma <= LARGEST:
            raise InputError(f"sigmas must lie in {SMALLEST:g} to {LARGEST:g}, got {sigma:g}.")
    for larger, smaller in pairwise(sigmas):
        if smaller >= larger:
            raise InputError(f"sigmas must decrease, got {larger:g} followed by {smaller:g}.")
    return sigmas


def check_labels(denoiser: Denoiser, labels: Tensor | None, n: int) -> None:
    """Check labels before they are used.

    Args:
        denoiser: The model; one without classes is asked nothing.
        labels: Class indices, or ``None``.
        n: Number of images.

    Raises:
        InputError: If they are no whole numbers ``(n,)``, outside -1 ("no class") and the model's
            classes, or missing for a model that never saw an image without one.
    """
    if not denoiser.num_classes:
        return
    if labels is None:
        if denoiser.label_dropout == 0:
            raise InputError(
                f"The model was trained with labels alone (label_dropout 0): give labels in "
                f"0..{denoiser.num_classes - 1}."
            )
        return
    whole = isinstance(labels, Tensor) and not labels.is_floating_point()
    if not whole or labels.shape != (n,):
        found = f"shape {tuple(labels.shape)}" if whole else "other values"
        raise InputError(f"labels must be {n} whole numbers in a tensor, one each, got {found}.")
    low, high = (int(value) for value in labels.aminmax()) if n else (0, 0)
    if low < -1 or high >= denoiser.num_classes:
        raise InputError(
            f"labels must lie in 0..{denoiser.num_classes - 1}, or be -1 for no class, got "
            f"{low} to {high}."
        )


def image_noise(seed: int, index: Sequence[int], steps: int, shape: Sequence[int]) -> Tensor:
    """Unit noise of given images, a pure function of (seed, image number).

    Drawn on the CPU, so neither the batch size, nor the number of devices, nor their kind
    changes the noise of an image.

    Args:
        seed: Seed, >= 0.
        index: Image numbers >= 0, B of them.
        steps: Number of sampling steps S; the noise of the first steps does not depend on it.
        shape: Image shape ``(C, H, W)``.

    Returns:
        fp32 tensor ``(S, B, C, H, W)``.

    Raises:
        InputError: If the seed or an image number is negative.
    """
    index = [int(image) for image in index]
    if seed < 0 or min(index, default=0) < 0:
        raise InputError(
            f"Seed and image numbers must be 0 or more, got seed {seed} and images from "
            f"{min(index, default=0)}."
        )
    noise = torch.empty(steps, len(index), *shape)
    generator = torch.Generator()
    for row, image in enumerate(index):
        state = np.random.SeedSequence((seed, image)).generate_state(1, np.uint64)
        generator.manual_seed(int(state[0]) >> 1)
        for step in range(steps):
            noise[step, row] = torch.randn(*shape, generator=generator)
    return noise


@torch.no_grad()
def multistep(
    denoiser: Denoiser,
    noise: Tensor,
    sigmas: Sequence[float] | Tensor,
    labels: Tensor | None = None,
) -> Tensor:
    r"""Multistep consistency sampling (Song et al. 2023, arXiv:2303.01469, Algorithm 1).

    .. math:: x \leftarrow f(\sigma_1 z_1, \sigma_1), \qquad
              x \leftarrow f(x + \sigma_i z_i, \sigma_i), \quad i = 2, \dots, S

    As in the official ECT code the added noise is :math:`\sigma_i z_i` in float64; OpenAI's code
    adds :math:`\sqrt{\sigma_i^2 - \sigma_\text{min}^2}\, z_i` and clamps. Nothing is clamped here.
    No gradient is kept.

    Args:
        denoiser: The consistency model; it is called in its current mode (use ``eval()``).
        noise: Unit noise ``(S, B, C, H, W)``, see :func:`image_noise`.
        sigmas: S decreasing noise levels, such as ``[80.0]`` or ``[80.0, 0.821]``; S network calls.
        labels: Class indices ``(B,)`` or ``None``.

    Returns:
        Images ``(B, C, H, W)`` in about [-1, 1], in the dtype of the noise.

    Raises:
        InputError: If the levels are not positive and decreasing, if there are fewer noises than
            levels, or if labels are not the model's.
    """
    sigmas = check_sigmas(sigmas)
    check_labels(denoiser, labels, noise.shape[1])
    if len(noise) < len(sigmas):
        raise InputError(f"{len(sigmas)} sigmas need as many noise tensors, got {len(noise)}.")
    x = torch.zeros_like(noise[0], dtype=torch.float64)
    for sigma, z in zip(sigmas, noise, strict=False):
        x = x + sigma * z.double()
        level = torch.full((len(z),), sigma, device=z.device, dtype=z.dtype)
        x = denoiser(x.to(z.dtype), level, labels).double()
    return x.to(noise.dtype)


def check_eta(eta: float) -> None:
    """Check the strength of edge skipping.

    Raises:
        InputError: If it is outside (0, 1].
    """
    if not 0 < eta <= 1:
        raise InputError(f"eta must lie in (0, 1], got {eta:g}.")


@torch.no_grad()
def phased(
    denoiser: Denoiser,
    noise: Tensor,
    edges: Sequence[float],
    labels: Tensor | None = None,
    eta: float = 1.0,
) -> Tensor:
    r"""Deterministic sampling of a model trained in phases (SCT, arXiv:2410.18958).

    .. math:: x \leftarrow D(x, t) + \tfrac{s}{t}\,\bigl(x - D(x, t)\bigr), \qquad t \leftarrow s,
              \qquad s = \eta\, e_m, \quad m = M - 1, \dots, 1, \quad \text{at last } s = 0

    from :math:`x = e_M z`. No noise is added. With :math:`\eta < 1` the model is never asked on an
    edge, where the function it has learned jumps ("edge skipping"; the paper's formula is not
    recoverable, this is ours). With one phase it is one-step sampling. No gradient is kept.

    Args:
        denoiser: The consistency model; it is called in its current mode (use ``eval()``).
        noise: Unit noise ``(B, C, H, W)``.
        edges: Increasing levels from 0 to the first level, M + 1 of them; M network calls.
        labels: Class indices ``(B,)`` or ``None``.
        eta: :math:`\eta` in (0, 1].

    Returns:
        Images ``(B, C, H, W)`` in the dtype of the noise.

    Raises:
        InputError: If the edges do not start at 0 and increase, if eta is outside (0, 1], or if
            labels are not the model's.
    """
    check_edges(edges)
    check_labels(denoiser, labels, len(noise))
    check_eta(eta)
    sigma = float(edges[-1])
    x = sigma * noise.double()
    for edge in reversed(edges[:-1]):
        end = eta * float(edge)
        level = torch.full((len(noise),), sigma, device=noise.device, dtype=noise.dtype)
        clean: Tensor = denoiser(x.to(noise.dtype), level, labels).double()
        x, sigma = clean + end / sigma * (x - clean), end
    return x.to(noise.dtype)
