"""Dropout masks: the law of dropout within an image, and a pure function of seed, row and layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from cm_lightning.dropout import Dropout, DropoutKey, LabelDropout, kept, shared_dropout
from cm_lightning.networks import ADMUNet, EDM2UNet, SongUNet

CPU = torch.device("cpu")


def mask(seed: int, start: int, shape: tuple[int, ...], p: float = 0.2) -> torch.Tensor:
    layer = Dropout(p)
    with shared_dropout(layer, DropoutKey(seed, start), CPU):
        assert layer.key is not None
        return kept(layer.key, torch.Size(shape), p, CPU)


def standard(mask: torch.Tensor, p: float = 0.2) -> torch.Tensor:
    """Rows of a mask with mean 0 and variance 1."""
    return (mask.flatten(1).double() - (1 - p)) / (p * (1 - p)) ** 0.5


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_values_are_dropped_independently_with_probability_p(p):
    """Z values of means, pairs and quadruples, over 256 images of 4,096 values."""
    x = standard(mask(3, 0, (256, 16, 16, 16), p), p)
    root = x.numel() ** 0.5
    scores = [x.mean() * root]
    for lag in (1, 2, 16, 256, 1000):
        scores.append((x[:, lag:] * x[:, :-lag]).mean() * root)
    for rows in (1, 8, 128):
        scores.append((x[rows:] * x[:-rows]).mean() * root)
        scores.append((x[rows:, 1:] * x[rows:, :-1] * x[:-rows, 1:] * x[:-rows, :-1]).mean() * root)
    assert max(abs(float(score)) for score in scores) < 4
    for dim in (0, 1):  # a chi-square over values, and one over images
        n = x.shape[1 - dim]
        assert float((x.mean(dim) ** 2 * x.shape[dim]).mean() - 1) == pytest.approx(
            0, abs=4 * (2 / n) ** 0.5
        )


def test_no_two_values_or_images_go_together():
    x = standard(mask(5, 100, (2048, 400)))
    for table, n in ((x.T @ x / 2048, 2048), (x[:400] @ x[:400].T / 400, 400)):
        off = table[~torch.eye(400, dtype=torch.bool)]
        assert float((off**2).mean() * n) == pytest.approx(1, abs=0.05)
        assert float(off.abs().max() * n**0.5) < 7


def test_seeds_and_layers_draw_their_own():
    layers = nn.Sequential(Dropout(0.2), Dropout(0.2))
    with shared_dropout(layers, DropoutKey(1), CPU):
        first, second = (kept(d.key, torch.Size((64, 4096)), 0.2, CPU) for d in layers)
    other = mask(2, 0, (64, 4096))
    for a, b in ((first, second), (first, other), (second, other)):
        assert abs(float((standard(a) * standard(b)).mean())) < 4 / (64 * 4096) ** 0.5


def test_a_mask_belongs_to_the_row_of_the_global_batch():
    whole = mask(9, 0, (12, 3, 4, 4))
    for start, n in ((0, 6), (6, 6), (4, 4), (11, 1)):
        assert torch.equal(mask(9, start, (n, 3, 4, 4)), whole[start : start + n])
    assert not torch.equal(mask(9, 1, (12, 3, 4, 4)), whole)


NETWORKS = {
    "song": lambda: SongUNet(8, 1, 1, label_dim=3, model_channels=32, channel_mult=[1], **DROPS),
    "adm": lambda: ADMUNet(8, 1, 1, label_dim=3, model_channels=32, channel_mult=[1], **DROPS),
    "edm2": lambda: EDM2UNet(8, 1, 1, label_dim=3, model_channels=32, channel_mult=[1], **DROPS),
}
DROPS = {"num_blocks": 1, "dropout": 0.3, "label_dropout": 0.5}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_drop_the_same_whatever_the_split(name):
    torch.manual_seed(0)
    network = NETWORKS[name]().double().train()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    x, sigma = torch.randn(8, 1, 8, 8).double(), torch.rand(8).double() + 0.5
    labels = torch.eye(3).double()[torch.arange(8) % 3]

    def run(start: int, stop: int, seed: int = 4, net: nn.Module = network) -> torch.Tensor:
        with torch.no_grad(), shared_dropout(net, DropoutKey(seed, start), CPU):
            return net(x[start:stop], sigma[start:stop], labels[start:stop])

    whole = run(0, 8)
    torch.testing.assert_close(torch.cat([run(0, 2), run(2, 4), run(4, 8)]), whole)
    assert torch.equal(run(0, 8, net=copy.deepcopy(network)), whole)
    assert not torch.allclose(run(0, 8, seed=5), whole)
    still = network.eval()(x, sigma, labels)
    assert not torch.allclose(whole, still)


def test_labels_are_dropped_whole_and_not_scaled():
    layer, rows = LabelDropout(0.3), torch.eye(10)[torch.arange(4000) % 10]
    assert torch.equal(layer.eval()(rows), rows)
    layer.train()
    with shared_dropout(layer, DropoutKey(0), CPU):
        found = layer(rows)
    dropped = (found == 0).all(1)
    assert torch.equal(found[~dropped], rows[~dropped])
    assert float(dropped.double().mean()) == pytest.approx(0.3, abs=0.03)
    layer.key = None
    assert float((layer(rows) == 0).all(1).double().mean()) == pytest.approx(0.3, abs=0.03)


def test_values_that_stay_are_scaled():
    layer = Dropout(0.25)
    x = torch.randn(64, 100, requires_grad=True)
    for key in (None, torch.tensor([1, 2, 3], dtype=torch.int32)):
        layer.key, x.grad = key, None
        y = layer(x)
        y.sum().backward()
        stays = y != 0
        torch.testing.assert_close(y[stays], x[stays] / 0.75)
        torch.testing.assert_close(x.grad, stays / 0.75)
    assert layer.eval()(x) is x
    assert Dropout(0.0)(x) is x


def test_recomputation_finds_the_same_masks():
    layer, x = Dropout(0.5), torch.randn(8, 50, requires_grad=True)
    with shared_dropout(layer, DropoutKey(7), CPU):
        y = checkpoint(lambda v: layer(v) ** 2, x, use_reentrant=False, preserve_rng_state=False)
    y.sum().backward()
    with shared_dropout(layer, DropoutKey(7), CPU):
        again = layer(x.detach())
    torch.testing.assert_close(x.grad, 4 * again)  # d (2x)^2 / dx = 8 x = 4 (2x)


def test_layers_of_others_are_seeded_and_the_stream_around_is_untouched():
    layer, x = nn.Dropout(0.5), torch.ones(8, 100)
    torch.manual_seed(0)
    plain = torch.rand(3)
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        with shared_dropout(layer, DropoutKey(11), CPU):
            found.append(layer(x))
    assert torch.equal(*found)
    assert torch.equal(torch.rand(3), plain)
