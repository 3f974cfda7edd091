"""The Fashion-MNIST classifier behind FashionFeatures."""

from pathlib import Path

import pytest
import torch
from torch.nn.functional import interpolate, pad

from cm_lightning.evaluation import FashionFeatures
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.evaluation.fashion import _read
from cm_lightning.types import InputError

FOLDER = Path("/usr/share/datasets/fashion-mnist")


def test_a_black_border_changes_nothing():
    images = torch.randint(0, 256, (5, 1, 28, 28), dtype=torch.uint8)
    extractor = FashionFeatures()
    features = extractor(images)
    assert features.shape == (5, extractor.num_features)
    assert features.dtype == torch.float64
    assert torch.equal(features, extractor(pad(images, [2] * 4)))
    assert (extractor.metric, extractor.name) == ("fd_fashion", "fashion-mnist")
    assert FashionFeatures.weights.stat().st_size < 250_000


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 1, 8, 8)])
def test_refuses_other_images(shape):
    with pytest.raises(InputError, match=r"\(1, 28, 28\) or \(1, 32, 32\)"):
        FashionFeatures()(torch.zeros(shape, dtype=torch.uint8))


@pytest.mark.slow
def test_its_training_learns_and_repeats():
    """On digits, enlarged: the images it is made for are not everywhere."""
    images, labels = digit_images()
    images = interpolate(images.float(), size=28, mode="nearest").byte()
    first, second = (
        FashionFeatures.train_classifier(images[:1500], labels[:1500], 40) for _ in range(2)
    )
    assert FashionFeatures.accuracy(first, images[1500:], labels[1500:]) > 0.6
    assert all(map(torch.equal, first.parameters(), second.parameters()))


@pytest.mark.slow
def test_shipped_weights_classify_images_they_have_not_seen():
    images, labels = _read(FOLDER, "t10k")
    assert images.shape == (10_000, 1, 28, 28)
    assert FashionFeatures.accuracy(FashionFeatures().load().network, images, labels) > 0.9
