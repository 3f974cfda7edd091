"""Dropout whose masks belong to images: no device, split or recomputation changes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.transfer import send

__all__ = ["Dropout", "DropoutKey", "LabelDropout", "forget_keys", "shared_dropout"]


class DropoutKey(NamedTuple):
    """What the masks of a batch are a function of.

    Attributes:
        seed: Seed, ``0 <= seed < 2^63``.
        start: Position of the first row within the global batch.
    """

    seed: int
    start: int = 0


class Dropout(nn.Module):
    r"""Zero values with probability p in training and scale the others by 1 / (1 - p).

    Inside :func:`shared_dropout` value e of row i is kept where

    .. math:: h_2\bigl(h_1(e) \oplus h_1'(i)\bigr) \ge p \cdot 2^{32},

    integer hashes keyed by the seed and the layer: given those, the values of an image are
    independent, and the mask is a pure function of (seed, i, layer, e). Without a key, as outside
    a regime's training, torch's generator draws it.

    Args:
        p: Probability in [0, 1).
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.key: Tensor | None = None  # (3,) int32: two words of the seed, first row

    def extra_repr(self) -> str:
        """The probability."""
        return f"p={self.p}"

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` to the same shape."""
        if not self.training or not self.p:
            return x
        if self.key is None:
            return functional.dropout(x, self.p)
        keep = kept(self.key, x.shape, self.p, x.device)
        return x * keep * (1 / (1 - self.p))


class LabelDropout(Dropout):
    """Zero whole rows ``(B, L)`` with probability p in training, "no class"; the others stay."""

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, L)`` to the same shape."""
        if not self.training or not self.p:
            return x
        if self.key is None:
            return x * (torch.rand(len(x), 1, device=x.device) >= self.p).to(x.dtype)
        return x * kept(self.key, torch.Size((len(x), 1)), self.p, x.device).to(x.dtype)


def kept(key: Tensor, shape: torch.Size, p: float, device: torch.device) -> Tensor:
    """Where values are kept, bool, of the given shape ``(B, ...)``; see :class:`Dropout`."""
    low, high, start = key.unbind()
    size = shape[1:].numel()
    value = _hash(torch.arange(size, dtype=torch.int32, device=device), low, high)
    row = _hash(torch.arange(shape[0], dtype=torch.int32, device=device) + start, high, low)
    bits = value ^ row[:, None]
    bits = bits * 0x7FEB352D
    bits = (bits ^ (bits >> 15)) * -0x7B935975
    return (bits >= round(p * 2**32) - 2**31).reshape(shape)


def _hash(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """A keyed hash of 32-bit integers; multiplications wrap around, shifts carry the sign."""
    x = x ^ a
    x = (x ^ (x >> 16)) * 0x7FEB352D + b
    x = (x ^ (x >> 15)) * -0x7B935975
    return x ^ (x >> 16)


@contextmanager
def shared_dropout(network: nn.Module, key: DropoutKey, device: torch.device) -> Iterator[None]:
    """Key a network's masks; two passes inside two such contexts with one key share them.

    The masks stay keyed after it, so that a backward pass which computes activations again finds
    them, until :func:`forget_keys`. Layers that draw from torch's default generators, as those of
    other packages do, are seeded inside and the generators restored on leaving; their masks depend
    on the split.

    Args:
        network: The network, or a copy of it: layers are counted in the order of ``modules()``.
        key: Seed and first row.
        device: Where the network lives.
    """
    layers = [module for module in network.modules() if isinstance(module, Dropout) and module.p]
    if layers:
        words = np.random.SeedSequence(key.seed).generate_state(2 * len(layers), np.uint32)
        table = np.empty((len(layers), 3), np.int32)
        table[:, :2] = words.view(np.int32).reshape(-1, 2)
        table[:, 2] = key.start
        for layer, row in zip(layers, send(torch.from_numpy(table), device), strict=True):
            layer.key = row
    accelerators = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=accelerators, device_type=kind):
        torch.manual_seed(key.seed)
        yield


def forget_keys(network: nn.Module) -> None:
    """Let torch's generator draw a network's masks again, anew in every pass."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.key = None
