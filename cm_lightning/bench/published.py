"""A training step of ECT written as the published training loops are, to measure against.

Ours, from the papers and the loops' visible habits: eager fp32 without TF32, attention weights by
an autograd function that keeps them, generator states saved and restored for the dropout masks, one
call per parameter to clean gradients, and an average of the weights kept in a loop over tensors.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.dropout import Dropout
from cm_lightning.networks.layers import UNetBlock
from cm_lightning.objective import ECTMapping
from cm_lightning.types import Denoiser

__all__ = ["PublishedStep"]


class AttentionWeights(torch.autograd.Function):
    r"""Attention weights :math:`\mathrm{softmax}_k(q^\top k / \sqrt{c})` in fp32."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor) -> Tensor:
        """Map queries and keys, ``(N, c, L)``, to weights ``(N, L, L)``."""
        scores = torch.einsum("ncq,nck->nqk", q.float(), k.float() / math.sqrt(k.shape[1]))
        weights = scores.softmax(dim=2).to(q.dtype)
        ctx.save_for_backward(q, k, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of queries and keys."""
        q, k, weights = ctx.saved_tensors
        wide, soft = grad.float(), weights.float()
        scores = soft * (wide - (wide * soft).sum(2, keepdim=True)) / math.sqrt(k.shape[1])
        dq = torch.einsum("nck,nqk->ncq", k.float(), scores).to(q.dtype)
        return dq, torch.einsum("ncq,nqk->nck", q.float(), scores).to(k.dtype)


def attend(block: UNetBlock, qkv: Tensor) -> Tensor:
    """Self-attention of a block by :class:`AttentionWeights`.

    Args:
        block: The block.
        qkv: Its queries, keys and values, ``(B, 3C, H, W)``.
    """
    batch, channels, height, width = qkv.shape
    size = channels // (3 * block.heads)
    q, k, v = qkv.reshape(batch * block.heads, size, 3, height * width).unbind(2)
    weights: Tensor = AttentionWeights.apply(q, k)
    out = torch.einsum("nqk,nck->ncq", weights, v)
    return out.reshape(batch, channels // 3, height, width)


class TorchDropout(nn.Module):
    """Dropout by torch's generator."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, ...)`` to the same shape."""
        return functional.dropout(x, self.p, self.training)


def as_published(network: Denoiser) -> Denoiser:
    """A copy of a network with the published attention and torch's dropout."""
    network = copy.deepcopy(network)
    for module in list(network.modules()):
        if isinstance(module, UNetBlock):
            module._attend = lambda qkv, block=module: attend(block, qkv)  # type: ignore[method-assign,misc]
        elif hasattr(module, "kind"):  # EDM2's block, whose own loop has plain operations
            setattr(module, "kind", "math")  # noqa: B010
        if isinstance(getattr(module, "dropout", None), Dropout):
            module.dropout = TorchDropout(module.dropout.p)  # type: ignore[union-attr,arg-type]
    return network


class PublishedStep:
    r"""ECT's training step, :math:`\sum_b \lVert f(x_t) - f(x_r) \rVert_2 / (t - r) / B`.

    Args:
        network: The network; a copy is trained.
        optimizer: Called with the parameters.
        stage: Stage of :class:`~cm_lightning.objective.ECTMapping`'s defaults, constant here.
        rate: Rate of the average of the weights.
    """

    def __init__(
        self,
        network: Denoiser,
        optimizer: Callable[[Any], torch.optim.Optimizer],
        stage: int = 0,
        rate: float = 0.9999,
    ) -> None:
        self.network = as_published(network).train().requires_grad_(True)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = optimizer(self.network.parameters())
        self.stage, self.rate, self.mapping = stage, rate, ECTMapping()
        self.device = next(self.network.parameters()).device

    def __call__(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        t: Tensor | None = None,
        z: Tensor | None = None,
    ) -> Tensor:
        """Train on one batch, in fp32 without TF32.

        Args:
            images: Grey levels ``(B, C, H, W)`` uint8, on the CPU.
            labels: Class indices ``(B,)`` or ``None``.
            t: Larger levels ``(B,)``, drawn unless given.
            z: Unit noise, drawn unless given.

        Returns:
            The loss of the batch, on the device.
        """
        with _plain_fp32(self.device):
            return self._step(images, labels, t, z)

    def _step(
        self, images: Tensor, labels: Tensor | None, t: Tensor | None, z: Tensor | None
    ) -> Tensor:
        mapping = self.mapping
        x0 = images.to(self.device).to(torch.float32) / 127.5 - 1
        labels = None if labels is None else labels.to(self.device)
        if t is None:
            t = (mapping.p_std * torch.randn(len(x0), device=self.device) + mapping.p_mean).exp()
        if z is None:
            z = torch.randn_like(x0)
        gap = (1 + mapping.k * torch.sigmoid(-mapping.b * t)) / mapping.q ** (self.stage + 1)
        r = t * (1 - gap).clamp(min=0)
        t_image, r_image = t[:, None, None, None], r[:, None, None, None]
        state = _generator_state(self.device)
        prediction = self.network(x0 + t_image * z, t, labels)
        with torch.no_grad():
            _set_generator_state(self.device, state)
            target = self.network(x0 + r_image * z, r.clamp(min=1e-8), labels)
            target = torch.where(r_image > 0, torch.nan_to_num(target), x0)
        loss: Tensor = (prediction - target).square().flatten(1).sum(1).sqrt() / (t - r)
        loss = loss.sum() * (1 / len(x0))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        self.optimizer.step()
        with torch.no_grad():
            for kept, new in zip(self.average.parameters(), self.network.parameters(), strict=True):
                kept.copy_(new.detach().lerp(kept, self.rate))
        return loss.detach()


def _generator_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_generator_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)


@contextmanager
def _plain_fp32(device: torch.device) -> Iterator[None]:
    """Matrix products and convolutions without TF32, and no autocast, for a while."""
    flags = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = flags
