"""The reference posterior: against golden numbers, against the dense formula, and unbiased."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from cm_lightning.data import read_idx
from cm_lightning.objective import (
    L2,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Heun,
    Independent,
    InverseStep,
    Objective,
    ReferenceMean,
    SampleMean,
    merge_sums,
)
from cm_lightning.objective.posterior import own_sums
from cm_lightning.types import Batch, InputError, References, expand
from tests.conftest import GOLDEN
from tests.toys import FunctionDenoiser, TinyDenoiser

CASES = [
    pytest.param(case, id=f"{path.stem}-{number}")
    for path in sorted(GOLDEN.glob("score_identity*.json"))
    for number, case in enumerate(json.loads(path.read_text())["cases"])
]


def test_golden_files_were_found():
    assert CASES


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, dtype, tolerance):
    def tensor(key):
        return torch.tensor(case[key], dtype=dtype)

    def image(values):
        return values.reshape(len(values), -1, 1, 1)

    def maybe(key):
        return None if case[key] is None else torch.tensor(case[key])

    pool = image(tensor("references"))
    index = torch.tensor(case["index"])
    references = References(pool, maybe("reference_labels"), torch.arange(len(pool)))
    t, r = (torch.tensor(case[key], dtype=torch.float64) for key in "tr")
    notes = {}
    batch = Batch(pool[index], maybe("labels"), index, references, notes=notes)
    x_t, mean = image(tensor("x_t")), ReferenceMean(chunk=7)
    close = {"rtol": tolerance, "atol": tolerance}
    expected = image(tensor("posterior_mean"))
    torch.testing.assert_close(mean(x_t, t, batch), expected, **close)
    torch.testing.assert_close(Euler(mean)(x_t, t, r, batch), image(tensor("x_r")), **close)
    ess = torch.tensor(case["effective_sample_size"], dtype=torch.float64)
    torch.testing.assert_close(notes["ess"], ess, rtol=max(tolerance, 1e-9) * 10, atol=0)


# --- against the dense float64 formula on real images ---


def digits():
    from sklearn.datasets import load_digits

    data = load_digits()
    pixels = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    return pixels, torch.from_numpy(data.target).long()


def photographs():
    """3,000 crops of the two photographs that scikit-learn ships."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(1)
    crops = [
        photos[k % 2][(y := rng.integers(395)) : y + 32, (x := rng.integers(608)) : x + 32]
        for k in range(3000)
    ]
    pixels = torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).contiguous()
    return pixels, torch.from_numpy(rng.integers(0, 10, 3000))


def fashion():
    root = Path("/usr/share/datasets/fashion-mnist")
    images = read_idx(root / "train-images-idx3-ubyte.gz")[:6000]
    labels = read_idx(root / "train-labels-idx1-ubyte.gz")[:6000]
    return torch.from_numpy(images.copy())[:, None], torch.from_numpy(labels.astype(np.int64))


SETS = {"digits": digits, "photographs": photographs}
if Path("/usr/share/datasets/fashion-mnist").is_dir():
    SETS["fashion"] = fashion


