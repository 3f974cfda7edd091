"""LPIPS against the package that OpenAI used and against torchmetrics, on the same weights."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch.nn import functional
from torchmetrics.functional.image import lpips as torchmetrics_lpips
from torchvision.models import vgg16

from cm_lightning.objective import LPIPS
from cm_lightning.types import InputError


@pytest.fixture(scope="module")
def vgg(tmp_path_factory):
    """A file as torchvision publishes it, with random weights that keep activations alive."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = vgg16(weights=None)
        for layer in network.features:
            if isinstance(layer, torch.nn.Conv2d):
                torch.nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(network.features.state_dict(prefix="features."), path)
    return path, network.eval()


@pytest.fixture
def images(generator):
    return torch.rand(2, 1, 3, 32, 32, generator=generator) * 2 - 1


def channel_weights():
    file = Path(inspect.getfile(torchmetrics_lpips)).parent / "lpips_models" / "vgg.pth"
    return torch.load(file, map_location="cpu", weights_only=True)


def test_average_pooling_equals_piq(vgg, images, monkeypatch):
    """piq's class with our weights in the place of its downloads."""
    import piq.perceptual

    path, network = vgg
    monkeypatch.setattr(piq.perceptual, "vgg16", lambda **_: network)
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **__: list(channel_weights().values())
    )
    theirs = piq.LPIPS(replace_pooling=True, reduction="none")
    a, b = ((functional.interpolate(x, 224, mode="bilinear") + 1) / 2 for x in images)
    ours = LPIPS(str(path))(*images)
    torch.testing.assert_close(ours, theirs(a, b), rtol=2e-5, atol=1e-7)


def test_max_pooling_equals_torchmetrics(vgg, images):
    path, network = vgg
    theirs = torchmetrics_lpips._LPIPS(net="vgg", pnet_rand=True)
    state = {}
    for number, (start, end) in enumerate(((0, 4), (4, 9), (9, 16), (16, 23), (23, 30)), 1):
        for layer in range(start, end):
            for key, value in network.features[layer].state_dict().items():
                state[f"slice{number}.{layer}.{key}"] = value
    theirs.net.load_state_dict(state)
    a, b = (functional.interpolate(x, 224, mode="bilinear") for x in images)
    ours = LPIPS(str(path), pooling="max")(*images)
    expected = theirs(a, b).flatten()
    torch.testing.assert_close(ours, expected, rtol=2e-3, atol=1e-6)  # other roundings of mean, std
    other = LPIPS(str(path))(*images)
    assert ((ours - other).abs() / ours > 0.01).all()


def test_gradients_are_finite_where_images_agree(vgg, images):
    a = images[0, :1].requires_grad_()
    loss = LPIPS(str(vgg[0]))(a, a.detach().clone())
    loss.sum().backward()
    assert float(loss.detach().sum()) == 0
    assert a.grad.isfinite().all()


def test_grey_images_and_other_sizes(vgg, generator):
    a, b = torch.rand(2, 1, 1, 16, 16, generator=generator)
    distance = LPIPS(str(vgg[0]))
    expanded = distance(a.expand(-1, 3, -1, -1), b.expand(-1, 3, -1, -1))
    torch.testing.assert_close(distance(a, b), expanded)


def test_missing_or_wrong_weights_are_one_sentence(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"VGG16 weights .*nofile.pth do not exist"):
        LPIPS(str(tmp_path / "nofile.pth")).prepare((3, 32, 32))
    monkeypatch.setenv("CM_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(InputError, match="CM_VGG16_WEIGHTS"):
        LPIPS().prepare((3, 32, 32))
    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not hold the weights of torchvision's VGG16"):
        LPIPS(str(tmp_path / "other.pth")).prepare((3, 32, 32))
    with pytest.raises(InputError, match="1 or 3 channels, got 4"):
        LPIPS().prepare((4, 32, 32))


def test_lpips_is_fp32_under_autocast(vgg, images):
    distance = LPIPS(str(vgg[0]))
    plain = distance(*images)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = distance(*images)
    assert mixed.dtype is torch.float32
    torch.testing.assert_close(mixed, plain, rtol=1e-6, atol=0)
