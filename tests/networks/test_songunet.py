"""SongUNet and its preconditioning: fill values, sizes, labels, precision, dropout, errors."""

from __future__ import annotations

import math

import pytest
import torch

from cm_lightning.networks import ADMUNet, EDMPrecond, SongUNet, edm_coefficients
from cm_lightning.networks.layers import FourierEmbedding, PositionalEmbedding
from cm_lightning.types import InputError

VE = {
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
}
SMALL = {"model_channels": 32, "channel_mult": [2, 2, 2], "num_blocks": 2, "dropout": 0.0}


def tiny(**changes) -> EDMPrecond:
    arguments = {
        "img_resolution": 8,
        "in_channels": 1,
        "out_channels": 1,
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [4],
    }
    return EDMPrecond(SongUNet(**(arguments | changes)))


def fill(denoiser: EDMPrecond) -> int:
    """The deterministic weights of the published fill values; returns the number of tensors."""
    state = denoiser.state_dict()
    names = [name for name in sorted(state) if not name.endswith("resample_filter")]
    for i, name in enumerate(names):
        value = state[name]
        j = torch.arange(value.numel(), dtype=torch.float64)
        phase = (j + 1) * 0.6180339887498949 + (i + 1) * 0.7548776662466927
        u = (2 * (phase - phase.floor()) - 1).reshape(value.shape)
        if name.endswith("freqs"):
            u = 2 * u
        elif name.endswith("phases"):
            u = math.pi * u
        elif value.ndim == 0:
            u = torch.full_like(u, 0.5)
        elif value.ndim == 1:
            u = 1 + 0.1 * u if name.endswith("weight") else 0.1 * u
        else:
            u = u * math.sqrt(3 / (value.numel() / value.shape[0]))
        state[name] = u.float()
    denoiser.load_state_dict(state)
    return len(names)


def check_values(denoiser: EDMPrecond, labels, values) -> None:
    """Published fp32 values in float64; ours in fp32, whose rounding depends on the processor."""
    x = torch.sin(0.1 * torch.arange(2 * 3 * 32 * 32).double()).float().reshape(2, 3, 32, 32)
    sigma = torch.tensor([0.5, 2.0])
    with torch.no_grad():
        single = denoiser(x, sigma, labels)
        out = denoiser.double()(x.double(), sigma.double(), labels)
    assert out.dtype == torch.float64
    got = (out.mean(), out.std(), out[0, 0, 0, 0], out[1, 2, -1, -1], out[0, 1, 16, 16])
    assert [float(value) for value in got] == pytest.approx(values, abs=5e-6)
    assert torch.allclose(single.double(), out, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("form", "label_dim", "tensors", "parameters", "values"),
    [
        ({}, 0, 272, 2_207_235, (-0.020384, 0.269848, -0.127335, -0.036262, -0.433157)),
        ({}, 10, 274, 2_207_587, (-0.014611, 0.271170, -0.186804, -0.076940, -0.436977)),
        (VE, 0, 277, 2_250_051, (-0.006524, 0.273881, 0.002175, 0.361921, -0.386964)),
    ],
)
def test_fill_values(form, label_dim, tensors, parameters, values):
    denoiser = EDMPrecond(SongUNet(32, label_dim=label_dim, **SMALL, **form)).eval()
    assert fill(denoiser) == tensors
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    check_values(denoiser, torch.tensor([3, 7]) if label_dim else None, values)


def test_fill_values_of_adm():
    unet = ADMUNet(
        32,
        label_dim=10,
        model_channels=64,
        channel_mult=[1, 2],
        num_blocks=2,
        attn_resolutions=[16],
    )
    denoiser = EDMPrecond(unet).eval()
    assert fill(denoiser) == 201
    assert sum(p.numel() for p in denoiser.parameters()) == 4_591_363
    expected = (-0.011978, 0.293384, 0.007041, -0.083025, -0.591718)
    check_values(denoiser, torch.tensor([3, 7]), expected)


def test_size_of_the_public_adm_checkpoint():
    with torch.device("meta"):
        denoiser = EDMPrecond(ADMUNet(64, label_dim=1000))
    assert sum(p.numel() for p in denoiser.parameters()) == 295_899_267
    assert len(denoiser.state_dict()) == 553


