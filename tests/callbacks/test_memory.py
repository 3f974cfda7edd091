"""The estimate of memory counts what it says."""

from __future__ import annotations

import gc
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from cm_lightning.callbacks.memory import kept_bytes
from cm_lightning.networks import EDMPrecond, SongUNet


class Squares(nn.Module):
    """Keeps its input (for the product) and the product (for the square): 2 x 48 numbers."""

    img_resolution, in_channels, label_dim = 4, 3, 0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x, noise_labels, class_labels=None):
        return (x * self.weight).square()


def test_kept_numbers_by_hand():
    denoiser = EDMPrecond(Squares())
    before = torch.get_rng_state()
    one, two = (kept_bytes(denoiser, n, nullcontext()) for n in (1, 2))
    # x c_in and the product, 48 numbers each, and c_out per image
    assert two - one == 4 * (48 + 48 + 1)
    assert torch.equal(before, torch.get_rng_state())


def test_the_estimate_keeps_nothing():
    """Values of a softmax that are kept with their graph would hold one another for good."""

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())

    net = SongUNet(8, 1, 1, model_channels=32, channel_mult=[1], num_blocks=1, attn_resolutions=[8])
    denoiser = EDMPrecond(net)
    before = tensors()
    assert kept_bytes(denoiser, 2, nullcontext()) > 0
    assert tensors() == before


def test_weights_do_not_count_and_copies_in_bf16_count_once():
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    denoiser = EDMPrecond(SongUNet(8, 1, 1, dropout=0.1, **small))
    weights = sum(p.numel() for p in denoiser.parameters() if p.ndim == 4)  # convolutions
    for context, fixed in (
        (nullcontext, 0),
        (lambda: torch.autocast("cpu", torch.bfloat16), 2 * weights),
    ):
        one, two, five = (kept_bytes(denoiser, n, context()) for n in (1, 2, 5))
        assert abs(five - one - 4 * (two - one)) < 0.01 * five  # linear in the images
        assert abs(2 * one - two - fixed) < 0.1 * max(fixed, one)
