"""ADMUNet: the backbone of "Diffusion models beat GANs" (arXiv:2105.05233) as kept by EDM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.dropout import LabelDropout
from cm_lightning.networks.layers import (
    Conv,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from cm_lightning.networks.songunet import check_counts, check_images, check_sizes

__all__ = ["ADMUNet"]

SCALED: Init = ("kaiming_uniform", math.sqrt(1 / 3), math.sqrt(1 / 3))
ZERO: Init = ("kaiming_uniform", 0.0, 0.0)
HEAD_CHANNELS = 64


class ADMUNet(nn.Module):
    r"""Raw network :math:`F(c_\text{in} x, c_\text{noise})` of EDM's ImageNet-64 model.

    Embedding-scaled (adaptive) group norms unless told otherwise, attention with 64 channels per
    head at every block of the given resolutions. Arguments and parameter names are those of the
    public EDM checkpoint (``DhariwalUNet`` there).

    Args:
        img_resolution: Height and width of the images, divisible by 2 per level below the first.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for an unconditional network.
        augment_dim: Size of the augmentation label, 0 for none.
        model_channels: Base number of channels.
        channel_mult: Multiple of ``model_channels`` per level.
        channel_mult_emb: Multiple for the embedding.
        num_blocks: Residual blocks per level.
        attn_resolutions: Resolutions with self-attention.
        dropout: Dropout probability in [0, 1).
        dropout_resolution: Largest resolution with dropout, ``None`` for all. iCT: 16.
        adaptive: Whether the embedding scales the group norms as well as shifting what they
            normalise. iCT: not.
        label_dropout: Probability of dropping the class label in training, in [0, 1).
        attention: ``"sdpa"``, or ``"math"`` where forward-mode derivatives are needed.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int = 3,
        out_channels: int = 3,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        dropout_resolution: int | None = None,
        adaptive: bool = True,
        label_dropout: float = 0.0,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        check_sizes("ADMUNet", img_resolution, levels, model_channels, dropout, label_dropout)
        check_counts(
            "ADMUNet",
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "channel_mult_emb": channel_mult_emb,
                "num_blocks": num_blocks,
                "every channel_mult": min(channel_mult),
            },
            {"label_dim": label_dim, "augment_dim": augment_dim},
        )
        self.img_resolution, self.in_channels = img_resolution, in_channels
        self.out_channels, self.label_dim, self.augment_dim = out_channels, label_dim, augment_dim
        self.label_dropout = label_dropout
        self.drop_labels = LabelDropout(label_dropout)
        emb_channels = model_channels * channel_mult_emb
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "adaptive_scale": adaptive,
            "init": SCALED,
            "init_zero": ZERO,
            "attention": attention,
        }
        self.map_noise = PositionalEmbedding(model_channels)

        def residual(size: int, before: int, after: int, **kind: Any) -> UNetBlock:
            limit = img_resolution if dropout_resolution is None else dropout_resolution
            share = dropout if size <= limit else 0.0
            return UNetBlock(before, after, dropout=share, **kind, **block)

        self.map_augment: Linear | None = None
        if augment_dim:
            self.map_augment = Linear(augment_dim, model_channels, bias=False, init=ZERO)
        self.map_layer0 = Linear(model_channels, emb_channels, init=SCALED)
        self.map_layer1 = Linear(emb_channels, emb_channels, init=SCALED)
        self.map_label: Linear | None = None
        if label_dim:
            unit: Init = ("kaiming_normal", math.sqrt(label_dim), 0.0)
            self.map_label = Linear(label_dim, emb_channels, bias=False, init=unit)

        self.enc = nn.ModuleDict()
        width = in_channels
        skips: list[int] = []
        for level, multiple in enumerate(channel_mult):
            size = img_resolution >> level
            wide = model_channels * multiple
            heads = wide // HEAD_CHANNELS if size in attn_resolutions else 0
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv(width, wide, 3, init=SCALED)
                width = wide
            else:
                self.enc[f"{size}x{size}_down"] = residual(size, width, width, down=True)
            skips.append(width)
            for i in range(num_blocks):
                self.enc[f"{size}x{size}_block{i}"] = residual(size, width, wide, heads=heads)
                width = wide
                skips.append(width)

        self.dec = nn.ModuleDict()
        for level in reversed(range(levels)):
            size = img_resolution >> level
            wide = model_channels * channel_mult[level]
            heads = wide // HEAD_CHANNELS if size in attn_resolutions else 0
            if level == levels - 1:
                first = width // HEAD_CHANNELS
                self.dec[f"{size}x{size}_in0"] = residual(size, width, width, heads=first)
                self.dec[f"{size}x{size}_in1"] = residual(size, width, width)
            else:
                self.dec[f"{size}x{size}_up"] = residual(size, width, width, up=True)
            for i in range(num_blocks + 1):
                joined = width + skips.pop()
                self.dec[f"{size}x{size}_block{i}"] = residual(size, joined, wide, heads=heads)
                width = wide
        self.out_norm = GroupNorm(width)
        self.out_conv = Conv(width, out_channels, 3, init=ZERO)

    def forward(
        self,
        x: Tensor,
        noise_labels: Tensor,
        class_labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        """Evaluate the network.

        Args:
            x: Scaled noisy images, ``(B, in_channels, H, W)``.
            noise_labels: Noise labels, ``(B,)``.
            class_labels: One-hot rows ``(B, label_dim)``, zeros for "no class", or ``None``.
            augment_labels: Augmentation labels ``(B, augment_dim)`` or ``None`` for zeros.

        Returns:
            ``(B, out_channels, H, W)``.

        Raises:
            InputError: If the images have another shape.
        """
        check_images(self, x)
        emb = self._embed(noise_labels, class_labels, augment_labels)
        kept: list[Tensor] = []
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            kept.append(x)
        for block in self.dec.values():
            if x.shape[1] != block.in_channels:
                x = torch.cat([x, kept.pop()], dim=1)
            x = block(x, emb)
        out: Tensor = self.out_conv(functional.silu(self.out_norm(x)))
        return out

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            emb = self.map_noise(noise_labels.to(self.map_layer0.weight.dtype))
            if self.map_augment is not None:  # every weight takes part in every pass, as DDP asks
                told = emb.new_zeros(1, self.augment_dim)
                told = told if augment_labels is None else augment_labels.to(emb.dtype)
                emb = emb + self.map_augment(told)
            emb = self.map_layer1(functional.silu(self.map_layer0(emb)))
            if self.map_label is not None and class_labels is not None:
                rows = class_labels.to(emb.dtype)
                rows = self.drop_labels(rows)
                emb = emb + self.map_label(rows)
            return functional.silu(emb)