def dense(x_t, t, points, mask=None):
    """softmax(-|x_t - x|^2 / 2 t^2) X in float64, differences taken one by one."""
    squares = torch.stack([(x.flatten() - points).square().sum(1) for x in x_t.double()])
    logits = -squares / (2 * t[:, None] ** 2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return (logits.softmax(1) @ points).reshape(x_t.shape)


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("name", SETS)
def test_streaming_equals_the_dense_formula(name, conditional):
    pixels, labels = SETS[name]()
    points = pixels.flatten(1).double() / 127.5 - 1
    rng = torch.Generator().manual_seed(2)
    index = torch.randint(len(pixels), (40,), generator=rng)
    t = torch.logspace(np.log10(0.002), np.log10(80), 40, dtype=torch.float64)
    x0 = pixels[index].float() / 127.5 - 1
    x_t = x0 + expand(t, x0) * torch.randn(x0.shape, generator=rng)
    mask = labels[index][:, None] == labels if conditional else None
    expected = dense(x_t, t, points, mask)
    own = labels[index] if conditional else None
    references = References(pixels, labels if conditional else None, torch.arange(len(pixels)))
    batch = Batch(x0, own, index, references)
    bound = 1e-4 if name == "photographs" else 1e-5  # three channels; a grey level is 8e-3
    for chunk in (777, 100_000):
        mean = ReferenceMean(chunk=chunk)(x_t, t, batch)
        assert float((mean - expected).abs().max()) < bound
    posterior = ReferenceMean(chunk=500)
    total = own_sums(x_t, t, batch)
    for shard in torch.arange(len(pixels)).chunk(4):
        part = References(pixels[shard], labels[shard] if conditional else None, shard)
        total = merge_sums(posterior.sums(x_t, t, batch, part), total)
    mean = (total.images / total.weights[:, None]).reshape(x_t.shape)
    assert float((mean - expected).abs().max()) < bound


@pytest.mark.parametrize("name", SETS)
def test_the_skip_rule_stays_within_its_error(name):
    pixels, _ = SETS[name]()
    points = pixels.flatten(1).float() / 127.5 - 1
    rng = torch.Generator().manual_seed(3)
    index = torch.randint(len(pixels), (256,), generator=rng)
    t = (torch.randn(256, generator=rng, dtype=torch.float64) * 2 - 1.1).exp()
    x0 = pixels[index].float() / 127.5 - 1
    x_t = x0 + expand(t, x0) * torch.randn(x0.shape, generator=rng)
    distances = torch.cdist(points[index].double(), points.double())
    nearest = torch.where(distances > 1e-3, distances, torch.inf).min(1).values
    references = References(pixels, None, torch.arange(len(pixels)))
    notes = {}
    plain = ReferenceMean()(x_t, t, Batch(x0, None, index, references))
    batch = Batch(x0, None, index, references._replace(nearest=nearest), notes=notes)
    skipped = ReferenceMean()(x_t, t, batch)
    assert float(notes["skipped"].mean()) > 0.3
    error = (skipped - plain).flatten(1).norm(dim=1) / nearest
    assert float(error[notes["skipped"] > 0].max()) < 1e-3
    assert float(error[notes["skipped"] > 0].mean()) < 5e-5
    assert torch.equal(skipped[notes["skipped"] > 0], x0[notes["skipped"] > 0])
    # rows that take part are computed in another order of rows: equal up to rounding
    torch.testing.assert_close(skipped[notes["skipped"] == 0], plain[notes["skipped"] == 0])


def test_products_keep_all_bits_where_a_run_allows_fewer(monkeypatch):
    rng = torch.Generator().manual_seed(5)
    pixels = torch.randint(0, 256, (40, 1, 6, 6), generator=rng, dtype=torch.uint8)
    x0 = pixels[:8].float() / 127.5 - 1
    t = torch.full((8,), 3.0)
    x_t = x0 + 3 * torch.randn(x0.shape, generator=rng)
    batch = Batch(x0, None, torch.arange(8), References(pixels, None, torch.arange(40)))
    expected = ReferenceMean()(x_t, t, batch)
    seen = []
    addmm = torch.addmm

    def spy(*args, **kwargs):
        kinds = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
        seen.append([kind.fp32_precision for kind in kinds])
        return addmm(*args, **kwargs)

    monkeypatch.setattr(torch, "addmm", spy)
    try:
        torch.set_float32_matmul_precision("medium")
        found = ReferenceMean()(x_t, t, batch)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert seen == [["ieee", "ieee"]]
    assert torch.equal(found, expected)


# --- rows that keep their own image ---


def setting(n: int = 12):
    rng = torch.Generator().manual_seed(4)
    pool = torch.rand(n, 1, 4, 4, generator=rng, dtype=torch.float64) * 2 - 1
    z = torch.randn(n, 1, 4, 4, generator=rng, dtype=torch.float64)
    t = torch.full((n,), 3.0, dtype=torch.float64)
    return pool, pool + 3 * z, t, torch.arange(n)


def test_one_reference_is_the_sample_bit_for_bit():
    pool, x_t, t, index = setting()
    empty = References(pool[:0], None, index[:0])
    own = References(pool, index, index)  # every image a class of its own
    for references, labels in ((empty, None), (own, index)):
        batch = Batch(pool, labels, index, references)
        assert torch.equal(ReferenceMean()(x_t, t, batch), pool)


def test_dropped_labels_and_generated_rows_keep_their_image():
    pool, x_t, t, index = setting()
    labels = torch.zeros(12, dtype=torch.long)
    generated = index == 3
    dropped = torch.where(index == 5, -1, labels)
    batch = Batch(pool, dropped, index, References(pool, labels, index), generated)
    mean = ReferenceMean()(x_t, t, batch)
    kept = [bool(torch.equal(mean[i], pool[i])) for i in range(12)]
    assert [i for i, k in enumerate(kept) if k] == [3, 5]


def test_the_own_image_counts_once_whether_the_bank_holds_it_or_not():
    pool, x_t, t, index = setting()
    whole = References(pool, None, index)
    for row in range(12):
        others = References(pool[index != row], None, index[index != row])
        one = Batch(pool[row : row + 1], None, index[row : row + 1], others)
        a = ReferenceMean()(x_t[row : row + 1], t[:1], one)
        b = ReferenceMean()(x_t[row : row + 1], t[:1], one._replace(references=whole))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_everything_is_full_precision_under_autocast():
    pool, x_t, t, index = setting()
    batch = Batch(pool.float(), None, index, References(pool.float(), None, index))
    plain = ReferenceMean()(x_t.float(), t, batch)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = ReferenceMean()(x_t.float(), t, batch)
    assert torch.equal(plain, mixed)


def test_heun_applies_the_skip_rule_to_its_first_estimate_alone(generator):
    """At r another image may be near that of a row which was between both at t > r."""
    n, shape = 2000, (1, 1, 2)
    pool = torch.zeros(2, *shape, dtype=torch.float64)
    pool[1, 0, 0, 0] = 8.4
    index = torch.arange(n) % 2
    t, r = torch.full((n,), 2.0).double(), torch.ones(n).double()
    x0 = pool[index]
    x_t = x0 + 2 * torch.randn(n, *shape, generator=generator, dtype=torch.float64)
    nearest = torch.full((n,), 8.4).double()
    batch = Batch(x0, None, index, References(pool, None, torch.arange(2), nearest))
    skipping, plain = (Heun(ReferenceMean(skip=skip))(x_t, t, r, batch) for skip in (8.0, None))
    torch.testing.assert_close(skipping, plain, rtol=1e-12, atol=1e-12)
    far = batch._replace(references=batch.references._replace(nearest=nearest + 100))
    kept = Heun(ReferenceMean(skip=8.0))(x_t, t, r, far)
    assert float((kept - plain).flatten(1).norm(dim=1).max()) > 1  # the rule does act at t


def test_bad_arguments_are_named():
    for make in (lambda: ReferenceMean(chunk=0), lambda: ReferenceMean(skip=0)):
        with pytest.raises(InputError):
            make()
    pool, x_t, t, index = setting()
    with pytest.raises(InputError, match="carries none"):
        ReferenceMean()(x_t, t, Batch(pool, None, index))


# --- statistics (methods: bias and variance of the estimate) ---


def test_unbiased_with_the_own_image_and_biased_without():
    """Digits at t = 0.5 and 1: the estimate at one x_t, averaged over random other references."""
    pixels, _ = digits()
    points = pixels.double() / 127.5 - 1
    flat = points.flatten(1)
    rng = torch.Generator().manual_seed(5)
    for t, n, bias in ((0.5, 4, 0.3), (1.0, 64, 0.1)):
        x_t = points[7] + t * torch.randn(points[7].shape, generator=rng, dtype=torch.float64)
        posterior = (-(x_t.flatten() - flat).square().sum(1) / (2 * t * t)).softmax(0)
        exact = posterior @ flat
        draws = 3000
        own = torch.multinomial(posterior, draws, replacement=True, generator=rng)
        levels = torch.full((1,), t, dtype=torch.float64)
        with_own, without = [], []
        for row in own.tolist():
            others = torch.randperm(len(flat), generator=rng)[: n - 1]
            others = others[others != row]
            references = References(points[others], None, others)
            batch = Batch(points[row : row + 1], None, torch.tensor([row]), references)
            with_own.append(ReferenceMean()(x_t[None], levels, batch).flatten())
            rest = flat[others]
            w = (-(x_t.flatten() - rest).square().sum(1) / (2 * t * t)).softmax(0)
            without.append(w @ rest)
        included, excluded = torch.stack(with_own), torch.stack(without)
        error = included.std(0).square().mean().sqrt() / draws**0.5
        assert float((included.mean(0) - exact).square().mean().sqrt()) < 2 * float(error) + 1e-4
        assert float((excluded.mean(0) - exact).square().mean().sqrt()) > bias


@pytest.mark.parametrize(
    ("t", "n", "expected"),
    [
        (1.0, 1, 7.55e-2),
        (1.0, 64, 4.94e-2),
        (1.5, 128, 3.04e-2),
        (2.0, 1, 0.206),
        (2.0, 16, 7.87e-2),
        (2.0, 512, 4.3e-3),
        (5.0, 1, 0.275),
        (5.0, 64, 7.6e-3),
        (40.0, 4, 7.4e-2),
        (40.0, 128, 2.1e-3),
        (2.0, None, 0.0),
    ],
)
def test_variance_of_the_target_is_the_measured_table(t, n, expected):
    """E||mean - exact||^2 per value, digits as x / 8 - 1."""
    from sklearn.datasets import load_digits

    flat = torch.from_numpy(load_digits().data / 8 - 1)
    points = flat.reshape(-1, 1, 8, 8)
    rng = torch.Generator().manual_seed(6)
    total, rows, repeats = 0.0, 500, 12
    for _ in range(repeats):
        own = torch.randint(len(flat), (rows,), generator=rng)
        x0 = points[own]
        x_t = x0 + t * torch.randn(x0.shape, generator=rng, dtype=torch.float64)
        levels = torch.full((rows,), t, dtype=torch.float64)
        square = torch.cdist(x_t.flatten(1), flat).square()
        exact = (-square / (2 * t * t)).softmax(1) @ flat
        count = len(flat) if n is None else n - 1
        others = torch.randperm(len(flat), generator=rng)[:count]
        batch = Batch(x0, None, own, References(points[others], None, others))
        mean = ReferenceMean()(x_t, levels, batch).flatten(1)
        total += float((mean - exact).square().mean()) / repeats
    assert total == pytest.approx(expected, rel=0.1, abs=1e-12)


def test_gaussian_references_approach_the_closed_form(generator):
    """Data N(0, s^2) in two dimensions: the mean tends to s^2 x / (s^2 + t^2)."""
    s, t, errors = 0.5, 1.0, []
    for n in (100, 10_000):
        pool = s * torch.randn(n, 2, 1, 1, generator=generator, dtype=torch.float64)
        x_t = torch.randn(200, 2, 1, 1, generator=generator, dtype=torch.float64)
        batch = Batch(pool[:200], None, torch.arange(200), References(pool, None, torch.arange(n)))
        if n == 100:
            x_t, batch = x_t[:100], batch._replace(x0=pool, index=torch.arange(100))
        levels = torch.full((len(x_t),), t, dtype=torch.float64)
        mean = ReferenceMean()(x_t, levels, batch)
        exact = s * s * x_t / (s * s + t * t)
        errors.append(float((mean - exact).square().mean().sqrt()))
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 5


# --- inside the objective ---


def test_sct_with_one_reference_is_ect_bit_for_bit():
    torch.manual_seed(0)
    net = TinyDenoiser(features=16, dropout=0.3).train()
    pool, _, _, index = setting()
    pool = pool.float()
    t = torch.logspace(-2, 1.5, 12, dtype=torch.float64)
    mapping = ECTMapping()
    r, u = mapping.r(t, 0), torch.zeros(12)
    assert int((r == 0).sum()) > 3
    z = torch.randn(pool.shape)
    losses = []
    for posterior in (SampleMean(), ReferenceMean()):
        for solver in (Euler(posterior), Heun(posterior)):
            objective = Objective(mapping, Independent(), solver, L2(), InverseStep())
            batch = Batch(pool, index, index, References(pool, index, index))
            losses.append(objective.evaluate(net, net, batch, t, r, z, u).loss)
    assert torch.equal(losses[0], losses[2])
    assert torch.equal(losses[1], losses[3])


def test_generated_rows_take_the_one_sample_step():
    """SCT x GC: the posterior on independent rows, the endpoint itself on generated ones."""
    pool, _, t, index = setting()
    batch = Batch(pool, None, index, References(pool, None, index))
    seen = []

    class Spy(Euler):
        def __call__(self, x_t, t, r, batch):
            x_r = super().__call__(x_t, t, r, batch)
            seen.append((x_t, x_r, batch))
            return x_r

    net = FunctionDenoiser(lambda x, s: 0.1 * x)
    objective = Objective(
        ECTMapping(), GeneratorCoupling(0.5), Spy(ReferenceMean()), L2(), InverseStep()
    )
    u = torch.where(index < 6, 0.1, 0.9).double()
    z = torch.randn(pool.shape, dtype=torch.float64)
    objective.evaluate(net, net, batch, t, t / 2, z, u)
    x_t, x_r, inner = seen[0]
    endpoint = 0.1 * (pool + 1.5 * z)
    torch.testing.assert_close(x_t[:6], (endpoint + 3 * z)[:6])
    torch.testing.assert_close(x_r[:6], (endpoint + 1.5 * z)[:6])
    square = torch.cdist(x_t.flatten(1), pool.flatten(1)).square()
    exact = ((-square / 18).softmax(1) @ pool.flatten(1)).reshape(pool.shape)
    torch.testing.assert_close(x_r[6:], (exact + (x_t - exact) / 2)[6:])
    assert inner.generated.tolist() == [True] * 6 + [False] * 6
