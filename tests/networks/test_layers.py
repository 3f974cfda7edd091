"""Building blocks: published initial weights, resampling, attention and its derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from cm_lightning.networks import ADMUNet, EDM2UNet, SongUNet
from cm_lightning.networks.layers import Conv, UNetBlock

SIZES = {"model_channels": 64, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}


def xavier(weight: torch.Tensor) -> float:
    return math.sqrt(6 / (weight[0].numel() + weight[:, 0].numel()))


def kaiming(weight: torch.Tensor) -> float:
    return math.sqrt(3 / weight[0].numel())


@pytest.mark.parametrize(
    ("network", "law", "names", "factor", "biased"),
    [
        (SongUNet, xavier, ["map_layer1", "enc.8x8_block0.conv0", "dec.8x8_in0.affine"], 1, False),
        (SongUNet, xavier, ["dec.8x8_in0.qkv"], math.sqrt(0.2), False),
        (
            SongUNet,
            xavier,
            ["enc.8x8_block0.conv1", "dec.8x8_in0.proj", "dec.8x8_aux_conv"],
            1e-5,
            False,
        ),
        (
            ADMUNet,
            kaiming,
            ["map_layer1", "enc.8x8_block0.conv0", "dec.8x8_in0.qkv", "dec.8x8_in0.affine"],
            math.sqrt(1 / 3),
            True,
        ),
        (ADMUNet, kaiming, ["enc.8x8_block0.conv1", "dec.8x8_in0.proj", "out_conv"], 0, False),
    ],
)
def test_initial_weights_are_uniform_with_the_published_bound(network, law, names, factor, biased):
    torch.manual_seed(0)
    state = network(8, **SIZES).state_dict()
    for name in names:
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        bound = law(weight) * factor
        assert 0.99 * bound <= float(weight.abs().max()) <= bound * (1 + 1e-6)
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        if biased:
            assert 0.9 * bound <= float(bias.abs().max()) <= bound * (1 + 1e-6)
        else:
            assert not bias.any()


def test_the_label_map_of_adm_starts_as_unit_normal():
    torch.manual_seed(0)
    weight = ADMUNet(8, label_dim=10, **SIZES).state_dict()["map_label.weight"]
    assert float(weight.std()) == pytest.approx(1, rel=0.05)


def test_resampling_alone_averages_and_repeats():
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(Conv(3, 3, 0, down=True)(x), functional.avg_pool2d(x, 2))
    twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(Conv(3, 3, 0, up=True)(x), twice)


def test_fused_downsampling_is_convolution_then_filter_away_from_the_border():
    torch.manual_seed(0)
    fused = Conv(3, 4, 3, down=True, resample_filter=[1, 3, 3, 1], fused=True)
    x = torch.randn(1, 3, 16, 16)
    full = functional.conv2d(x, fused.weight, padding=1)
    taps = fused.resample_filter.tile(4, 1, 1, 1)
    expected = functional.conv2d(full, taps, stride=2, padding=1, groups=4)
    torch.testing.assert_close(fused(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1])


def block(heads: int, attention: str) -> UNetBlock:
    torch.manual_seed(0)
    module = UNetBlock(32, 32, 16, heads=heads, attention=attention).eval()
    for p in module.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return module


@pytest.mark.parametrize("heads", [1, 4])
def test_both_attentions_are_the_formula_in_double_precision(heads):
    """Channel = head * 3 size + c * 3 + {q, k, v}, written out as strided slices."""
    qkv = torch.randn(2, 96, 4, 4, dtype=torch.float64)
    parts = []
    for head in qkv.flatten(2).chunk(heads, dim=1):
        q, k, v = head[:, 0::3], head[:, 1::3], head[:, 2::3]
        scores = torch.einsum("bcq,bck->bqk", q, k) / math.sqrt(q.shape[1])
        parts.append(torch.einsum("bqk,bck->bcq", scores.softmax(2), v))
    expected = torch.cat(parts, dim=1).reshape(2, 32, 4, 4)
    for attention in ("sdpa", "math"):
        got = block(heads, attention)._attend(qkv)
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", [SongUNet, ADMUNet, EDM2UNet])
def test_fused_kernels_take_queries_keys_and_values_as_they_are(kind, layout, monkeypatch):
    """They want the values of a position side by side; torch falls back to slow ones silently."""
    seen = []

    def attend(*parts):
        seen.extend(part.stride(-1) for part in parts)
        return parts[2]

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attend)
    with FakeTensorMode(), torch.device("cuda"):
        network = kind(8, 3, 3, **SIZES)
        network(torch.empty(2, 3, 8, 8).to(memory_format=layout), torch.empty(2), None)
    assert seen
    assert set(seen) == {1}


def test_math_softmax_is_fp32_under_autocast():
    """Large scores: rounded to bf16 before the softmax they would move the output by far more."""
    module = block(1, "math")
    qkv = torch.randn(1, 96, 4, 4).bfloat16()
    qkv[:, 0::3] *= 4
    qkv[:, 1::3] *= 4
    expected = module._attend(qkv.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = module._attend(qkv)
    assert out.dtype is torch.bfloat16
    assert float((out.double() - expected).abs().max()) < 0.02


def test_math_has_forward_mode_derivatives():
    sizes = SIZES | {"attention": "math", "label_dim": 3}
    network = SongUNet(8, 1, 1, **sizes).double().eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.1)
    x, dx = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64)
    noise, dnoise = torch.randn(2, 2, dtype=torch.float64)
    rows = torch.eye(3, dtype=torch.float64)[:2]

    def f(x: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        return network(x, noise, rows)

    with torch.no_grad():
        _, slope = torch.func.jvp(f, (x, noise), (dx, dnoise))
        h = 1e-5
        ahead, behind = f(x + h * dx, noise + h * dnoise), f(x - h * dx, noise - h * dnoise)
    torch.testing.assert_close(slope, (ahead - behind) / (2 * h), rtol=1e-5, atol=1e-7)


def test_adm_without_scaling_and_with_dropout_at_low_resolutions():
    """As iCT: h = silu(norm(h + p)), and masks in blocks of at most the given resolution."""
    torch.manual_seed(0)
    unet = ADMUNet(16, dropout=0.4, dropout_resolution=8, adaptive=False, **SIZES)
    for name, block in [*unet.enc.items(), *unet.dec.items()]:
        if hasattr(block, "dropout"):
            assert block.dropout.p == (0.4 if int(name.split("x")[0]) <= 8 else 0.0), name
            assert len(block.affine.weight) == block.out_channels, name
    block = unet.enc["16x16_block0"]
    x, emb = torch.randn(2, block.in_channels, 16, 16), torch.randn(2, block.affine.weight.shape[1])
    block.conv1.weight.data.normal_()
    h = block.conv0(functional.silu(block.norm0(x))) + block.affine(emb)[:, :, None, None]
    y = block.conv1(functional.silu(block.norm1(h))) + (x if block.skip is None else block.skip(x))
    torch.testing.assert_close(block.eval()(x, emb), y)
