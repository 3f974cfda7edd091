import os
import pickle

import numpy as np
import pytest
import torch

from cm_lightning.evaluation import DigitsFeatures, load_statistics, reference_statistics
from cm_lightning.evaluation.digits import digit_images
from cm_lightning.evaluation.frechet import FrechetDistance
from cm_lightning.types import InputError

KEY = "0123456789abcdef-and-more"


@pytest.fixture(scope="module")
def images():
    return digit_images()[0][:300].numpy()


class Counting(DigitsFeatures):
    """Counts the images it sees."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def extract(self, network, images):
        self.seen += len(images)
        return super().extract(network, images)


def compute(images, extractor=None, **options):
    options = {"cache": None, "device": "cpu", "batch": 64} | options
    return reference_statistics(images, KEY, extractor or DigitsFeatures(), **options)


def test_equals_mean_and_covariance(images):
    features = DigitsFeatures()(torch.from_numpy(images))
    for batch in (64, 7, 1000):
        mu, sigma, n = compute(images, batch=batch)
        assert n == 300
        torch.testing.assert_close(mu, features.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sigma, features.T.cov(), rtol=1e-10, atol=1e-10)


def test_equals_the_metric(images):
    metric = FrechetDistance(DigitsFeatures())
    metric.update(torch.from_numpy(images), real=True)
    torch.testing.assert_close(metric.statistics().sigma, compute(images).sigma)


def test_second_call_reads_the_cache(images, tmp_path):
    extractor = Counting()
    first = compute(images, extractor, cache=tmp_path)
    again = compute(images, extractor, cache=tmp_path)
    assert extractor.seen == 300
    assert torch.equal(first.mu, again.mu)
    assert torch.equal(first.sigma, again.sigma)
    assert first.n == again.n
    path = tmp_path / "reference" / f"{KEY[:16]}-{extractor.fingerprint[:16]}.npz"
    assert list(path.parent.iterdir()) == [path]
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file) == ["features", "fingerprint", "mu", "n", "pixels", "rows", "sigma"]
        assert str(file["fingerprint"]) == KEY
        assert str(file["features"]) == extractor.fingerprint
    mu, sigma = load_statistics(path)
    assert torch.equal(mu, first.mu)
    assert torch.equal(sigma, first.sigma)


def test_images_under_a_fingerprint_of_others_leave_no_statistics(images, tmp_path):
    """A store says its own fingerprint."""
    extractor = Counting()
    compute(255 - images, extractor, cache=tmp_path)
    found = compute(images, extractor, cache=tmp_path)
    assert extractor.seen == 2 * len(images)
    assert torch.equal(found.mu, compute(images).mu)
    assert torch.equal(found.mu, compute(images, extractor, cache=tmp_path).mu)
    assert extractor.seen == 2 * len(images)


def test_no_cache_writes_nothing(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    compute(images)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut", "text", "empty", "nan", "shape", "foreign", "count"])
def test_damaged_or_foreign_cache_is_recomputed(images, tmp_path, damage):
    extractor = Counting()
    good = compute(images, extractor, cache=tmp_path)
    (path,) = (tmp_path / "reference").iterdir()
    with np.load(path, allow_pickle=False) as file:
        arrays = dict(file)
    change = {
        "nan": {"mu": arrays["mu"] * np.nan},
        "shape": {"mu": np.zeros(3), "sigma": np.eye(3)},
        "foreign": {"fingerprint": np.array(KEY[:16] + "-but-another")},
        "count": {"n": np.array(299)},
    }
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage in ("text", "empty"):
        path.write_text("" if damage == "empty" else "no archive")
    else:
        np.savez(path, **(arrays | change[damage]))
    again = compute(images, extractor, cache=tmp_path)
    assert extractor.seen == 600
    assert torch.equal(again.mu, good.mu)
    compute(images, extractor, cache=tmp_path)
    assert extractor.seen == 600


def test_other_data_has_another_cache(images, tmp_path):
    extractor = Counting()
    compute(images, extractor, cache=tmp_path)
    reference_statistics(images, "other", extractor, cache=tmp_path, device="cpu")
    assert extractor.seen == 600
    assert len(list((tmp_path / "reference").iterdir())) == 2


def test_too_few_images(images):
    with pytest.raises(InputError, match="at least 2 images, the data set has 1"):
        compute(images[:1])


def worker(rank, folder):
    """One of two processes: reference, cache, priming and the metric over both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    every = digit_images()[0]
    images, fake = every[:300].numpy(), every[300:501]
    extractor = Counting()
    cache = folder / f"disk{rank}"  # each process has a disk of its own
    options = {"cache": cache, "rank": rank, "world": 2}
    result = compute(images, extractor, **options)
    cached = compute(images, extractor, **options)
    metric = FrechetDistance(extractor)
    metric.prime(*result)
    metric.update(fake[rank::2], real=False)
    value = metric.compute()
    n = metric.statistics().n
    assert int(metric.real_features_num_samples) == (0 if rank else 300)
    seen = extractor.seen
    torch.save([*result, *cached, value, n, seen], folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes(images, tmp_path):
    torch.multiprocessing.spawn(worker, (tmp_path,), nprocs=2)
    expected = compute(images)
    metric = FrechetDistance(DigitsFeatures())
    metric.prime(*expected)
    metric.update(digit_images()[0][300:501], real=False)
    for rank in range(2):
        mu, sigma, n, mu2, sigma2, n2, value, primed, seen = torch.load(
            tmp_path / f"rank{rank}.pt", weights_only=True
        )
        torch.testing.assert_close(mu, expected.mu, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sigma, expected.sigma, rtol=1e-10, atol=1e-10)
        assert n == n2 == primed == 300
        assert torch.equal(mu, mu2)
        assert torch.equal(sigma, sigma2)
        assert value.item() == pytest.approx(metric.compute().item(), rel=1e-9)
        assert seen == 150 + (101 if rank == 0 else 100)
    assert (tmp_path / "disk0").exists()
    assert not (tmp_path / "disk1").exists()


def test_published_statistics(tmp_path):
    path = tmp_path / "ref.npz"
    np.savez(path, mu=np.arange(3, dtype=np.float32), sigma=np.eye(3), mu_s=np.zeros(7))
    mu, sigma = load_statistics(path)
    assert mu.dtype == sigma.dtype == torch.float64
    assert mu.tolist() == [0, 1, 2]
    assert torch.equal(sigma, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"mu": np.zeros(3)}, "has no `sigma`"),
        ({"arr_0": np.zeros(3)}, r"has no `mu`.*\['arr_0'\]"),
        ({"mu": np.zeros((1, 3)), "sigma": np.eye(3)}, r"\(1, 3\)"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\(4, 4\)"),
        ({"mu": np.array(["a"]), "sigma": np.eye(1)}, "numbers"),
        ({"mu": np.zeros(3), "sigma": np.full((3, 3), np.inf)}, "NaN or infinite"),
        ({"mu": np.array([None]), "sigma": np.eye(1)}, "plain arrays"),
    ],
)
def test_unusable_statistics_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "ref.npz", **arrays)
    with pytest.raises(InputError, match=message):
        load_statistics(tmp_path / "ref.npz")


