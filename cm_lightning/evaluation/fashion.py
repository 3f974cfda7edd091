"""Features for Fashion-MNIST: nothing to download, the same number everywhere.

``python -m cm_lightning.evaluation.fashion FOLDER`` retrains the classifier from the IDX files in
a folder (about eight minutes on one core) and rewrites its weights.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cm_lightning.archives import read_gzip
from cm_lightning.evaluation.classifiers import ClassifierFeatures

__all__ = ["FashionFeatures"]


class FashionFeatures(ClassifierFeatures):
    """Last hidden layer (64) of a small classifier of Fashion-MNIST, computed in float64.

    The weights are part of the package. Images must have one channel and 28x28 pixels, or 32x32
    with the black border that ``data.resolution: 32`` gives them.
    """

    metric = "fd_fashion"
    name = "fashion-mnist"
    num_features = 64
    weights = Path(__file__).with_name("fashion.safetensors")
    shapes = ((1, 28, 28), (1, 32, 32))
    noise = 0.1

    @classmethod
    def classifier(cls) -> nn.Sequential:
        """Three convolutions and a hidden layer."""
        layers: list[nn.Module] = []
        for inputs, outputs in ((1, 24), (24, 48), (48, 64)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.SiLU(), nn.AvgPool2d(2)]
        return nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(1024, 64), nn.SiLU(), nn.Linear(64, 10)
        )


def _read(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 28, 28)``, uint8, and labels of ``train`` or ``t10k``."""
    raw, names = (
        np.frombuffer(read_gzip(folder / f"{part}-{kind}-ubyte.gz", size), np.uint8, offset=skipped)
        for kind, skipped, size in (("images-idx3", 16, 2**26), ("labels-idx1", 8, 2**18))
    )
    return torch.tensor(raw.reshape(-1, 1, 28, 28)), torch.tensor(names).long()


def main() -> None:
    """Train on the training images, report the accuracy on the test images, write the file."""
    if len(sys.argv) != 2:
        sys.exit(f"usage: python -m {__spec__.name} FOLDER")
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    network = FashionFeatures.train_classifier(*_read(folder, "train"), 6000).half().double()
    print(f"test accuracy {FashionFeatures.accuracy(network, *_read(folder, 't10k')):.4f}")
    FashionFeatures.save(network, torch.float16)


if __name__ == "__main__":
    main()
