"""Small classifiers whose last hidden layer gives features: nothing to download."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.evaluation.features import FeatureExtractor
from cm_lightning.files import read_weights
from cm_lightning.types import InputError

__all__ = ["ClassifierFeatures"]


class ClassifierFeatures(FeatureExtractor):
    """Last hidden layer of a classifier whose weights are part of the package, in float64.

    Attributes:
        weights: Its weights.
        shapes: Shapes ``(C, H, W)`` of the images it takes.
        noise: Standard deviation of the noise on the images it is trained on, which keeps features
            smooth between images, for pixels in [-1, 1].
    """

    preprocessing = "float64"
    cpu_batch = None  # its images are small
    weights: ClassVar[Path]
    shapes: ClassVar[tuple[tuple[int, int, int], ...]]
    noise: ClassVar[float]

    @classmethod
    @abstractmethod
    def classifier(cls) -> nn.Sequential:
        """The network with random weights: pixels in [-1, 1] to logits, features before the last.

        It takes images of the last of ``shapes``.
        """

    def build(self) -> nn.Module:
        """Make the classifier and read its weights."""
        network = self.classifier()
        network.load_state_dict(read_weights(self.weights))
        return network.double()

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        """Map uint8 images to features, float64."""
        if tuple(images.shape[1:]) not in self.shapes:
            raise InputError(
                f"{type(self).__name__} takes images of shape "
                f"{' or '.join(map(str, self.shapes))}, got {tuple(images.shape[1:])}; use "
                "Inception or Timm for others."
            )
        assert isinstance(network, nn.Sequential)
        features: Tensor = network[:-1](self.scale(images))
        return features

    @classmethod
    def scale(cls, images: Tensor) -> Tensor:
        """Grey levels to [-1, 1], float64, smaller images with a black border."""
        margin = (cls.shapes[-1][-1] - images.shape[-1]) // 2
        return functional.pad(images, [margin] * 4).double() / 127.5 - 1

    @classmethod
    def train_classifier(
        cls, images: Tensor, labels: Tensor, steps: int, seed: int = 0
    ) -> nn.Sequential:
        """Train on slightly noisy images, AdamW with a cosine, batches of 128.

        Args:
            images: Grey levels, ``(N, C, H, W)``, uint8.
            labels: Classes, ``(N,)``.
            steps: Number of steps.
            seed: Seed of weights, order and noise.
        """
        torch.manual_seed(seed)
        dtype = torch.float64 if len(images) < 10_000 else torch.float32
        network = cls.classifier().to(dtype)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            index = torch.randint(len(images), (128,))
            x = cls.scale(images[index]).to(dtype)
            optimizer.zero_grad()
            logits = network(x + cls.noise * torch.randn_like(x))
            functional.cross_entropy(logits, labels[index]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
        return network.double()

    @classmethod
    def accuracy(cls, network: nn.Module, images: Tensor, labels: Tensor) -> float:
        """Share of images that are classified as they should."""
        with torch.no_grad():
            guesses = [
                network(cls.scale(images[i : i + 1000])).argmax(1)
                for i in range(0, len(images), 1000)
            ]
        return float((torch.cat(guesses) == labels).double().mean())

    @classmethod
    def save(cls, network: nn.Module, dtype: torch.dtype) -> None:
        """Write the weights file."""
        from safetensors.torch import save_file

        state = {key: value.to(dtype).contiguous() for key, value in network.state_dict().items()}
        save_file(state, cls.weights)
        print(f"wrote {cls.weights} ({cls.weights.stat().st_size} bytes)")
