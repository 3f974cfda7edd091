"""Every score of one set of samples, from one pass of the feature extractor over them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cm_lightning.evaluation.features import FeatureExtractor
from cm_lightning.evaluation.frechet import frechet_distance
from cm_lightning.evaluation.reference import Statistics
from cm_lightning.types import InputError

__all__ = ["SCORES", "Outputs", "check_scores", "extract", "scores"]

SCORES = ("fd", "kid", "is", "prc")
"""Names of the scores: Frechet distance, kernel distance, Inception score, precision and recall."""

KID_SUBSET = 1000
"""Images per subset of the kernel distance, as published."""


class Outputs(NamedTuple):
    """What an extractor says of a set of images.

    Attributes:
        features: ``(N, D)`` float32, on the CPU.
        logits: ``(N, K)`` float32, ``None`` for an extractor without classes.
    """

    features: Tensor
    logits: Tensor | None


def extract(extractor: FeatureExtractor, images: Tensor) -> Outputs:
    """Features, and logits if the extractor has them, of one batch.

    Args:
        extractor: The network.
        images: uint8, ``(B, C, H, W)``.
    """
    features, logits = extractor.outputs(images)
    return Outputs(features.cpu(), None if logits is None else logits.cpu())


def check_scores(
    names: Sequence[str], n: int, real: int | None, extractor: FeatureExtractor
) -> None:
    """Check that scores can be computed.

    Args:
        names: Some of :data:`SCORES`.
        n: Number of samples.
        real: Number of real images at hand, ``None`` if only their statistics are.
        extractor: The network.

    Raises:
        InputError: If a name is unknown, or images or logits are missing for one.
    """
    for name in names:
        if name not in SCORES:
            raise InputError(f"The score '{name}' is unknown: choose from {', '.join(SCORES)}.")
    if n < 2:
        raise InputError(f"Scores need at least 2 samples, got {n}.")
    if real is None and {"kid", "prc"} & set(names):
        raise InputError(
            "kid and prc compare with real images, and there are only their statistics: name the "
            "data, or leave them out."
        )
    if "kid" in names and min(n, real or 0) < KID_SUBSET:
        raise InputError(
            f"kid averages over subsets of {KID_SUBSET} images, and there are {n} samples and "
            f"{real} real images: draw more samples, or leave it out."
        )
    if "is" in names and not extractor.has_logits:
        raise InputError(f"is needs class scores, which the features {extractor.name} lack.")


def scores(
    names: Sequence[str],
    fake: Outputs,
    statistics: Statistics,
    real: Tensor | None,
    kid_subset: int = KID_SUBSET,
    device: torch.device | str = "cpu",
) -> dict[str, float]:
    """Scores of a set of samples.

    The Frechet distance is this package's, exact for singular covariances and in float64 (that of
    torch-fidelity takes a non-symmetric matrix root, and agrees); the others are torch-fidelity's
    functions on the same features: the kernel distance with its cubic kernel over 100 subsets of
    1,000 (``kid``, and ``kid_std`` over subsets), the Inception score over 10 splits (``is``,
    ``is_std``), and improved precision and recall with k = 3 (``precision``, ``recall``;
    Kynkaanniemi et al., arXiv:1904.06991). torchmetrics lacks the last, and feeds its own resized
    images to the others.

    Args:
        names: Some of :data:`SCORES`.
        fake: Outputs of the samples.
        statistics: Mean and covariance of the real features.
        real: Real features ``(M, D)`` for ``kid`` and ``prc``.
        kid_subset: Images per subset of the kernel distance.
        device: Where the large products of ``fd`` and ``prc`` are computed.
    """
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    found: dict[str, float] = {}
    if "fd" in names:
        x = fake.features.to(device).double()
        mu = x.mean(0)
        sigma = (x - mu).T @ (x - mu) / (len(x) - 1)
        found["fd"] = frechet_distance(
            mu, sigma, statistics.mu.to(device), statistics.sigma.to(device)
        )
    if "kid" in names:
        result = kid_features_to_metric(
            fake.features, real, kid_subset_size=kid_subset, verbose=False
        )
        found["kid"] = result["kernel_inception_distance_mean"]
        found["kid_std"] = result["kernel_inception_distance_std"]
    if "is" in names:
        result = isc_features_to_metric(fake.logits)
        found["is"] = result["inception_score_mean"]
        found["is_std"] = result["inception_score_std"]
    if "prc" in names:
        assert real is not None
        dtype = torch.promote_types(fake.features.dtype, real.dtype)
        result = prc_features_to_metric(
            fake.features.to(device, dtype),
            real.to(device, dtype),
            save_cpu_ram=True,
            verbose=False,
        )
        found["precision"], found["recall"] = result["precision"], result["recall"]
    return {name: float(value) for name, value in found.items()}
