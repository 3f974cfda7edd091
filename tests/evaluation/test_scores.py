"""Every score against torch-fidelity's own pipeline, from the same images and weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch_fidelity import calculate_metrics
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from cm_lightning.evaluation import DigitsFeatures, Inception
from cm_lightning.evaluation.reference import Statistics
from cm_lightning.evaluation.scores import check_scores, extract, scores
from cm_lightning.types import InputError

N, SUBSET = 24, 12


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random Inception weights in a file, scaled so that features and logits differ."""

    class Random(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        torch.manual_seed(0)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = Random("random", ["2048"], feature_extractor_weights_path="none")
        for value in network.parameters():  # so that the signal neither dies nor grows
            if value.ndim > 1:
                torch.nn.init.kaiming_normal_(value, nonlinearity="relu")
        network.fc.weight.data.mul_(30)
        network.fc.bias.data.normal_(0, 2)  # the score takes logits without it
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path


class Images(torch.utils.data.Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


@pytest.fixture(scope="module")
def sets():
    generator = torch.Generator().manual_seed(0)
    real = torch.randint(0, 256, (N, 3, 32, 32), generator=generator, dtype=torch.uint8)
    fake = (real.float() * 0.7 + 30 * torch.rand(real.shape, generator=generator)).byte()
    return real, fake.roll(3, 0)


def statistics(features):
    x = features.double()
    return Statistics(x.mean(0), torch.cov(x.T), len(x))


def test_scores_equal_torch_fidelity(weights, sets):
    real, fake = sets
    theirs = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        cuda=False,
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=SUBSET,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        feature_layer_prc="2048",
        verbose=False,
        save_cpu_ram=True,
        cache=False,
    )
    extractor = Inception(str(weights))
    a, b = (extract(extractor, torch.cat([images[:10], images[10:]])) for images in (fake, real))
    ours = scores(["fd", "kid", "is", "prc"], a, statistics(b.features), b.features, SUBSET)
    for key, name in (
        ("fd", "frechet_inception_distance"),
        ("kid", "kernel_inception_distance_mean"),
        ("is", "inception_score_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert ours[key] == pytest.approx(theirs[name], rel=1e-4, abs=1e-6), key
    assert ours["fd"] > 0.01
    assert ours["is"] > 1.001


@pytest.mark.slow
def test_other_preprocessing_would_not(weights, sets):
    """torchmetrics' default resize, and float inputs in [0, 1], give other features."""
    real, _ = sets
    extractor = Inception(str(weights)).load()
    right = extractor(real)
    smooth = torch.nn.functional.interpolate(
        real.float(), (299, 299), mode="bilinear", antialias=True
    ).byte()
    spread = float(right.std(0).mean())
    for other in (smooth, (real.float() / 255).byte()):
        assert float((extractor(other) - right).abs().mean()) > 0.1 * spread
    with pytest.raises(InputError, match="uint8"):
        extractor(real.float())


def test_forgotten_and_repeated_modes(sets):
    """A set of one image has full precision and no recall; the set itself has both."""
    rng = np.random.default_rng(0)
    real = torch.from_numpy(rng.normal(size=(200, 5))).float()
    from cm_lightning.evaluation.scores import Outputs

    same = scores(["prc"], Outputs(real, None), statistics(real), real)
    assert same == {"precision": 1.0, "recall": 1.0}
    one = real[:1].expand(200, -1) + 1e-4 * torch.randn(200, 5)
    collapsed = scores(["prc", "fd"], Outputs(one, None), statistics(real), real)
    assert collapsed["precision"] == 1
    assert collapsed["recall"] < 0.05
    assert collapsed["fd"] > 1


@pytest.mark.parametrize(
    ("names", "n", "real", "message"),
    [
        (["fid"], 100, 100, "'fid' is unknown"),
        (["fd"], 1, 100, "at least 2 samples"),
        (["kid"], 5000, None, "only their statistics"),
        (["kid"], 500, 5000, "subsets of 1000"),
        (["is"], 5000, 5000, "class scores"),
    ],
)
def test_scores_that_cannot_be(names, n, real, message):
    with pytest.raises(InputError, match=message):
        check_scores(names, n, real, DigitsFeatures())
