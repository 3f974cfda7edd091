"""EDM's augmentation: its filter, every change by itself, labels and their law."""

from __future__ import annotations

import math

import pytest
import pywt
import torch

from cm_lightning.data import EDMAugment, augment
from cm_lightning.data.augment import SYM6, _enlarge, _linear, _reduce, _rotation, _warp
from cm_lightning.types import InputError

NEVER, ALWAYS = 0.999, 0.0
ORDER = ("mirror", "upside", "coin", "scale", "rotate", "angle", "stretch", "axis", "move")


def numbers(batch=2, **given):
    """Uniform numbers under which only the changes given happen."""
    values = dict.fromkeys(ORDER, NEVER) | given
    return torch.tensor([[values[name] for name in ORDER]] * batch)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1


def smooth(size=32):
    """A smooth picture as a function of centred coordinates, and that function."""

    def value(x, y):
        return torch.sin(1.7 * x + 0.3) * torch.cos(1.1 * y) + 0.4 * x * y

    line = (torch.arange(size) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    return value(x, y)[None, None], x, y, value


def test_filter_is_pywavelets_and_its_even_shifts_are_orthonormal():
    taps = torch.tensor(SYM6, dtype=torch.float64)
    for shift in range(6):
        product = float((taps[2 * shift :] * taps[: 12 - 2 * shift]).sum())
        assert product == pytest.approx(float(shift == 0), abs=1e-12)
    assert float(taps.sum()) == pytest.approx(math.sqrt(2), abs=1e-12)
    assert taps.tolist() == pytest.approx(pywt.Wavelet("sym6").dec_lo, abs=1e-12)


def test_enlarging_and_reducing_is_the_identity_inside(images):
    back = _reduce(_enlarge(images))
    torch.testing.assert_close(back[..., 3:-3], images[..., 3:-3], atol=1e-6, rtol=0)
    x = torch.randn(1, 1, 1, 16, generator=torch.Generator().manual_seed(1))
    y = torch.randn(1, 1, 1, 32, generator=torch.Generator().manual_seed(2))
    assert float((_enlarge(x) * y).sum()) == pytest.approx(float((x * _reduce(y)).sum()), abs=1e-5)


def test_untouched_images_come_back_with_labels_of_zero(images):
    out, labels = EDMAugment(0.5)(images, numbers(), torch.ones(2, 4))
    assert torch.equal(out, images)
    assert not labels.any()
    same = _warp(images, torch.eye(3).expand(2, 3, 3))
    torch.testing.assert_close(same, images, atol=1e-5, rtol=0)


def test_flips(images):
    out, labels = EDMAugment(0.12)(images, numbers(mirror=0.4), torch.zeros(2, 4))
    assert torch.equal(out, images.flip(3))
    assert labels.tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 0]] * 2
    changes = numbers(upside=0.11, coin=0.4)
    out, labels = EDMAugment(0.12)(images, changes, torch.zeros(2, 4))
    assert torch.equal(out, images.flip(2))
    assert labels.tolist() == [[0, 1, 0, 0, 0, 0, 0, 0, 0]] * 2
    for untouched in (numbers(upside=0.11, coin=0.6), numbers(upside=0.13, coin=0.4)):
        assert torch.equal(EDMAugment(0.12)(images, untouched, torch.zeros(2, 4))[0], images)


def test_translation_moves_by_an_eighth_of_the_width(images):
    w = torch.tensor([[0.0, 0.0, 1.0, -0.5]] * 2)
    out, labels = EDMAugment(0.5)(images, numbers(move=ALWAYS), w)
    assert labels.tolist() == [[0, 0, 0, 0, 0, 0, 0, 1, -0.5]] * 2
    # 2 pixels to the right, 1 up; what enters is the reflection at the border
    padded = torch.nn.functional.pad(images, [4] * 4, mode="reflect")
    expected = padded.roll((-1, 2), (2, 3))[..., 4:-4, 4:-4]
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=0)


def inside(values, x, y):
    return values[..., (x.abs() < 0.6) & (y.abs() < 0.6)]


def test_scale_enlarges_the_picture():
    picture, x, y, value = smooth()
    w = torch.tensor([[1.0, 0, 0, 0]])
    out, labels = EDMAugment(0.5)(picture, numbers(1, scale=ALWAYS), w)
    factor = 2**0.2
    expected = value(x / factor, y / factor)[None, None]
    torch.testing.assert_close(inside(out, x, y), inside(expected, x, y), atol=0.02, rtol=0)
    assert labels[0].tolist() == [0, 0, 1, 0, 0, 0, 0, 0, 0]


