"""Mean and covariance of the features of real images, computed once and cached."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, distributed

from cm_lightning.archives import read_npz
from cm_lightning.evaluation.features import FeatureExtractor
from cm_lightning.files import hash_file, read_pickled_arrays, replacing
from cm_lightning.types import InputError

__all__ = ["Statistics", "load_statistics", "reference_name", "reference_statistics"]


class Statistics(NamedTuple):
    """What a Frechet distance knows of a set of images.

    Attributes:
        mu: Mean of the features, ``(D,)``, float64.
        sigma: Covariance of the features, divided by ``n - 1``, ``(D, D)``, float64.
        n: Number of images.
    """

    mu: Tensor
    sigma: Tensor
    n: int

    @classmethod
    def from_sums(cls, total: Tensor, outer: Tensor, n: int) -> Statistics:
        """Statistics from the sum of the features, of their outer products, and their number."""
        mu = total / n
        return cls(mu, (outer - n * torch.outer(mu, mu)) / (n - 1), n)


def reference_statistics(
    store_images: npt.NDArray[np.uint8],
    fingerprint: str,
    extractor: FeatureExtractor,
    *,
    cache: Path | None,
    device: torch.device | str,
    batch: int = 256,
    rank: int = 0,
    world: int = 1,
) -> Statistics:
    """Statistics of all stored images, as stored: no flip, no resampling.

    With several processes each computes every ``world``-th image and the float64 sums are added;
    all of them must call this, and all get the same result.

    Args:
        store_images: Grey levels, shape ``(N, C, H, W)``, uint8, usually memory-mapped, ``N >= 2``.
        fingerprint: Fingerprint of the images, part of the key of the cache.
        extractor: Computes the features.
        cache: Folder to keep the result in, under ``reference/``; ``None`` to keep nothing.
        device: Where to compute.
        batch: Images per pass.
        rank: Number of this process.
        world: Number of processes.

    Returns:
        Mean, covariance and number of images, on the CPU.

    Raises:
        InputError: If there are fewer than two images, or the features cannot be computed.
    """
    n = len(store_images)
    if n < 2:
        raise InputError(f"Reference statistics need at least 2 images, the data set has {n}.")
    features = extractor.fingerprint
    path = None
    if cache is not None:
        path = Path(cache) / "reference" / f"{fingerprint[:16]}-{features[:16]}.npz"
    cached = None
    if path is not None and rank == 0:
        cached = _read_cache(path, fingerprint, features, store_images, extractor.num_features)
    if world > 1:
        cached = _broadcast(cached, (n, extractor.num_features), torch.device(device))
    if cached is not None:
        return cached
    total, outer = _sums(store_images[rank::world], extractor, torch.device(device), batch)
    if world > 1:
        distributed.all_reduce(total)
        distributed.all_reduce(outer)
    result = Statistics.from_sums(total.cpu(), outer.cpu(), n)
    if path is not None and rank == 0:
        _write_cache(path, fingerprint, features, store_images, result)
    return result


@cache
def reference_name(reference: str) -> str:
    """What tells reference statistics from others: ``"auto"``, or a file by name and SHA-256.

    Args:
        reference: ``"auto"``, or a file.
    """
    path = Path(reference).expanduser()
    if reference == "auto" or not path.is_file():
        return reference
    return f"{path.name} {hash_file(path)[:16]}"


def load_statistics(
    path: str | Path,
    *,
    data: str | None = None,
    features: str | None = None,
    metric: str = "fid",
) -> tuple[Tensor, Tensor]:
    """Read published statistics: an ``.npz`` of EDM or ADM, or a ``.pkl`` of EDM2.

    Args:
        path: The file, with ``mu`` and ``sigma``; EDM2's has them under ``fid`` and ``fd_dinov2``.
            Nothing in it is executed.
        data: Fingerprint of the images samples are to be compared with. A file that carries the
            fingerprint of others is refused (those of ``cm-data stats`` do, EDM's and ADM's not).
        features: The same for the fingerprint of the features.
        metric: Which statistics of a ``.pkl``.

    Returns:
        Mean ``(D,)`` and covariance ``(D, D)`` of the features, float64.

    Raises:
        InputError: If the file is missing, holds no such pair of finite arrays, or is of other
            images or features.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f"The reference statistics {path} do not exist.")
    arrays = _read_pickle(path, metric) if path.suffix == ".pkl" else _read_npz(path)
    if arrays is None:
        raise InputError(f"{path} must be an .npz of plain arrays with `mu` and `sigma`.")
    missing = [key for key in ("mu", "sigma") if key not in arrays]
    if missing:
        raise InputError(
            f"{path} has no `{missing[0]}`; reference statistics need `mu` and `sigma`, the file "
            f"has {sorted(arrays)}."
        )
    for key, wanted in (("fingerprint", data), ("features", features)):
        found = str(arrays.get(key, wanted))
        if wanted is not None and found != wanted:
            what = "images" if key == "fingerprint" else "features"
            raise InputError(
                f"{path} was made from other {what} ({found[:16]}, here {wanted[:16]}), so a "
                "distance to it would compare with nothing: make statistics of these by cm-data "
                "stats, or accept it all the same (accept_reference)."
            )
    mu, sigma = arrays["mu"], arrays["sigma"]
    if (
        mu.ndim != 1
        or sigma.shape != (len(mu), len(mu))
        or {mu.dtype.kind, sigma.dtype.kind} - {*"fiu"}
    ):
        raise InputError(
            f"{path} must hold numbers `mu` (D,) and `sigma` (D, D), got {mu.dtype} {mu.shape} "
            f"and {sigma.dtype} {sigma.shape}."
        )
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise InputError(f"{path} holds NaN or infinite values in `mu` or `sigma`.")
    return _tensor(mu), _tensor(sigma)