@pytest.mark.parametrize(
    ("form", "label_dim", "parameters", "tensors"),
    [
        ({}, 0, 55_733_891, 425),
        ({}, 10, 55_735_299, 427),
        (VE, 0, 56_397_827, 432),
        (VE, 10, 56_400_643, 434),
    ],
)
def test_sizes_of_the_public_checkpoints(form, label_dim, parameters, tensors):
    with torch.device("meta"):
        denoiser = EDMPrecond(SongUNet(32, label_dim=label_dim, augment_dim=9, **form))
    assert sum(p.numel() for p in denoiser.parameters()) == parameters
    assert len(denoiser.state_dict()) == tensors


@pytest.mark.parametrize(
    ("sigma", "c_skip", "c_out"),
    [
        (1.0, 0.2, 0.4472135955),
        (0.002, 0.9999840003, 0.0019999840),
        (80.0, 3.906097e-5, 0.4999902347),
    ],
)
def test_preconditioning_values(sigma, c_skip, c_out):
    got = edm_coefficients(torch.tensor(sigma, dtype=torch.float64), 0.5)
    assert float(got[0]) == pytest.approx(c_skip, rel=1e-6)
    assert float(got[1]) == pytest.approx(c_out, rel=1e-6)
    assert float(got[2]) == pytest.approx(1 / math.hypot(sigma, 0.5), rel=1e-12)
    assert float(got[3]) == pytest.approx(math.log(sigma) / 4, rel=1e-12, abs=1e-12)


def test_a_fresh_network_puts_out_almost_nothing():
    """Published initialisation: the last convolution is scaled by 1e-5, so D is c_skip x."""
    denoiser = tiny().eval()
    x, sigma = torch.randn(4, 1, 8, 8), torch.tensor([0.1, 1.0, 10.0, 80.0])
    skip = (0.25 / (sigma**2 + 0.25))[:, None, None, None] * x
    with torch.no_grad():
        assert float((denoiser(x, sigma) - skip).abs().max()) < 1e-3


def test_classes_change_the_output_and_minus_one_means_none():
    denoiser = tiny(label_dim=10).eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    with torch.no_grad():
        zero = denoiser(x, sigma, torch.tensor([0, 0]))
        one = denoiser(x, sigma, torch.tensor([1, 1]))
        none = denoiser(x, sigma, torch.tensor([-1, -1]))
        absent = denoiser(x, sigma)
    assert float((zero - one).abs().max()) > 1e-4
    assert float((zero - none).abs().max()) > 1e-4
    torch.testing.assert_close(none, absent)


def test_bf16_inside_fp32_outside():
    denoiser = tiny().eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        exact = denoiser(x, sigma)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = denoiser(x, sigma)
    assert rounded.dtype is torch.float32
    assert float((rounded - exact).abs().max()) < 0.05
    assert not torch.equal(rounded, exact)


@pytest.mark.parametrize("images", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [torch.float32, torch.float64])
def test_images_need_not_have_the_dtype_of_the_weights(images, weights):
    denoiser = tiny().eval()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.05)
    x, sigma = torch.randn(2, 1, 8, 8).to(images), torch.tensor([0.5, 2.0])
    with torch.no_grad():
        expected = denoiser(x.float(), sigma)
        out = denoiser.to(weights)(x, sigma)
    assert out.dtype is torch.promote_types(images, torch.float32)
    torch.testing.assert_close(out.float(), expected)


def test_noise_embedding_is_full_precision_under_autocast():
    seen = []
    denoiser = tiny().eval()
    denoiser.backbone.map_layer1.register_forward_hook(lambda m, i, o: seen.append(o.dtype))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        denoiser(torch.randn(1, 1, 8, 8), torch.ones(1))
    assert seen == [torch.float32]


def test_dropout_follows_the_seed():
    denoiser = tiny(dropout=0.5).train()
    for p in denoiser.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, sigma = torch.randn(2, 1, 8, 8), torch.ones(2)
    outs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outs.append(denoiser(x, sigma))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    assert torch.equal(denoiser.eval()(x, sigma), denoiser(x, sigma))


def test_embeddings_by_formula():
    c = torch.tensor([0.3, -1.2])
    out = PositionalEmbedding(8, endpoint=True)(c)
    frequencies = 10000.0 ** (-torch.arange(4) / 3)
    expected = torch.cat([(c[:, None] * frequencies).cos(), (c[:, None] * frequencies).sin()], 1)
    torch.testing.assert_close(out, expected)
    fourier = FourierEmbedding(8, scale=0.02)
    assert float(fourier.freqs.abs().max()) < 0.2
    angle = 2 * math.pi * c[:, None] * fourier.freqs
    torch.testing.assert_close(fourier(c), torch.cat([angle.cos(), angle.sin()], 1))


