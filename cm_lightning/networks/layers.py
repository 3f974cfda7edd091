"""Building blocks of the EDM family of U-Nets, with the parameter names of its checkpoints."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from cm_lightning.dropout import Dropout
from cm_lightning.types import InputError, check_word

__all__ = [
    "Conv",
    "FourierEmbedding",
    "GroupNorm",
    "Init",
    "Linear",
    "PositionalEmbedding",
    "Recomputable",
    "UNetBlock",
    "split_heads",
]

Init = tuple[Literal["xavier_uniform", "kaiming_uniform", "kaiming_normal"], float, float]
"""Law of a layer's initial weights, factor on the weights, factor on the bias."""

XAVIER: Init = ("xavier_uniform", 1.0, 0.0)


def _draw(shape: Sequence[int], mode: str, fan_in: int, fan_out: int) -> Tensor:
    if mode == "xavier_uniform":
        return math.sqrt(6 / (fan_in + fan_out)) * (torch.rand(*shape) * 2 - 1)
    if mode == "kaiming_uniform":
        return math.sqrt(3 / fan_in) * (torch.rand(*shape) * 2 - 1)
    return math.sqrt(1 / fan_in) * torch.randn(*shape)


class Linear(nn.Module):
    """Affine map with EDM's initialisation."""

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, init: Init = XAVIER
    ) -> None:
        super().__init__()
        mode, weight_scale, bias_scale = init
        fans = (in_features, out_features)
        weight = _draw((out_features, in_features), mode, *fans) * weight_scale
        self.weight = nn.Parameter(weight)
        self.bias = nn.Parameter(_draw((out_features,), mode, *fans) * bias_scale) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_features)`` to ``(B, out_features)``."""
        return functional.linear(x, self.weight, self.bias)


class GroupNorm(nn.GroupNorm):
    """Group normalisation with min(32, C // 4) groups, computed in fp32.

    Args:
        channels: Number of channels C.
        eps: Added to the variance: 1e-6 in SongUNet, 1e-5 in ADM.

    Raises:
        InputError: If the groups do not divide the channels.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        groups = max(min(32, channels // 4), 1)
        if channels % groups:
            raise InputError(
                f"The network needs group norms of {channels} channels, which {groups} groups "
                "do not divide: choose model_channels and channel_mult in multiples of 32."
            )
        super().__init__(groups, channels, eps)


class Conv(nn.Module):
    """Resampling by two, if asked for, then a convolution; a kernel of 0 resamples only.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Odd kernel size, or 0 for no convolution.
        bias: Whether there is a bias.
        up: Double the resolution first.
        down: Halve the resolution first.
        resample_filter: Low-pass filter, ``[1, 1]`` or ``[1, 3, 3, 1]``.
        fused: For ``down``: convolve at full resolution before filtering (one wider padding), as
            the residual branch of NCSN++ does.
        init: Initial weights.
    """

    resample_filter: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        bias: bool = True,
        up: bool = False,
        down: bool = False,
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
        init: Init = XAVIER,
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.up, self.down, self.fused = up, down, fused
        self.weight: nn.Parameter | None = None
        self.bias: nn.Parameter | None = None
        if kernel:
            mode, weight_scale, bias_scale = init
            fans = (in_channels * kernel**2, out_channels * kernel**2)
            shape = (out_channels, in_channels, kernel, kernel)
            self.weight = nn.Parameter(_draw(shape, mode, *fans) * weight_scale)
            if bias:
                self.bias = nn.Parameter(_draw((out_channels,), mode, *fans) * bias_scale)
        taps = torch.as_tensor(resample_filter, dtype=torch.float32)
        outer = (taps[:, None] * taps[None, :])[None, None] / taps.sum().square()
        self.register_buffer("resample_filter", outer if up or down else None)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` to ``(B, out_channels, H', W')``."""
        pad = 0 if self.weight is None else self.weight.shape[-1] // 2
        if self.resample_filter is None:
            return x if self.weight is None else self._convolve(x, pad)
        taps = self.resample_filter.to(x.dtype)
        reach = (taps.shape[-1] - 1) // 2
        if self.fused and self.down and self.weight is not None:
            x = functional.conv2d(x, self.weight.to(x.dtype), padding=pad + reach)
            x = _depthwise(x, taps, padding=0)
            return x if self.bias is None else x + self.bias.to(x.dtype)[:, None, None]
        if self.up:
            spread = (4 * taps).tile(self.in_channels, 1, 1, 1)
            x = functional.conv_transpose2d(
                x, spread, groups=self.in_channels, stride=2, padding=reach
            )
        else:
            x = _depthwise(x, taps, padding=reach)
        return x if self.weight is None else self._convolve(x, pad)

    def _convolve(self, x: Tensor, padding: int) -> Tensor:
        assert self.weight is not None
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.conv2d(x, self.weight.to(x.dtype), bias, padding=padding)


def _depthwise(x: Tensor, taps: Tensor, padding: int) -> Tensor:
    channels = x.shape[1]
    return functional.conv2d(
        x, taps.tile(channels, 1, 1, 1), groups=channels, stride=2, padding=padding
    )


class Recomputable(nn.Module):
    """A residual block whose activations the backward pass may compute a second time.

    Attributes:
        checkpointing: Whether it does. Dropout masks are functions of a key that the layers hold,
            so the second time has them too.
    """

    checkpointing = False

    @abstractmethod
    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """What the block does."""

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` and ``(B, emb_channels)`` to ``(B, C, H', W')``."""
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(self.compute, x, emb, use_reentrant=False)
            return out
        return self.compute(x, emb)


class UNetBlock(Recomputable):
    """Residual block conditioned on the embedding, with optional self-attention.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels C of the output.
        emb_channels: Size of the embedding.
        up: Double the resolution.
        down: Halve the resolution.
        heads: Attention heads, 0 for no attention.
        dropout: Probability of dropout between the convolutions.
        skip_scale: Factor after each residual sum.
        eps: Epsilon of the group norms.
        resample_filter: Filter of the resampling.
        resample_proj: Whether a resampling block has a 1x1 convolution on its skip path.
        adaptive_scale: Whether the embedding scales as well as shifts.
        init: Initial weights of the convolutions and the embedding map.
        init_zero: Initial weights of the last convolutions, close to zero.
        init_attn: Initial weights of queries, keys and values.
        attention: ``"sdpa"`` for torch's fused attention, ``"math"`` for plain tensor operations,
            which have forward-mode derivatives and a softmax in fp32.

    Raises:
        InputError: If ``attention`` is neither.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        up: bool = False,
        down: bool = False,
        heads: int = 0,
        dropout: float = 0.0,
        skip_scale: float = 1.0,
        eps: float = 1e-5,
        resample_filter: Sequence[float] = (1, 1),
        resample_proj: bool = False,
        adaptive_scale: bool = True,
        init: Init = XAVIER,
        init_zero: Init = ("xavier_uniform", 0.0, 0.0),
        init_attn: Init | None = None,
        attention: Literal["sdpa", "math"] = "sdpa",
    ) -> None:
        super().__init__()
        check_word("attention", attention, ("sdpa", "math"))
        self.in_channels, self.out_channels, self.heads = in_channels, out_channels, heads
        self.dropout = Dropout(dropout)
        self.skip_scale, self.adaptive_scale = skip_scale, adaptive_scale
        self.attention = attention
        changes = out_channels != in_channels
        resampling = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv(in_channels, out_channels, 3, init=init, **resampling)  # type: ignore[arg-type]
        self.affine = Linear(emb_channels, out_channels * (2 if adaptive_scale else 1), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv(out_channels, out_channels, 3, init=init_zero)
        self.skip: Conv | None = None
        if changes or up or down:
            kernel = 1 if resample_proj or changes else 0
            self.skip = Conv(in_channels, out_channels, kernel, init=init, **resampling)  # type: ignore[arg-type]
        if heads:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv(out_channels, out_channels * 3, 1, init=init_attn or init)
            self.proj = Conv(out_channels, out_channels, 1, init=init_zero)

    def compute(self, x: Tensor, emb: Tensor) -> Tensor:
        """Map ``(B, in_channels, H, W)`` and ``(B, emb_channels)`` to ``(B, C, H', W')``."""
        h = self.conv0(functional.silu(self.norm0(x)))
        params = self.affine(emb).to(h.dtype)[:, :, None, None]
        if self.adaptive_scale:
            scale, shift = params.chunk(2, dim=1)
            h = functional.silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = functional.silu(self.norm1(h + params))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.skip_scale
        if self.heads:
            x = (x + self.proj(self._attend(self.qkv(self.norm2(x))))) * self.skip_scale
        return x

    def _attend(self, qkv: Tensor) -> Tensor:
        batch, channels, height, width = qkv.shape
        size = channels // (3 * self.heads)
        # channel = head * (3 * size) + c * 3 + {q, k, v}
        q, k, v = split_heads(qkv.reshape(batch, self.heads, size, 3, height * width))
        if self.attention == "sdpa":
            out = functional.scaled_dot_product_attention(q, k, v)
        else:
            wide = torch.promote_types(qkv.dtype, torch.float32)
            with torch.autocast(qkv.device.type, enabled=False):
                scores = (q.to(wide) @ k.to(wide).transpose(-1, -2)) / math.sqrt(size)
                weights = scores.softmax(-1).to(v.dtype)
            out = weights @ v
        return out.transpose(-1, -2).reshape(batch, channels // 3, height, width)


def split_heads(joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; on a GPU in the layout that its fused kernels take.

    These want the values of a position side by side (last stride 1); for others torch silently
    takes a slow way. On a CPU the parts are left as they come: the copy made ADM faster and DDPM++
    slower there.

    Args:
        joined: ``(B, heads, size, 3, positions)``.

    Returns:
        Three tensors ``(B, heads, positions, size)``.
    """
    parts = joined.permute(3, 0, 1, 4, 2)
    q, k, v = (parts if parts.device.type == "cpu" else parts.contiguous()).unbind()
    return q, k, v


class PositionalEmbedding(nn.Module):
    """Sines and cosines of the noise label at geometric frequencies from 1 down to 1/10,000.

    Args:
        channels: Size of the embedding, even.
        endpoint: Whether the last frequency is exactly 1/10,000.
    """

    def __init__(self, channels: int, endpoint: bool = False) -> None:
        super().__init__()
        self.channels, self.endpoint = channels, endpoint

    def forward(self, labels: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, channels)``: cosines, then sines."""
        half = self.channels // 2
        steps = torch.arange(half, dtype=torch.float32, device=labels.device)
        frequencies = (1 / 10000) ** (steps / (half - (1 if self.endpoint else 0)))
        angles = torch.outer(labels, frequencies.to(labels.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)


class FourierEmbedding(nn.Module):
    """Sines and cosines of the noise label at random frequencies.

    Args:
        channels: Size of the embedding, even.
        scale: Standard deviation of the frequencies: 16 in NCSN++, 0.02 in iCT.
    """

    freqs: Tensor

    def __init__(self, channels: int, scale: float = 16.0) -> None:
        super().__init__()
        self.register_buffer("freqs", torch.randn(channels // 2) * scale)

    def forward(self, labels: Tensor) -> Tensor:
        """Map ``(B,)`` to ``(B, channels)``: cosines, then sines."""
        angles = torch.outer(labels, (2 * math.pi * self.freqs).to(labels.dtype))
        return torch.cat([angles.cos(), angles.sin()], dim=1)
