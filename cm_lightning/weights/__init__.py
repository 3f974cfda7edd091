"""Reading and writing weights, safely."""

from cm_lightning.weights.portable import (
    Loaded,
    build_denoiser,
    check_weights,
    from_pretrained,
    load_weights,
    read_checkpoint,
    save_weights,
)

__all__ = [
    "Loaded",
    "build_denoiser",
    "check_weights",
    "from_pretrained",
    "load_weights",
    "read_checkpoint",
    "save_weights",
]