def test_a_public_state_dict_without_augmentation_layer_names_what_is_missing():
    """Names are those of the public files: ``model.enc.8x8_conv.weight`` and so on."""
    names = set(tiny(label_dim=10).state_dict())
    assert "model.enc.8x8_conv.weight" in names
    assert "model.dec.8x8_aux_conv.bias" in names
    assert "model.enc.4x4_block0.qkv.weight" in names
    assert "model.map_label.weight" in names


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"img_resolution": 7}, "multiple of 2"),
        ({"model_channels": 6}, "model_channels"),
        ({"model_channels": 36}, "multiples of 32"),
        ({"dropout": 1.0}, "dropout"),
        ({"channel_mult": []}, "channel_mult is empty"),
        ({"channel_mult": [1, 0]}, "channel_mult must be at least 1, got 0"),
        ({"channel_mult_emb": 0}, "channel_mult_emb must be at least 1"),
        ({"channel_mult_noise": 0}, "channel_mult_noise must be at least 1"),
        ({"num_blocks": 0}, "num_blocks must be at least 1"),
        ({"in_channels": 0}, "in_channels must be at least 1"),
        ({"out_channels": 0}, "out_channels must be at least 1"),
        ({"label_dim": -1}, "label_dim must be at least 0"),
        ({"augment_dim": -1}, "augment_dim must be at least 0"),
        ({"label_dropout": -0.1}, "label_dropout"),
        ({"embedding_type": "sine"}, "embedding_type must be one of positional, fourier"),
        ({"encoder_type": "skip"}, "encoder_type must be one of standard, residual"),
        ({"decoder_type": "skip"}, "decoder_type must be one of standard"),
        ({"resample_filter": []}, "resample_filter"),
        ({"resample_filter": [1, 2, 1]}, "resample_filter"),
        ({"resample_filter": [1, -1]}, "resample_filter"),
        ({"fourier_scale": 0.0}, "fourier_scale"),
        ({"attention": "flash"}, "attention must be one of sdpa, math, got 'flash'"),
    ],
)
def test_bad_sizes_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        tiny(**arguments)


def test_bad_input_is_refused():
    denoiser = tiny()
    with pytest.raises(InputError, match="shape"):
        denoiser(torch.zeros(1, 1, 16, 16), torch.ones(1))
    with pytest.raises(InputError, match="unconditional"):
        denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(InputError, match="sigma_data"):
        EDMPrecond(denoiser.backbone, sigma_data=0)


def test_denoiser_knows_its_images_and_classes():
    assert tiny(label_dim=10).image_shape == (1, 8, 8)
    assert tiny(label_dim=10).num_classes == 10
    assert tiny().num_classes == 0


@pytest.mark.parametrize("network", [SongUNet, ADMUNet])
def test_label_dropout_drops_whole_labels_in_training_only(network):
    sizes = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    unet = network(8, 1, 1, label_dim=10, dropout=0, label_dropout=0.5, **sizes)
    for p in unet.parameters():
        torch.nn.init.normal_(p, std=0.1)
    denoiser = EDMPrecond(unet)
    x = torch.randn(1, 1, 8, 8).expand(200, 1, 8, 8)
    sigma, labels = torch.ones(200), torch.full((200,), 3)
    with torch.no_grad():
        given = denoiser.eval()(x[:1], sigma[:1], labels[:1])
        none = denoiser(x[:1], sigma[:1])
        out = denoiser.train()(x, sigma, labels)
    kept = (out - given).flatten(1).abs().amax(1) < 1e-4
    dropped = (out - none).flatten(1).abs().amax(1) < 1e-4
    assert bool((kept ^ dropped).all())
    assert 60 < int(kept.sum()) < 140


@pytest.mark.parametrize(
    ("arguments", "words"),
    [({"channel_mult": [1, 0]}, "every channel_mult"), ({"label_dim": -1}, "label_dim")],
)
def test_bad_counts_of_adm_are_refused(arguments, words):
    with pytest.raises(InputError, match=words):
        ADMUNet(8, 1, 1, **arguments)
