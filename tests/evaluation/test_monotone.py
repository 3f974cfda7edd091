"""Frechet distances grow with every kind of damage, over the features a user gets by default."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.transforms.functional import gaussian_blur

from cm_lightning.data import read_idx
from cm_lightning.evaluation import DigitsFeatures, FashionFeatures, Timm
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.evaluation.frechet import frechet_distance

FASHION = Path("/usr/share/datasets/fashion-mnist")


def blur(images, labels, strength):
    width = 0.4 * strength * images.shape[-1] / 8
    size = 2 * math.ceil(3 * width) + 1
    return images if not strength else gaussian_blur(images, [size] * 2, [width] * 2)


def noise(images, labels, strength):
    """Standard deviations up to 36 grey levels; far beyond, features of photographs saturate."""
    z = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    return (images + 12 * strength * z).clamp(0, 255).to(torch.uint8)


def mode_dropping(images, labels, strength):
    """Classes 0, 1 and so on are missing; the others take their share."""
    kept = torch.arange(len(images))[labels >= 2 * strength]
    return images[kept[torch.arange(len(images)) % len(kept)]]


def digits():
    return digit_images()


def fashion():
    images = read_idx(FASHION / "train-images-idx3-ubyte.gz")[:2000, None]
    labels = read_idx(FASHION / "train-labels-idx1-ubyte.gz")[:2000]
    return torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))


def distances(extractor, images, labels, damage, n):
    """Distances of n damaged images to n others that are whole, at strengths 0 to 3."""

    def moments(x):
        features = torch.cat([extractor(part) for part in x.split(100)]).double()
        return features.mean(0), features.T.cov()

    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[: 2 * n]
    images, labels = images[order], labels[order]
    whole = moments(images[n:])
    found = [damage(images[:n], labels[:n], strength) for strength in range(4)]
    return [frechet_distance(*moments(x), *whole) for x in found]


@pytest.mark.parametrize("damage", [blur, noise, mode_dropping])
@pytest.mark.parametrize(
    ("data", "extractor", "n"),
    [
        pytest.param(digits, DigitsFeatures(), 800, id="digits"),
        pytest.param(digits, Timm(), 100, id="digits-timm", marks=pytest.mark.slow),
        pytest.param(fashion, Timm(), 100, id="fashion-timm", marks=pytest.mark.slow),
        pytest.param(fashion, FashionFeatures(), 800, id="fashion", marks=pytest.mark.slow),
    ],
)
def test_distance_grows(data, extractor, n, damage):
    found = distances(extractor, *data(), damage, n)
    assert all(b > 1.02 * a for a, b in pairwise(found)), found