def test_statistics_that_are_no_archive_are_refused(tmp_path):
    with pytest.raises(InputError, match="do not exist"):
        load_statistics(tmp_path / "none.npz")
    (tmp_path / "fid.pkl").write_bytes(pickle.dumps({"mu": 0, "sigma": 0}))
    np.save(tmp_path / "mu.npy", np.zeros(3))
    for name in ("fid.pkl", "mu.npy"):
        with pytest.raises(InputError, match=name):
            load_statistics(tmp_path / name)


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_statistics_of_edm2_are_read_and_nothing_is_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    mu, sigma = rng.normal(size=5), np.cov(rng.normal(size=(5, 40)))
    path = tmp_path / "img64.pkl"
    content = {"fid": {"mu": mu, "sigma": sigma}, "fd_dinov2": {"mu": mu + 1, "sigma": sigma}}
    for protocol in range(2, 6):
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        found_mu, found_sigma = load_statistics(path)
        assert np.array_equal(found_mu.numpy(), mu)
        assert np.array_equal(found_sigma.numpy(), sigma)
        assert np.array_equal(load_statistics(path, metric="fd_dinov2")[0].numpy(), mu + 1)
    with pytest.raises(InputError, match="fd_timm"):
        load_statistics(path, metric="fd_timm")
    objects = np.array([Evil()], dtype=object)
    for bad in ({"fid": Evil()}, {"fid": {"mu": objects, "sigma": sigma}}, {"other": 1}, [mu]):
        path.write_bytes(pickle.dumps(bad))
        with pytest.raises(InputError, match="no file of EDM2"):
            load_statistics(path)
    assert not (tmp_path / "canary").exists()
