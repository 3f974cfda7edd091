"""EDM2's forced weight normalisation, once per optimizer step."""

from __future__ import annotations

from typing import Any

import lightning as L

from cm_lightning.networks import normalize_weights

__all__ = ["WeightNormalizationCallback"]


class WeightNormalizationCallback(L.Callback):
    """Normalise the stored weights of magnitude-preserving layers before each optimizer step.

    The official code does it inside the training forward pass (arXiv:2312.02696), after averages
    were taken of the weights as the optimizer left them; so do we, but outside of any pass, so
    that both passes of a consistency pair and all micro-batches see the same weights. A module
    whose denoiser has such layers adds this callback by itself.
    """

    def __init__(self) -> None:
        self._done = -1

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Normalise if an optimizer step begins."""
        if pl_module.nimg != self._done:
            normalize_weights(pl_module.denoiser)
            self._done = pl_module.nimg
