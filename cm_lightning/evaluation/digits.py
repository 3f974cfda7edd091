"""Features for the 8x8 digits of scikit-learn: nothing to download, the same number everywhere.

``python -m cm_lightning.evaluation.digits`` retrains the classifier and rewrites its weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from cm_lightning.evaluation.classifiers import ClassifierFeatures

__all__ = ["DigitsFeatures", "digit_images"]


class DigitsFeatures(ClassifierFeatures):
    """Last hidden layer (64) of a small digit classifier, computed in float64.

    The weights are part of the package. Images must be 8x8 with one channel, like those of
    :func:`digit_images`.
    """

    metric = "fd_digits"
    name = "digits"
    num_features = 64
    weights = Path(__file__).with_name("digits.safetensors")
    shapes = ((1, 8, 8),)
    noise = 0.3

    @classmethod
    def classifier(cls) -> nn.Sequential:
        """Two hidden layers."""
        return nn.Sequential(
            nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 10)
        )

    @classmethod
    def scale(cls, images: Tensor) -> Tensor:
        """Grey levels to rows ``(B, 64)`` in [-1, 1], float64."""
        return super().scale(images).flatten(1)


def digit_images() -> tuple[Tensor, Tensor]:
    """The 1797 digits of scikit-learn.

    Returns:
        Images ``(1797, 1, 8, 8)``, uint8, the levels 0...16 spread over 0...255 and rounded, and
        labels ``(1797,)``, int64.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images) * (255 / 16)
    return images.round().to(torch.uint8).unsqueeze(1), torch.from_numpy(digits.target).long()


def main() -> None:
    """Report the accuracy on every fifth digit, held out, then train on all and write the file."""
    torch.set_num_threads(1)
    images, labels = digit_images()
    held_out = torch.arange(len(images)) % 5 == 0
    network = DigitsFeatures.train_classifier(images[~held_out], labels[~held_out], 2000)
    accuracy = DigitsFeatures.accuracy(network, images[held_out], labels[held_out])
    print(f"held-out accuracy {accuracy:.4f}")
    DigitsFeatures.save(DigitsFeatures.train_classifier(images, labels, 2000), torch.float32)


if __name__ == "__main__":
    main()
