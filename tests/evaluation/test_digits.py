import itertools

import pytest
import torch

from cm_lightning.evaluation import DigitsFeatures, reference_statistics
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.evaluation.frechet import frechet_distance
from cm_lightning.types import InputError


@pytest.fixture(scope="module")
def data():
    return digit_images()


@pytest.fixture(scope="module")
def distance():
    extractor = DigitsFeatures()

    def measure(a, b):
        s, r = (
            reference_statistics(x.numpy(), "", extractor, cache=None, device="cpu") for x in (a, b)
        )
        return frechet_distance(s.mu, s.sigma, r.mu, r.sigma)

    return measure


def test_digits_are_the_levels_of_scikit_learn(data):
    images, labels = data
    assert images.shape == (1797, 1, 8, 8)
    assert images.dtype == torch.uint8
    assert images.unique().tolist() == [round(k * 255 / 16) for k in range(17)]
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_shipped_weights_classify(data):
    images, labels = data
    network = DigitsFeatures().load().network
    assert DigitsFeatures.accuracy(network, images, labels) > 0.99
    assert DigitsFeatures.weights.stat().st_size < 100_000


def test_training_is_deterministic_and_generalises(data):
    images, labels = data
    held_out = torch.arange(len(images)) % 5 == 0
    with torch.random.fork_rng():
        first, second = (
            DigitsFeatures.train_classifier(images[~held_out], labels[~held_out], 300)
            for _ in range(2)
        )
    assert DigitsFeatures.accuracy(first, images[held_out], labels[held_out]) >= 0.96
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_features(data):
    extractor = DigitsFeatures()
    features = extractor(data[0][:5])
    assert features.shape == (5, extractor.num_features)
    assert features.dtype == torch.float64
    assert (extractor.metric, extractor.name) == ("fd_digits", "digits")


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (1, 1, 28, 28)])
def test_refuses_other_images(shape):
    with pytest.raises(InputError, match=r"\(1, 8, 8\)"):
        DigitsFeatures()(torch.zeros(shape, dtype=torch.uint8))


def test_pinned_distance_between_halves(data, distance):
    images = data[0]
    assert distance(images[:898], images[898:]) == pytest.approx(6.50884, rel=1e-4)
    assert distance(images[::2], images[1::2]) == pytest.approx(1.34805, rel=1e-4)
    assert distance(images, images) < 1e-6


def increases(values):
    return all(a < b for a, b in itertools.pairwise(values))


def test_grows_with_noise(data, distance):
    real, fake = data[0][::2], data[0][1::2].float()
    noise = torch.randn(fake.shape, generator=torch.Generator().manual_seed(0))
    levels = (0, 8, 16, 32, 64, 96)
    assert increases([distance(real, (fake + s * noise).clip(0, 255).byte()) for s in levels])


def test_grows_with_blur(data, distance):
    real, fake = data[0][::2], data[0][1::2].float()
    kernel = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16
    values = []
    for _ in range(5):
        values.append(distance(real, fake.byte()))
        fake = torch.nn.functional.conv2d(fake, kernel, padding=1)
    assert increases(values)


def test_grows_with_every_dropped_class(data, distance):
    real, fake, labels = data[0][::2], data[0][1::2], data[1][1::2]
    assert increases([distance(real, fake[labels >= first]) for first in range(9)])
