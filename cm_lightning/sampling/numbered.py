"""Numbered images: image i is the same whatever the batch size or the number of devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cm_lightning.sampling.consistency import image_noise
from cm_lightning.sampling.samplers import Sampler
from cm_lightning.types import Denoiser

__all__ = ["draw_images", "draw_labels", "evaluating"]


def draw_labels(store_labels: np.ndarray | None, index: Sequence[int]) -> Tensor | None:
    """Labels of numbered images, following the histogram of the data.

    Image i gets the i-th label of a fixed shuffle of the data's labels.

    Args:
        store_labels: Labels of the data ``(N,)`` or ``None`` for an unconditional model.
        index: Image numbers, B of them.

    Returns:
        int64 tensor ``(B,)`` or ``None``.
    """
    if store_labels is None:
        return None
    order = np.random.default_rng(0).permutation(len(store_labels))
    return torch.as_tensor(store_labels[order[np.asarray(index) % len(order)]]).long()


@torch.no_grad()
def draw_images(
    denoiser: Denoiser,
    sampler: Sampler,
    index: Sequence[int],
    labels: Tensor | None,
    *,
    seed: int,
    shape: Sequence[int],
    batch: int,
    device: torch.device,
) -> Iterator[Tensor]:
    """Draw numbered images in batches; call it inside :func:`evaluating`.

    Args:
        denoiser: The model.
        sampler: How to draw.
        index: Image numbers; image i is the same whatever the other arguments but seed, sampler
            and label.
        labels: Class indices ``(len(index),)`` or ``None``.
        seed: Seed of the noise.
        shape: Image shape ``(C, H, W)``.
        batch: Images per network call, >= 1.
        device: Where to run.

    Yields:
        Images ``(<= batch, C, H, W)`` in about [-1, 1].
    """
    for start in range(0, len(index), batch):
        rows = index[start : start + batch]
        noise = image_noise(seed, rows, sampler.noises, shape).to(device)
        some = None if labels is None else labels[start : start + batch].to(device)
        yield sampler(denoiser, noise, some)


@contextmanager
def evaluating(denoiser: Denoiser) -> Iterator[None]:
    """Eval mode inside the context; every module's own mode is restored on leaving.

    Batches of other sizes than those of training run eagerly where the network is compiled: they
    would have it compiled anew, for batches of any size, and used in that form from then on.
    """
    modes = [(module, module.training) for module in denoiser.modules()]
    denoiser.eval()
    try:
        with torch.compiler.set_stance("eager_on_recompile"):
            yield
    finally:
        for module, training in modes:
            module.training = training
