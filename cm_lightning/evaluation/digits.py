"""Features for the 8x8 digits of scikit-learn: nothing to download, the same number everywhere.

``python -m cm_lightning.evaluation.digits`` retrains the classifier and rewrites its weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from cm_lightning.evaluation.features import FeatureExtractor
from cm_lightning.files import read_weights
from cm_lightning.types import InputError

__all__ = ["DigitsFeatures", "digit_images"]

WEIGHTS = Path(__file__).with_name("digits.safetensors")


class DigitsFeatures(FeatureExtractor):
    """Last hidden layer (64) of a small digit classifier, computed in float64.

    The weights are part of the package. Images must be 8x8 with one channel, like those of
    :func:`digit_images`.
    """

    metric = "fd_digits"
    name = "digits"
    num_features = 64
    preprocessing = "float64"

    def build(self) -> nn.Module:
        """Make the classifier and read its weights."""
        network = _classifier()
        network.load_state_dict(read_weights(WEIGHTS))
        return network.double()

    def extract(self, network: nn.Module, images: Tensor) -> Tensor:
        """Map uint8 digits ``(B, 1, 8, 8)`` to features ``(B, 64)``, float64."""
        if images.shape[1:] != (1, 8, 8):
            raise InputError(
                "DigitsFeatures takes images of shape (1, 8, 8), got "
                f"{tuple(images.shape[1:])}; use Inception or Timm for others."
            )
        assert isinstance(network, nn.Sequential)
        features: Tensor = network[:-1](_scale(images))
        return features


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


def _classifier() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(64, 128), nn.SiLU(), nn.Linear(128, 64), nn.SiLU(), nn.Linear(64, 10)
    )


def _scale(images: Tensor) -> Tensor:
    return images.flatten(1).double() / 127.5 - 1


def _train(images: Tensor, labels: Tensor, seed: int = 0, steps: int = 2000) -> nn.Sequential:
    """Train on slightly noisy digits: noise keeps the features smooth between images."""
    torch.manual_seed(seed)
    network = _classifier().double()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    x = _scale(images)
    for _ in range(steps):
        index = torch.randint(len(x), (128,))
        noisy = x[index] + 0.3 * torch.randn(128, 64, dtype=torch.float64)
        optimizer.zero_grad()
        functional.cross_entropy(network(noisy), labels[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return network


def _accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return float((network(_scale(images)).argmax(1) == labels).double().mean())


def main() -> None:
    """Report the accuracy on every fifth digit, held out, then train on all and write the file."""
    from safetensors.torch import save_file

    torch.set_num_threads(1)
    images, labels = digit_images()
    held_out = torch.arange(len(images)) % 5 == 0
    network = _train(images[~held_out], labels[~held_out])
    print(f"held-out accuracy {_accuracy(network, images[held_out], labels[held_out]):.4f}")
    network = _train(images, labels).float()
    save_file({key: value.contiguous() for key, value in network.state_dict().items()}, WEIGHTS)
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size} bytes)")


if __name__ == "__main__":
    main()
