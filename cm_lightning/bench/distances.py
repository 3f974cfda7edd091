"""Frechet distances: what they cost, and their bias."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cm_lightning.bench.common import Benchmark, alternate, ratio, spread
from cm_lightning.cli.data import build_features
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageStore
from cm_lightning.evaluation import FeatureExtractor
from cm_lightning.evaluation.frechet import frechet_distance
from cm_lightning.types import InputError

__all__ = ["BENCHMARKS"]


def frechet(options: argparse.Namespace) -> str:
    """What a Frechet distance costs once the features are there, against torchmetrics' ``compute``.

    Both get the same sums over random features of two laws; torchmetrics takes the eigenvalues of
    a product that is not symmetric.

    Args:
        options: ``dims``, ``images``, ``repeats``, ``seed``.

    Returns:
        A Markdown table: seconds as median (smallest-largest), both distances.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    from cm_lightning.evaluation.frechet import FrechetDistance

    class Given(FeatureExtractor):
        metric = name = preprocessing = "given"
        num_features = options.dims

        def build(self) -> torch.nn.Module:
            return torch.nn.Identity()

        def extract(self, network: torch.nn.Module, images: Tensor) -> Tensor:
            return images

    generator = torch.Generator().manual_seed(options.seed)
    ours = FrechetDistance(Given())
    theirs = FrechetInceptionDistance(feature=Given(), normalize=False)
    theirs.orig_dtype = torch.float64  # what its update would have set
    mixing = torch.randn(options.dims, options.dims, generator=generator) / options.dims**0.5
    for side in ("real", "fake"):
        sums, squares = 0.0, torch.zeros(options.dims, options.dims, dtype=torch.float64)
        for start in range(0, options.images, 1000):
            count = min(1000, options.images - start)
            x = torch.randn(count, options.dims, generator=generator) @ mixing
            x = (x if side == "real" else 1.1 * x + 0.1).double()
            sums, squares = sums + x.sum(0), squares + x.T @ x
        for metric in (ours, theirs):
            setattr(metric, f"{side}_features_sum", sums)
            setattr(metric, f"{side}_features_cov_sum", squares)
            setattr(metric, f"{side}_features_num_samples", torch.tensor(options.images))
    values: dict[str, float] = {}

    def compute(name: str, metric: FrechetInceptionDistance) -> None:
        metric._computed = None
        metric._update_count = 1
        values[name] = float(metric.compute())

    sides = [lambda: compute("ours", ours), lambda: compute("theirs", theirs)]
    first, second = alternate(sides, options.repeats, torch.device("cpu"))
    head = ["", "ms", "distance"]
    rows = [
        ["cm_lightning", spread(first), f"{values['ours']:.6f}"],
        ["torchmetrics", spread(second), f"{values['theirs']:.6f}"],
    ]
    title = f"{options.dims} features, {options.images:,} images; ratio {ratio(first, second):.1f}"
    return f"{title}\n\n{table(head, rows)}"


def bias(options: argparse.Namespace) -> str:
    """Frechet distance of real images to other real images of the same set, by their number.

    The true distance is 0: what is found is the bias of small samples, which every Frechet distance
    has and which only equal numbers make comparable.

    Args:
        options: ``store``, ``features``, ``weights``, ``sizes``, ``reference``, ``seed``.

    Returns:
        A Markdown table.

    Raises:
        InputError: If the store holds too few images.
    """
    opened = ImageStore(options.store)
    most = max(options.sizes)
    if len(opened) < most + options.reference:
        raise InputError(
            f"{options.store} holds {len(opened):,} images: --sizes and --reference need "
            f"{most + options.reference:,}."
        )
    given = {} if options.weights is None else {"weights": options.weights}
    extractor = build_features({"class_path": options.features, "init_args": given}, "--features")
    order = np.random.default_rng(options.seed).permutation(len(opened))

    def features(rows: npt.NDArray[np.int64]) -> Tensor:
        parts = [extractor(opened[part][0]) for part in np.array_split(rows, -(-len(rows) // 100))]
        return torch.cat(parts).double()

    def moments(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.mean(0), x.T.cov()

    reference = moments(features(order[most : most + options.reference]))
    drawn = features(order[:most])
    rows = [
        [f"{n:,}", f"{frechet_distance(*moments(drawn[:n]), *reference):.3f}"]
        for n in options.sizes
    ]
    head = ["real images", f"distance to {options.reference:,} others"]
    return f"{opened.path}, features {extractor.name}\n\n{table(head, rows)}"


def _frechet_options(add: Callable[..., Any]) -> None:
    add("--dims", type=int, default=2048, help="features [2048]")
    add("--images", type=int, default=10000, help="images per side [10000]")
    add("--repeats", type=int, default=3)
    add("--seed", type=int, default=0)


def _bias_options(add: Callable[..., Any]) -> None:
    add("store", help="folder of a store")
    add("--features", default="Timm", help="[Timm]")
    add("--weights", help="file with the weights of the features")
    add("--sizes", type=int, nargs="+", default=[250, 500, 1000, 2000, 5000], help="images")
    add("--reference", type=int, default=10000, help="other images compared with [10000]")
    add("--seed", type=int, default=0)


BENCHMARKS = [
    Benchmark("frechet", "Frechet distance of given features", _frechet_options, frechet),
    Benchmark("bias", "Frechet distance by number of samples", _bias_options, bias),
]
