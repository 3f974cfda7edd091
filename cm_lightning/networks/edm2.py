"""EDM2UNet: the magnitude-preserving U-Net of EDM2 (Karras et al. 2024, arXiv:2312.02696)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.dropout import Dropout, LabelDropout
from cm_lightning.networks.layers import Recomputable, split_heads
from cm_lightning.networks.preconditioning import EDMPrecond
from cm_lightning.networks.songunet import check_counts, check_images, check_sizes
from cm_lightning.types import check_word

__all__ = ["EDM2Precond", "EDM2UNet", "normalize_weights", "preserves_magnitude"]

HEAD_CHANNELS = 64
RESIDUAL_BALANCE, ATTENTION_BALANCE, CONCAT_BALANCE, LABEL_BALANCE = 0.3, 0.3, 0.5, 0.5
CLIP = 256


def unit_rms(x: Tensor, dim: Sequence[int] | None = None, eps: float = 1e-4) -> Tensor:
    r"""Scale vectors to root mean square 1, in fp32: :math:`x / (\epsilon + \mathrm{rms}(x))`.

    Pixel norm of EDM2's encoder, and its normalised weights (arXiv:2312.02696, Eq. 47).

    Args:
        x: Any shape.
        dim: Axes of a vector; all but the first by default.
        eps: Added to the norm.
    """
    axes = tuple(range(1, x.ndim)) if dim is None else tuple(dim)
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=wide)
    norm = eps + norm * math.sqrt(norm.numel() / x.numel())
    out: Tensor = x / norm.to(x.dtype)
    return out


def mp_silu(x: Tensor) -> Tensor:
    """SiLU of normal input over its root mean square, 0.596 (arXiv:2312.02696, Eq. 81)."""
    return functional.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Sum that keeps the magnitude (arXiv:2312.02696, Eq. 88).

    .. math:: \frac{(1 - t)\, a + t\, b}{\sqrt{(1 - t)^2 + t^2}}

    Args:
        a: Any shape.
        b: The same shape.
        t: Share of ``b``, in [0, 1].
    """
    return torch.lerp(a, b, t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    r"""Concatenation along channels that keeps the magnitude (arXiv:2312.02696, Eq. 103).

    .. math:: \sqrt{\frac{N_a + N_b}{(1 - t)^2 + t^2}} \,
              \Bigl[\frac{1 - t}{\sqrt{N_a}}\, a \;\Big|\; \frac{t}{\sqrt{N_b}}\, b\Bigr]

    Args:
        a: ``(B, N_a, H, W)``.
        b: ``(B, N_b, H, W)``.
        t: Share of ``b``, in [0, 1].

    Returns:
        ``(B, N_a + N_b, H, W)``.
    """
    n_a, n_b = a.shape[1], b.shape[1]
    scale = math.sqrt((n_a + n_b) / ((1 - t) ** 2 + t**2))
    w_a, w_b = scale / math.sqrt(n_a) * (1 - t), scale / math.sqrt(n_b) * t
    return torch.cat([w_a * a, w_b * b], dim=1)


class MPFourier(nn.Module):
    r"""Random features :math:`\sqrt 2 \cos(f x + p)` of a number (arXiv:2312.02696, Eq. 75).

    Args:
        channels: Number of features.
    """

    freqs: Tensor
    phases: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, channels)``."""
        return math.sqrt(2) * (torch.outer(x, self.freqs) + self.phases).cos()


class MPConv(nn.Module):
    r"""Convolution (kernel >= 1) or linear map (kernel 0) with weights of unit magnitude, no bias.

    .. math:: w = \frac{g}{\sqrt{N}} \cdot \frac{v}{\epsilon + \mathrm{rms}(v)}

    for each output channel, with N weights v and a gain g (arXiv:2312.02696, Eq. 47 and 66). The
    stored weights v may have any scale: they are normalised before use, in fp32. Training also
    normalises the stored ones once per optimizer step, see :func:`normalize_weights`; never in a
    forward pass, so that both passes of a consistency pair see the same weights.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd size of the kernel, or 0 for a linear map.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        shape = (out_channels, in_channels, *([kernel] * 2 if kernel else []))
        self.weight = nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        """Apply to ``(B, C)`` or ``(B, C, H, W)``."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        w = unit_rms(self.weight.to(wide)) * (gain / math.sqrt(self.weight[0].numel()))
        w = w.to(x.dtype)
        if w.ndim == 2:
            return x @ w.T
        return functional.conv2d(x, w, padding=w.shape[-1] // 2)


@torch.no_grad()
def normalize_weights(network: nn.Module) -> None:
    """Forced weight normalisation: give every stored weight of MPConv magnitude 1, in place."""
    for module in network.modules():
        if isinstance(module, MPConv):
            module.weight.copy_(unit_rms(module.weight))


def preserves_magnitude(network: nn.Module) -> bool:
    """Whether a network has layers whose weights training normalises."""
    return any(isinstance(module, MPConv) for module in network.modules())


class EDM2Block(Recomputable):
    """Residual block of EDM2 (arXiv:2312.02696, Figure 21), with optional self-attention.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output; with attention a multiple of 64, the size of a head.
        emb_channels: Size of the embedding.
        encoder: Whether it is one of the encoder's, which start with a pixel norm.
        resample: Whether it doubles or halves the resolution first.
        attention: Whether self-attention follows.
        dropout: Probability of dropout between the convolutions.
        kind: ``"sdpa"`` for torch's fused attention, ``"math"`` for plain tensor operations.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        encoder: bool,
        resample: Literal["keep", "up", "down"] = "keep",
        attention: bool = False,
        dropout: float = 0.0,
        kind: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        super().__init__()
        self.out_channels, self.encoder, self.resample = out_channels, encoder, resample
        self.heads = out_channels // HEAD_CHANNELS if attention else 0
        self.dropout, self.kind = Dropout(dropout), kind
        inner = out_channels if encoder else in_channels
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(inner, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels, 0)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        changes = in_channels != out_channels
        self.conv_skip = MPConv(in_channels, out_channels, 1) if changes else None
        if self.heads:
            self.attn_qkv = MPConv(out_channels, out_channels * 3, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` and ``(B, emb_channels)`` to ``(B, C, H', W')``."""
        if self.resample == "down":
            x = functional.avg_pool2d(x, 2)
        elif self.resample == "up":
            # autocast on a GPU does it in fp32
            x = functional.interpolate(x, scale_factor=2.0, mode="nearest").to(x.dtype)
        if self.encoder:
            x = x if self.conv_skip is None else self.conv_skip(x)
            x = unit_rms(x, dim=(1,))
        y = self.conv_res0(mp_silu(x))
        scale = self.emb_linear(emb, gain=self.emb_gain) + 1
        y = mp_silu(y * scale.to(y.dtype)[:, :, None, None])
        y = self.conv_res1(self.dropout(y))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        x = mp_sum(x, y, RESIDUAL_BALANCE)
        if self.heads:
            x = mp_sum(x, self.attn_proj(self._attend(self.attn_qkv(x))), ATTENTION_BALANCE)
        return x.clip(-CLIP, CLIP)

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, channels, height, width = qkv.shape
        size = channels // (3 * self.heads)
        split = unit_rms(qkv.reshape(batch, self.heads, size, 3, height * width), dim=(2,))
        q, k, v = split_heads(split)
        if self.kind == "sdpa":
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            out = (q @ (k / math.sqrt(size)).transpose(-1, -2)).softmax(-1) @ v
        return out.transpose(-1, -2).reshape(batch, channels // 3, height, width)


class EDM2UNet(nn.Module):
    r"""Raw network :math:`F(c_\text{in} x, c_\text{noise})` of EDM2's ImageNet models.

    Every layer keeps the magnitude of its input; the output starts at zero. Arguments and
    parameter names are those of the public checkpoints (``UNet`` there).

    Args:
        img_resolution: Height and width of the images, divisible by 2 per level below the first.
        in_channels: Channels of the images.
        out_channels: Channels of the output.
        label_dim: Number of classes, 0 for an unconditional network.
        model_channels: Base number of channels: 192 (S), 256 (M), 320 (L), 384 (XL).
        channel_mult: Multiple of ``model_channels`` per level.
        num_blocks: Residual blocks per level.
        attn_resolutions: Resolutions with self-attention, 64 channels per head; a block of fewer
            channels has none.
        dropout: Dropout probability in [0, 1).
        dropout_resolution: Largest resolution with dropout, ``None`` for all. ECT: 16.
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
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        dropout: float = 0.0,
        dropout_resolution: int | None = None,
        label_dropout: float = 0.0,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        super().__init__()
        levels = len(channel_mult)
        check_sizes("EDM2UNet", img_resolution, levels, model_channels, dropout, label_dropout)
        check_counts(
            "EDM2UNet",
            {
                "in_channels": in_channels,
                "out_channels": out_channels,
                "num_blocks": num_blocks,
                "every channel_mult": min(channel_mult),
            },
            {"label_dim": label_dim},
        )
        check_word("attention", attention, ("sdpa", "math"))
        self.img_resolution, self.in_channels = img_resolution, in_channels
        self.out_channels, self.label_dim = out_channels, label_dim
        self.label_dropout = label_dropout
        self.drop_labels = LabelDropout(label_dropout)
        widths = [model_channels * multiple for multiple in channel_mult]
        emb_channels = max(widths)

        def block(
            size: int,
            before: int,
            after: int,
            encoder: bool,
            resample: Literal["keep", "up", "down"] = "keep",
            attend: bool = False,
        ) -> EDM2Block:
            limit = img_resolution if dropout_resolution is None else dropout_resolution
            share = dropout if size <= limit else 0.0
            return EDM2Block(
                before, after, emb_channels, encoder, resample, attend, share, attention
            )

        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_channels, 0)
        self.emb_label = MPConv(label_dim, emb_channels, 0) if label_dim else None
        self.enc = nn.ModuleDict()
        width, skips = in_channels + 1, []
        for level, wide in enumerate(widths):
            size = img_resolution >> level
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = MPConv(width, wide, 3)
                width = wide
            else:
                self.enc[f"{size}x{size}_down"] = block(size, width, width, True, "down")
            skips.append(width)
            for i in range(num_blocks):
                attend = size in attn_resolutions
                self.enc[f"{size}x{size}_block{i}"] = block(size, width, wide, True, attend=attend)
                width = wide
                skips.append(width)
        self.dec = nn.ModuleDict()
        for level in reversed(range(levels)):
            size, wide = img_resolution >> level, widths[level]
            if level == levels - 1:
                self.dec[f"{size}x{size}_in0"] = block(size, width, width, False, attend=True)
                self.dec[f"{size}x{size}_in1"] = block(size, width, width, False)
            else:
                self.dec[f"{size}x{size}_up"] = block(size, width, width, False, "up")
            for i in range(num_blocks + 1):
                joined, attend = width + skips.pop(), size in attn_resolutions
                self.dec[f"{size}x{size}_block{i}"] = block(
                    size, joined, wide, False, attend=attend
                )
                width = wide
        self.out_conv = MPConv(width, out_channels, 3)

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
            augment_labels: Not used by this network.

        Returns:
            ``(B, out_channels, H, W)``.

        Raises:
            InputError: If the images have another shape.
        """
        check_images(self, x)
        emb = self._embed(noise_labels, class_labels)
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1)
        kept: list[Tensor] = []
        for layer in self.enc.values():
            x = layer(x, emb) if isinstance(layer, EDM2Block) else layer(x)
            kept.append(x)
        for name, layer in self.dec.items():
            if "block" in name:
                x = mp_cat(x, kept.pop(), CONCAT_BALANCE)
            x = layer(x, emb)
        out: Tensor = self.out_conv(x, gain=self.out_gain)
        return out

    def _embed(self, noise_labels: Tensor, class_labels: Tensor | None) -> Tensor:
        with torch.autocast(noise_labels.device.type, enabled=False):
            wide = self.emb_noise.weight.dtype
            emb: Tensor = self.emb_noise(self.emb_fourier(noise_labels.to(wide)))
            if self.emb_label is not None:
                if class_labels is None:
                    rows = torch.zeros(len(emb), self.label_dim, dtype=wide, device=emb.device)
                else:
                    rows = class_labels.to(wide)
                rows = self.drop_labels(rows)
                rows = self.emb_label(rows * math.sqrt(self.label_dim))
                emb = mp_sum(emb, rows, LABEL_BALANCE)
            return mp_silu(emb)


class EDM2Precond(EDMPrecond):
    r"""EDM's preconditioning with EDM2's learned log-variance of the loss.

    .. math:: \mathcal L = \lambda(\sigma)\, e^{-u(\sigma)}\, (D - x_0)^2 + u(\sigma)

    for each value of the image (arXiv:2312.02696). The head u matters in diffusion training alone;
    names are those of the public checkpoints (``unet.*``, ``logvar_*``).

    Args:
        backbone: An :class:`EDM2UNet`.
        sigma_data: Standard deviation of the data, > 0.
        learn_variance: Train the head. Off for consistency models, whose loss does not use it.
        logvar_channels: Size of the head.

    Raises:
        InputError: If ``sigma_data`` is not positive.
    """

    stored_as = "unet"

    def __init__(
        self,
        backbone: EDM2UNet,
        sigma_data: float = 0.5,
        learn_variance: bool = False,
        logvar_channels: int = 128,
    ) -> None:
        super().__init__(backbone, sigma_data)
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, 0)
        self.logvar_linear.requires_grad_(learn_variance)
        self.learn_variance = learn_variance

    def log_variance(self, sigma: Tensor) -> Tensor:
        """Give u(sigma), ``(B,)``, for noise levels ``(B,)``, in fp32 under autocast too."""
        with torch.autocast(sigma.device.type, enabled=False):
            features = self.logvar_fourier(sigma.log() / 4)
            return self.logvar_linear(features)[:, 0]  # type: ignore[no-any-return]
