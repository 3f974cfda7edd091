"""Guidance by a worse model and without labels."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.networks import EDMPrecond, SongUNet
from cm_lightning.sampling import GuidedDenoiser, multistep
from cm_lightning.types import InputError
from tests.toys import FunctionDenoiser


def network(**changes):
    torch.manual_seed(0)
    options = {"label_dim": 3, "label_dropout": 0.1, "model_channels": 32, "num_blocks": 1}
    backbone = SongUNet(8, 1, 1, channel_mult=[1], **(options | changes))
    for p in backbone.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return EDMPrecond(backbone).eval()


def test_by_hand():
    good = FunctionDenoiser(lambda x, t: 2 * x)
    worse = FunctionDenoiser(lambda x, t: x + 1)
    x, sigma = torch.randn(2, 1, 4, 4), torch.ones(2)
    guided = GuidedDenoiser(good, worse, 1.5)
    torch.testing.assert_close(guided(x, sigma), (x + 1) + 1.5 * (2 * x - x - 1))
    assert guided.calls == 2


def test_scale_1_is_the_model_in_one_call():
    calls = []
    good = FunctionDenoiser(lambda x, t: calls.append(1) or 2 * x)
    guided = GuidedDenoiser(good, FunctionDenoiser(lambda x, t: calls.append(1) or x), 1.0)
    z = torch.randn(2, 2, 1, 4, 4)
    a = multistep(guided, z, [80.0, 0.8])
    assert (len(calls), guided.calls) == (2, 1)
    assert torch.equal(a, multistep(good, z, [80.0, 0.8]))


def test_guided_by_itself_is_itself():
    net = network()
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.ones(3), torch.arange(3)
    guided = GuidedDenoiser(net, net, 2.5)(x, sigma, labels)
    torch.testing.assert_close(guided, net(x, sigma, labels))


def test_classifier_free_guidance_uses_the_label_free_case():
    net = network()
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.ones(3), torch.arange(3)
    free = net(x, sigma, None)
    with torch.no_grad():
        guided = GuidedDenoiser(net, None, 3.0)(x, sigma, labels)
        torch.testing.assert_close(guided, free + 3 * (net(x, sigma, labels) - free))
        gone = GuidedDenoiser(net, None, 0.0)(x, sigma, labels)
        torch.testing.assert_close(gone, free)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GuidedDenoiser(network(), None, -1), "0 or more"),
        (lambda: GuidedDenoiser(network(label_dropout=0.0), None, 2), "label_dropout"),
        (lambda: GuidedDenoiser(network(label_dim=0), None, 2), "with and without labels"),
        (lambda: GuidedDenoiser(network(), network(label_dim=4), 2), "must be equal"),
    ],
)
def test_bad_input_is_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_a_model_without_classes_guides_one_with_them():
    """As EDM2 guides its class-conditional models by an unconditional one."""
    good, worse = network(), network(label_dim=0, label_dropout=0.0)
    x, sigma, labels = torch.randn(3, 1, 8, 8), torch.ones(3), torch.arange(3)
    guided = GuidedDenoiser(good, worse, 2.0)(x, sigma, labels)
    expected = 2 * good(x, sigma, labels) - worse(x, sigma)
    torch.testing.assert_close(guided, expected)