def test_rotation_turns_about_the_centre():
    picture, x, y, value = smooth()
    angle = 0.5
    changes = numbers(1, rotate=ALWAYS, angle=(angle / math.pi + 1) / 2)
    out, labels = EDMAugment(0.5)(picture, changes, torch.zeros(1, 4))
    c, s = math.cos(angle), math.sin(angle)
    expected = value(c * x - s * y, s * x + c * y)[None, None]
    torch.testing.assert_close(inside(out, x, y), inside(expected, x, y), atol=0.02, rtol=0)
    assert labels[0].tolist() == pytest.approx([0, 0, 0, c - 1, s, 0, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("axis", [0.0, 0.7])
def test_stretching_keeps_the_area(axis):
    picture, x, y, value = smooth()
    place = NEVER if not axis else (axis / math.pi + 1) / 4
    w = torch.tensor([[0, 1.0, 0, 0]])
    out, labels = EDMAugment(0.5)(picture, numbers(1, stretch=ALWAYS, axis=place), w)
    f = 2**0.2
    c, s = math.cos(axis), math.sin(axis)
    # into the turned axes, shrink one and stretch the other, and back
    a, b = (c * x - s * y) / f, (s * x + c * y) * f
    expected = value(c * a + s * b, -s * a + c * b)[None, None]
    torch.testing.assert_close(inside(out, x, y), inside(expected, x, y), atol=0.03, rtol=0)
    assert labels[0].tolist() == pytest.approx([0, 0, 0, 0, 0, c, s, 0, 0], abs=1e-6)
    product = _rotation(torch.tensor([axis])) @ _linear(torch.tensor([f]), torch.tensor([1 / f]))
    assert float(product[0].det()) == pytest.approx(1, abs=1e-6)


def test_frequencies_and_laws_of_the_labels():
    n = 60_000
    generator = torch.Generator().manual_seed(0)
    u, w = torch.rand(n, 9, generator=generator), torch.randn(n, 4, generator=generator)
    images = torch.zeros(n, 1, 2, 2)
    _, labels = EDMAugment(0.12)(images, u, w)
    rates = (labels != 0).double().mean(0).tolist()
    expected = [0.5, 0.06, 0.12, 0.12, 0.12, 0.12, 0.06, 0.12, 0.12]
    assert rates == pytest.approx(expected, abs=6e-3)
    drawn = labels[labels[:, 2] != 0, 2]
    assert float(drawn.std()) == pytest.approx(1, abs=0.03)
    angle = torch.atan2(labels[:, 4], labels[:, 3] + 1)[labels[:, 4] != 0]
    assert float(angle.abs().mean()) == pytest.approx(math.pi / 2, abs=0.05)


def test_all_rows_resampled_as_on_a_gpu_give_the_same_images(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, w = torch.rand(32, 9, generator=generator), torch.randn(32, 4, generator=generator)
    images = torch.randn(32, 3, 8, 8, generator=generator)
    picked, labels = EDMAugment(0.3)(images, u, w)
    monkeypatch.setattr(augment, "may_pick", lambda device: False)
    whole, same = EDMAugment(0.3)(images, u, w)
    torch.testing.assert_close(picked, whole, atol=1e-6, rtol=0)
    assert torch.equal(labels, same)
    still = (labels[:, 2:] == 0).all(1)
    assert 0 < int(still.sum()) < 32
    assert torch.equal(picked[still], whole[still])


def test_range():
    with pytest.raises(InputError, match=r"p must lie in \[0, 1\]"):
        EDMAugment(1.2)


def test_in_training(program, tmp_path):
    from tests.cli.conftest import ROOT, TINY

    config = ROOT / "configs" / "diffusion_digits.yaml"
    words = ["--config", config, "--config", TINY, "--model.total_kimg", 0.128, "--fid.n", 6]
    words += ["--fid.samplers", "[{class_path: HeunSampler, init_args: {steps: 2}}]"]
    words += ["--samples.samplers", "[{class_path: HeunSampler, init_args: {steps: 2}}]"]
    augment = ["--model.augment.p", 0.5]
    refused = program("cm-fit", *words, "--run_dir", tmp_path / "a", *augment)
    assert refused.code == 2
    assert "set augment_dim to 9" in refused.err
    words += ["--model.denoiser.backbone.augment_dim", 9]
    done = program("cm-fit", *words, "--run_dir", tmp_path / "b", *augment)
    assert done.code == 0, done.err
    told = from_run(tmp_path / "b")
    assert told.abs().max() > 0
    # a run that starts from it and has no augmentation leaves that layer out
    words = ["--config", ROOT / "configs" / "ect_digits.yaml", "--config", TINY]
    words += ["--model.total_kimg", 0.064, "--run_dir", tmp_path / "c", "--model.init.path"]
    done = program("cm-fit", *words, tmp_path / "b")
    assert "left out, as the network has no such layer: model.map_augment.weight" in done.out


def from_run(run):
    from cm_lightning.weights import load_weights

    return load_weights(run, "live").denoiser.state_dict()["model.map_augment.weight"]