def _sums(
    images: npt.NDArray[np.uint8], extractor: FeatureExtractor, device: torch.device, batch: int
) -> tuple[Tensor, Tensor]:
    d = extractor.num_features
    total = torch.zeros(d, dtype=torch.float64, device=device)
    outer = torch.zeros(d, d, dtype=torch.float64, device=device)
    for start in range(0, len(images), batch):
        rows = torch.from_numpy(np.array(images[start : start + batch]))
        features = extractor(rows.to(device)).double()
        total += features.sum(0)
        outer += features.T @ features
    return total, outer


def _broadcast(
    cached: Statistics | None, shape: tuple[int, int], device: torch.device
) -> Statistics | None:
    """Give all processes what the first one found, so that none waits for another."""
    n, d = shape
    hit = torch.tensor(int(cached is not None), device=device)
    distributed.broadcast(hit, 0)
    if not hit:
        return None
    mu = torch.zeros(d, dtype=torch.float64) if cached is None else cached.mu
    sigma = torch.zeros(d, d, dtype=torch.float64) if cached is None else cached.sigma
    mu, sigma = mu.to(device), sigma.to(device)
    distributed.broadcast(mu, 0)
    distributed.broadcast(sigma, 0)
    return Statistics(mu.cpu(), sigma.cpu(), n)


def _read_cache(
    path: Path, fingerprint: str, features: str, images: npt.NDArray[np.uint8], d: int
) -> Statistics | None:
    """The cached statistics, or ``None`` if there are none or they are not of this data.

    A store says its own fingerprint. So that one with a wrong one leaves no statistics for others,
    some of the images that these were made of are compared, which it could not know beforehand.
    """
    arrays, n = (_read_npz(path) if path.is_file() else None) or {}, len(images)
    expected = {"fingerprint": fingerprint, "features": features, "n": str(n)}
    if any(str(arrays.get(key)) != value for key, value in expected.items()):
        return None
    rows = arrays.get("rows", np.zeros(0))
    if (
        rows.dtype != np.int64
        or rows.ndim != 1
        or not len(rows)
        or rows.min() < 0
        or rows.max() >= n
    ):
        return None
    if str(arrays.get("pixels")) != _pixels(images, rows):
        return None
    try:
        mu, sigma = load_statistics(path)
    except InputError:
        return None
    return Statistics(mu, sigma, n) if len(mu) == d else None


def _pixels(images: npt.NDArray[np.uint8], rows: npt.NDArray[np.int64]) -> str:
    return hashlib.sha256(np.ascontiguousarray(images[rows]).tobytes()).hexdigest()


def _write_cache(
    path: Path, fingerprint: str, features: str, images: npt.NDArray[np.uint8], result: Statistics
) -> None:
    rows = np.sort(np.random.default_rng().choice(len(images), min(64, len(images)), replace=False))
    with replacing(path) as partial:
        np.savez(
            partial,
            mu=result.mu.numpy(),
            sigma=result.sigma.numpy(),
            n=np.array(result.n),
            fingerprint=np.array(fingerprint),
            features=np.array(features),
            rows=rows,
            pixels=np.array(_pixels(images, rows)),
        )


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]] | None:
    """All arrays of an ``.npz``, or ``None`` if it is damaged or not made of plain arrays."""
    try:
        return read_npz(path)
    except InputError:
        return None


def _read_pickle(path: Path, metric: str) -> dict[str, npt.NDArray[Any]]:
    """Mean and covariance over the features of a metric in a file of EDM2."""
    try:
        found = read_pickled_arrays(path)[metric]
        return {key: np.asarray(found[key]) for key in ("mu", "sigma")}
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path} is no file of EDM2's reference statistics ({type(error).__name__}: {reason})."
        ) from error


def _tensor(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array.astype(np.float64))
