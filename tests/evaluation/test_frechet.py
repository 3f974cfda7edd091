import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import (
    KEY_METRIC_FID,
    fid_features_to_statistics,
    fid_statistics_to_metric,
)

from cm_lightning.evaluation import DigitsFeatures
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.evaluation.frechet import FrechetDistance, frechet_distance
from cm_lightning.types import InputError


def random_statistics(seed, d, rank):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(rank + 1, d)) * rng.uniform(0.2, 2, d) + rng.normal(size=d)
    return fid_features_to_statistics(torch.from_numpy(features))


def ours(a, b):
    tensors = [torch.from_numpy(s[key]) for s in (a, b) for key in ("mu", "sigma")]
    return frechet_distance(*tensors)


def theirs(a, b):
    return fid_statistics_to_metric(a, b, verbose=False)[KEY_METRIC_FID]


@pytest.fixture(scope="module")
def digits():
    return digit_images()[0]


@pytest.fixture(scope="module")
def features(digits):
    return DigitsFeatures()(digits)


@pytest.mark.parametrize(("rank1", "rank2"), [(200, 300), (20, 200), (20, 30)])
def test_equals_torch_fidelity(rank1, rank2):
    a, b = random_statistics(1, 64, rank1), random_statistics(2, 64, rank2)
    assert ours(a, b) == pytest.approx(theirs(a, b), rel=1e-6)
    assert ours(b, a) == pytest.approx(ours(a, b), rel=1e-6)


def test_equals_torch_fidelity_on_digits(features):
    a, b = fid_features_to_statistics(features[:898]), fid_features_to_statistics(features[898:])
    assert ours(a, b) == pytest.approx(theirs(a, b), rel=1e-6)


def test_independent_coordinates_have_a_closed_form():
    g = torch.Generator().manual_seed(0)
    m1, m2, s1, s2 = torch.rand(4, 10, generator=g, dtype=torch.float64)
    expected = (m1 - m2).square().sum() + (s1 - s2).square().sum()
    actual = frechet_distance(m1, s1.square().diag(), m2, s2.square().diag())
    assert actual == pytest.approx(expected.item(), rel=1e-12)
    # commuting covariances: the same after any rotation
    q = torch.linalg.qr(torch.randn(10, 10, generator=g, dtype=torch.float64)).Q
    rotated = frechet_distance(q @ m1, q * s1.square() @ q.T, q @ m2, q * s2.square() @ q.T)
    assert rotated == pytest.approx(expected.item(), rel=1e-10)


def test_a_point_mass_has_no_cross_term():
    sigma = torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    zero = torch.zeros(2)
    assert frechet_distance(zero, sigma, torch.ones(2), 0 * sigma) == pytest.approx(7.0)
    assert frechet_distance(torch.ones(2), 0 * sigma, zero, sigma) == pytest.approx(7.0)


def test_identical_sets_have_distance_zero(features):
    s = fid_features_to_statistics(features)
    assert 0 <= ours(s, s) < 1e-6


def test_refuses_statistics_that_do_not_match_or_are_not_finite():
    mu, sigma = torch.zeros(3), torch.eye(3)
    with pytest.raises(InputError, match="shape"):
        frechet_distance(mu, sigma, torch.zeros(4), torch.eye(4))
    with pytest.raises(InputError, match="shape"):
        frechet_distance(mu, torch.eye(2), mu, sigma)
    with pytest.raises(InputError, match="finite"):
        frechet_distance(mu, sigma, mu * float("nan"), sigma)
    with pytest.raises(InputError, match="finite"):
        frechet_distance(mu, sigma / 0, mu, sigma)


def measure(real, fake, batch):
    metric = FrechetDistance(DigitsFeatures())
    for side, images in ((True, real), (False, fake)):
        for part in images.split(batch):
            metric.update(part, real=side)
    return metric


def test_metric_equals_direct_statistics_for_every_batch_size(digits, features):
    direct = theirs(
        fid_features_to_statistics(features[:500]), fid_features_to_statistics(features[500:])
    )
    values = [measure(digits[:500], digits[500:], batch).compute() for batch in (1000, 128, 7)]
    assert values[0].dtype == torch.float64
    assert values[0].shape == ()
    assert values[0].item() == pytest.approx(direct, rel=1e-6)
    assert values[1].item() == pytest.approx(values[0].item(), rel=1e-9)
    assert values[2].item() == pytest.approx(values[0].item(), rel=1e-9)


def test_primed_metric_equals_features(digits):
    full = measure(digits[:500], digits[500:], 300)
    mu, sigma, n = full.statistics()
    assert n == 500
    for count in (n, 50_000):
        primed = FrechetDistance(DigitsFeatures())
        primed.prime(mu, sigma, count)
        primed.update(digits[500:], real=False)
        assert primed.compute().item() == pytest.approx(full.compute().item(), rel=1e-6)
        back = primed.statistics()
        assert back.n == count
        torch.testing.assert_close(back.mu, mu, rtol=1e-12, atol=0)
        torch.testing.assert_close(back.sigma, sigma, rtol=0, atol=1e-10)


def test_priming_again_changes_the_result(digits):
    metric = measure(digits[:500], digits[500:], 2000)
    before = metric.compute().item()
    mu, sigma, n = metric.statistics()
    metric.prime(mu + 1, sigma, n)
    assert metric.compute().item() > before + 1


def test_reset_keeps_the_real_side_alone(digits):
    metric = measure(digits[:500], digits[500:], 2000)
    before = metric.compute().item()
    metric.reset()
    assert metric.statistics().n == 500
    with (
        pytest.raises(InputError, match="2 generated images, got 0"),
        pytest.warns(UserWarning, match="before"),
    ):
        metric.compute()
    metric.update(digits[500:], real=False)
    assert metric.compute().item() == before


def test_two_processes_merge_to_one(digits):
    whole = measure(digits[:500], digits[500:], 600)
    first = measure(digits[:500:2], digits[500::2], 600)
    first.merge_state(measure(digits[1:500:2], digits[501::2], 600))
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-9)


def test_sums_stay_float64(digits):
    metric = measure(digits[:500], digits[500:], 2000)
    before = metric.compute().item()
    assert metric.half() is metric
    assert metric.set_dtype(torch.float32) is metric
    assert metric.real_features_cov_sum.dtype == torch.float64
    metric.reset()
    metric.update(digits[500:], real=False)
    assert metric.compute().item() == before


def test_metric_refuses_statistics_of_other_features():
    metric = FrechetDistance(DigitsFeatures())
    with pytest.raises(InputError, match="64 features"):
        metric.prime(torch.zeros(2048), torch.eye(2048), 50_000)
    with pytest.raises(InputError, match="2 or more, got 1"):
        metric.prime(torch.zeros(64), torch.eye(64), 1)
    with pytest.raises(InputError, match="2 real images, got 0"):
        metric.statistics()


def test_no_factor_is_taken_of_what_has_none():
    """Only one of the two has full rank: the distance is that of the closed form either way."""
    full, flat = torch.tensor([4.0, 9.0]).diag(), torch.tensor([1.0, 0.0]).diag()
    zero = torch.zeros(2)
    for pair in ((zero, full, zero, flat), (zero, flat, zero, full)):
        assert frechet_distance(*pair) == pytest.approx((2 - 1) ** 2 + 3**2, abs=1e-9)
    assert frechet_distance(zero, flat, zero, 4 * flat) == pytest.approx(1, abs=1e-9)
