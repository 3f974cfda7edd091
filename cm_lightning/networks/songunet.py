"""SongUNet: the DDPM++ and NCSN++ backbones as reshaped by EDM (arXiv:2206.00364)."""

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
    FourierEmbedding,
    GroupNorm,
    Init,
    Linear,
    PositionalEmbedding,
    UNetBlock,
)
from cm_lightning.types import InputError, check_word

__all__ = ["SongUNet"]

NEARLY_ZERO: Init = ("xavier_uniform", 1e-5, 0.0)
FOR_ATTENTION: Init = ("xavier_uniform", math.sqrt(0.2), 0.0)


class SongUNet(nn.Module):
    r"""Raw network :math:`F(c_\text{in} x, c_\text{noise})` in two published forms.

    DDPM++ ("VP"): positional embedding, standard encoder. NCSN++ ("VE"): Fourier embedding,
    residual encoder, ``channel_mult_noise=2``, ``resample_filter=[1, 3, 3, 1]``. Arguments and
    parameter names are those of the public EDM checkpoints.

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
        label_dropout: Probability of dropping the class label in training, in [0, 1).
        embedding_type: ``"positional"`` (DDPM++) or ``"fourier"`` (NCSN++).
        channel_mult_noise: Multiple for the noise embedding.
        encoder_type: ``"standard"`` (DDPM++) or ``"residual"`` (NCSN++).
        decoder_type: ``"standard"``, the only published form.
        resample_filter: Filter of the resampling: an even number of taps with a positive sum.
        fourier_scale: Standard deviation of the Fourier frequencies; iCT uses 0.02.
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
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["positional", "fourier"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "residual"] = "standard",
        decoder_type: Literal["standard"] = "standard",
        resample_filter: Sequence[int] = (1, 1),
        fourier_scale: float = 16.0,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        check_sizes("SongUNet", img_resolution, levels, model_channels, dropout, label_dropout)
        check_counts(
            "SongUNet",
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "channel_mult_emb": channel_mult_emb,
                "channel_mult_noise": channel_mult_noise,
                "num_blocks": num_blocks,
                "every channel_mult": min(channel_mult),
            },
            {"label_dim": label_dim, "augment_dim": augment_dim},
        )
        _check_form(embedding_type, encoder_type, decoder_type, resample_filter, fourier_scale)
        self.img_resolution, self.in_channels = img_resolution, in_channels
        self.out_channels, self.label_dim, self.augment_dim = out_channels, label_dim, augment_dim
        self.label_dropout = label_dropout
        self.drop_labels = LabelDropout(label_dropout)
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        block: dict[str, Any] = {
            "emb_channels": emb_channels,
            "dropout": dropout,
            "skip_scale": math.sqrt(0.5),
            "eps": 1e-6,
            "resample_filter": resample_filter,
            "resample_proj": True,
            "adaptive_scale": False,
            "init_zero": NEARLY_ZERO,
            "init_attn": FOR_ATTENTION,
            "attention": attention,
        }
        self.map_noise: PositionalEmbedding | FourierEmbedding
        if embedding_type == "positional":
            self.map_noise = PositionalEmbedding(noise_channels, endpoint=True)
        else:
            self.map_noise = FourierEmbedding(noise_channels, fourier_scale)
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        self.enc = nn.ModuleDict()
        width, image_width = in_channels, in_channels
        for level, multiple in enumerate(channel_mult):
            size = img_resolution >> level
            heads = int(size in attn_resolutions)
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv(width, model_channels, 3)
                width = model_channels
            else:
                self.enc[f"{size}x{size}_down"] = UNetBlock(width, width, down=True, **block)
                if encoder_type == "residual":
                    self.enc[f"{size}x{size}_aux_residual"] = Conv(
                        image_width,
                        width,
                        3,
                        down=True,
                        resample_filter=resample_filter,
                        fused=True,
                    )
                    image_width = width
            for i in range(num_blocks):
                wide = model_channels * multiple
                self.enc[f"{size}x{size}_block{i}"] = UNetBlock(width, wide, heads=heads, **block)
                width = wide
        skips: list[int] = [int(m.out_channels) for k, m in self.enc.items() if "aux" not in k]  # type: ignore[arg-type]

        self.dec = nn.ModuleDict()
        for level in reversed(range(levels)):
            size = img_resolution >> level
            if level == levels - 1:
                self.dec[f"{size}x{size}_in0"] = UNetBlock(width, width, heads=1, **block)
                self.dec[f"{size}x{size}_in1"] = UNetBlock(width, width, **block)
            else:
                self.dec[f"{size}x{size}_up"] = UNetBlock(width, width, up=True, **block)
            for i in range(num_blocks + 1):
                heads = int(i == num_blocks and size in attn_resolutions)
                wide = model_channels * channel_mult[level]
                self.dec[f"{size}x{size}_block{i}"] = UNetBlock(
                    width + skips.pop(), wide, heads=heads, **block
                )
                width = wide
        self.dec[f"{img_resolution}x{img_resolution}_aux_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{img_resolution}x{img_resolution}_aux_conv"] = Conv(
            width, out_channels, 3, init=NEARLY_ZERO
        )

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
        image = x
        for name, block in self.enc.items():
            if "aux_residual" in name:
                image = block(image)
                x = kept[-1] = image = (x + image) / math.sqrt(2)
            else:
                x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
                kept.append(x)
        for name, block in self.dec.items():
            if "aux_norm" in name:
                x = functional.silu(block(x))
            elif "aux_conv" in name:
                x = block(x)
            else:
                if x.shape[1] != block.in_channels:
                    x = torch.cat([x, kept.pop()], dim=1)
                x = block(x, emb)
        return x

    def _embed(
        self, noise_labels: Tensor, class_labels: Tensor | None, augment_labels: Tensor | None
    ) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            noise_labels = noise_labels.to(self.map_layer0.weight.dtype)
            emb = self.map_noise(noise_labels)
            emb = torch.cat(list(reversed(emb.chunk(2, dim=1))), dim=1)  # sines first
            if self.map_label is not None and class_labels is not None:
                rows = class_labels.to(emb.dtype)
                rows = self.drop_labels(rows)
                emb = emb + self.map_label(rows * math.sqrt(self.label_dim))
            elif self.map_label is not None:
                zeros = torch.zeros(1, self.label_dim, dtype=emb.dtype, device=emb.device)
                emb = emb + self.map_label(zeros)
            if self.map_augment is not None:  # every weight takes part in every pass, as DDP asks
                told = emb.new_zeros(1, self.augment_dim)
                told = told if augment_labels is None else augment_labels.to(emb.dtype)
                emb = emb + self.map_augment(told)
            emb = functional.silu(self.map_layer0(emb))
            return functional.silu(self.map_layer1(emb))


def check_sizes(
    network: str,
    img_resolution: int,
    levels: int,
    model_channels: int,
    dropout: float,
    label_dropout: float,
) -> None:
    """Check the sizes of a U-Net.

    Raises:
        InputError: If the image does not halve often enough or a number is outside its range.
    """
    if levels < 1:
        raise InputError(f"{network}: channel_mult is empty.")
    if img_resolution < 1 or img_resolution % 2 ** (levels - 1):
        raise InputError(
            f"{network}: img_resolution {img_resolution} must be a positive multiple of "
            f"{2 ** (levels - 1)} for {levels} levels of channel_mult."
        )
    if model_channels < 4 or model_channels % 4:
        raise InputError(
            f"{network}: model_channels must be a positive multiple of 4, got {model_channels}."
        )
    for name, value in (("dropout", dropout), ("label_dropout", label_dropout)):
        if not 0 <= value < 1:
            raise InputError(f"{network}: {name} must lie in [0, 1), got {value}.")


def check_counts(network: str, positive: dict[str, int], optional: dict[str, int]) -> None:
    """Check the integers of a U-Net: those of at least 1, and those that 0 turns off.

    Raises:
        InputError: If one is smaller, or ``num_blocks`` larger than 100.
    """
    for least, counts in ((1, positive), (0, optional)):
        for name, value in counts.items():
            if value < least:
                raise InputError(f"{network}: {name} must be at least {least}, got {value}.")
    if positive["num_blocks"] > 100:
        raise InputError(
            f"{network}: num_blocks must be 100 at most, got {positive['num_blocks']}."
        )


def _check_form(
    embedding_type: str,
    encoder_type: str,
    decoder_type: str,
    resample_filter: Sequence[float],
    fourier_scale: float,
) -> None:
    for name, value, choices in (
        ("embedding_type", embedding_type, ("positional", "fourier")),
        ("encoder_type", encoder_type, ("standard", "residual")),
        ("decoder_type", decoder_type, ("standard",)),
    ):
        check_word(f"SongUNet: {name}", value, choices)
    if not resample_filter or len(resample_filter) % 2 or not sum(resample_filter) > 0:
        raise InputError(
            "SongUNet: resample_filter must hold an even number of taps with a positive sum, such "
            f"as [1, 1] or [1, 3, 3, 1], got {list(resample_filter)}."
        )
    if not fourier_scale > 0:
        raise InputError(f"SongUNet: fourier_scale must be positive, got {fourier_scale}.")


def check_images(network: Any, x: Tensor) -> None:
    """Check that images have the shape a network was built for.

    Raises:
        InputError: If they have not.
    """
    expected = (network.in_channels, network.img_resolution, network.img_resolution)
    if tuple(x.shape[1:]) != expected:
        raise InputError(
            f"{type(network).__name__} was built for images of shape {expected}, got "
            f"{tuple(x.shape[1:])}."
        )
