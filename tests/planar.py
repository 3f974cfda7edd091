"""Two-dimensional data and a small network, for trainings that take seconds."""

from __future__ import annotations

import math

import lightning as L
import torch
from torch import nn

from cm_lightning.networks import ConsistencyPrecond, EDMPrecond
from cm_lightning.types import Batch, References

POINTS = 512


def blobs() -> torch.Tensor:
    """512 points on eight blobs, (512, 2, 1, 1), standard deviation 0.5."""
    generator = torch.Generator().manual_seed(0)
    angle = 2 * math.pi * torch.randint(0, 8, (POINTS,), generator=generator) / 8
    noise = torch.randn(POINTS, 2, generator=generator)
    x = torch.stack([angle.cos(), angle.sin()], 1) + 0.08 * noise
    return (x * (0.5 / x.std())).reshape(POINTS, 2, 1, 1)


class Perceptron(nn.Module):
    """A backbone F(x, c_noise) of four layers."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(18, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU()),
            *(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)),
        )
        self.register_buffer("frequencies", torch.arange(8).float().exp2() / 4)

    def forward(self, x, noise_labels, class_labels=None, augment_labels=None):
        phase = noise_labels[:, None].to(x.dtype) * self.frequencies
        features = torch.cat([x.flatten(1), phase.cos(), phase.sin()], 1)
        return self.layers(features).reshape(x.shape)


def denoiser(seed: int, boundary: bool = False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return ConsistencyPrecond(Perceptron()) if boundary else EDMPrecond(Perceptron())


class Endless(torch.utils.data.IterableDataset):
    """Batches drawn with replacement; every batch has all points as references."""

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.points = size, seed, blobs()

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed)
        references = References(self.points, None, torch.arange(POINTS))
        while True:
            index = torch.randint(POINTS, (self.size,), generator=generator)
            yield Batch(self.points[index], None, index, references)


def train(module, batch: int, seed: int, callbacks=()) -> None:
    L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    ).fit(module, torch.utils.data.DataLoader(Endless(batch, seed), batch_size=None))


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'|."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    within = sum(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b))
    return float(2 * torch.cdist(a, b).mean() - within)


@torch.no_grad()
def one_step(network, n: int = 2000) -> torch.Tensor:
    z = torch.randn(n, 2, 1, 1, generator=torch.Generator().manual_seed(5))
    return network(80 * z, torch.full((n,), 80.0))
