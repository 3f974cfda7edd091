"""EDM2UNet: published fill values, sizes, magnitudes, forced weight normalisation, dropout."""

from __future__ import annotations

import copy

import pytest
import torch

from cm_lightning.networks import EDM2Precond, EDM2UNet, normalize_weights
from cm_lightning.networks.edm2 import MPConv, mp_cat, mp_silu, mp_sum, unit_rms
from cm_lightning.types import InputError
from tests.networks.test_songunet import fill


def small(**changes) -> EDM2Precond:
    options = {"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 2}
    options |= {"attn_resolutions": [16], "label_dim": 10}
    return EDM2Precond(EDM2UNet(32, **(options | changes))).eval()


@pytest.mark.parametrize("attention", ["sdpa", "math"])
def test_fill_values(attention):
    denoiser = small(attention=attention)
    assert fill(denoiser) == 85
    assert sum(p.numel() for p in denoiser.parameters()) == 4_031_823
    x = torch.sin(0.1 * torch.arange(2 * 3 * 32 * 32).double()).float().reshape(2, 3, 32, 32)
    sigma = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        out = denoiser(x, sigma, torch.tensor([3, 7]))
        logvar = denoiser.log_variance(sigma)
    got = (out.mean(), out.std(), out[0, 0, 0, 0], out[1, 2, -1, -1], out[0, 1, 16, 16])
    expected = (0.010103, 0.244907, 0.026519, -0.039334, -0.461425)
    assert [float(value) for value in got] == pytest.approx(expected, abs=2e-6)
    assert logvar.tolist() == pytest.approx((-8.751655, -8.779990), abs=1e-5)


@pytest.mark.parametrize(
    ("channels", "parameters"),
    [(192, 280_209_381), (256, 497_803_173), (320, 777_492_325), (384, 1_119_276_837)],
)
def test_sizes_of_the_public_checkpoints(channels, parameters):
    with torch.device("meta"):
        denoiser = EDM2Precond(EDM2UNet(64, label_dim=1000, model_channels=channels))
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    assert len(denoiser.state_dict()) == 203


def test_a_fresh_network_puts_out_nothing():
    x = torch.randn(2, 3, 32, 32)
    denoiser = small()
    raw = denoiser.backbone(x, torch.zeros(2))
    assert torch.equal(raw, torch.zeros_like(raw))


def test_operations_keep_the_magnitude(generator):
    a, b = torch.randn(2, 64, 100, 32, 32, generator=generator)
    for value in (mp_silu(a), mp_sum(a, b, 0.3), mp_cat(a, b[:, :30], 0.5)):
        assert float(value.square().mean()) == pytest.approx(1, rel=0.02)
    both = mp_cat(a, b[:, :30], 0.5)
    first, second = both[:, :100].square().sum(1), both[:, 100:].square().sum(1)
    assert float(first.mean()) == pytest.approx(float(second.mean()), rel=0.02)
    rms = unit_rms(7 * a).square().mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(rms, torch.ones(64), rtol=1e-4, atol=0)
    layer = MPConv(100, 50, 3)
    assert float(layer(a[:4]).square().mean()) == pytest.approx(1, rel=0.1)


def test_forced_normalisation_changes_weights_and_no_output():
    torch.manual_seed(0)
    denoiser = small()
    with torch.no_grad():
        denoiser.unet.out_gain.fill_(1)
        for p in denoiser.parameters():
            if p.ndim > 1:
                p.mul_(3.7)
    x, sigma = torch.randn(2, 3, 32, 32), torch.tensor([0.3, 4.0])
    labels = torch.tensor([1, 2])
    with torch.no_grad():
        before = denoiser(x, sigma, labels)
        state = copy.deepcopy(denoiser.state_dict())
        denoiser(x, sigma, labels)
        assert all(torch.equal(v, state[k]) for k, v in denoiser.state_dict().items())
        normalize_weights(denoiser)
        after = denoiser(x, sigma, labels)
    # 1e-4 is added to every norm before dividing, so the scale does not quite vanish
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    for module in denoiser.modules():
        if isinstance(module, MPConv):
            rms = module.weight.square().flatten(1).mean(1).sqrt()
            torch.testing.assert_close(rms, torch.ones_like(rms), rtol=1e-3, atol=0)


def test_dropout_only_at_low_resolutions():
    unet = EDM2UNet(32, model_channels=64, channel_mult=[1, 2], dropout=0.4, dropout_resolution=16)
    shares = {
        name: block.dropout.p
        for part in (unet.enc, unet.dec)
        for name, block in part.items()
        if hasattr(block, "dropout")
    }
    assert {share for name, share in shares.items() if name.startswith("32x32")} == {0.0}
    assert {share for name, share in shares.items() if name.startswith("16x16")} == {0.4}


def test_the_variance_head_learns_only_if_told():
    def trained(**options):
        denoiser = EDM2Precond(EDM2UNet(16, model_channels=64, channel_mult=[1]), **options)
        return [n for n, p in denoiser.named_parameters() if "logvar" in n and p.requires_grad]

    assert trained() == []
    assert trained(learn_variance=True) == ["logvar_linear.weight"]


def test_classes_change_the_output_and_minus_one_means_none():
    torch.manual_seed(0)
    denoiser = small()
    with torch.no_grad():
        for name, p in denoiser.named_parameters():
            if name.endswith("gain"):
                p.fill_(1)
        x, sigma = torch.randn(3, 3, 32, 32), torch.ones(3)
        out = [
            denoiser(x, sigma, labels)
            for labels in (torch.tensor([0, 1, 2]), torch.tensor([-1, -1, -1]), None)
        ]
    assert not torch.allclose(out[0], out[1], atol=1e-3)
    assert torch.equal(out[1], out[2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"img_resolution": 30}, "img_resolution 30"),
        ({"dropout": 1.0}, "dropout"),
        ({"num_blocks": 0}, "num_blocks"),
        ({"attention": "flash"}, "attention"),
    ],
)
def test_bad_arguments_are_named(arguments, words):
    with pytest.raises(InputError, match=words):
        EDM2UNet(**({"img_resolution": 64} | arguments))


def test_log_variance_is_fp32_under_autocast():
    denoiser = small()
    fill(denoiser)
    sigma = torch.tensor([0.01, 0.5, 2.0, 80.0])
    with torch.no_grad():
        expected = denoiser.log_variance(sigma)
        with torch.autocast("cpu", torch.bfloat16):
            got = denoiser.log_variance(sigma)
    assert got.dtype == torch.float32
    assert torch.equal(got, expected)
