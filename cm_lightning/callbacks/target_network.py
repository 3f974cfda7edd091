"""Averaged copies of the denoiser that the loss itself needs: target and endpoint networks."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from cm_lightning.callbacks.step import StepCallback
from cm_lightning.ema import update_average

__all__ = ["TargetNetworkCallback"]


class TargetNetworkCallback(StepCallback):
    r"""Move averaged networks after each optimizer step, before anything is saved.

    .. math:: \theta^- \leftarrow \mu\, \theta^- + (1 - \mu)\, \theta

    for every entry of the module's ``averages``; :math:`\mu` is a function of the images seen
    before the step. Buffers are copied. The networks are submodules, so checkpoints hold them.
    A module adds this callback by itself; no config needs to.
    """

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Move every averaged network."""
        weights = list(pl_module.denoiser.parameters())
        for name, profile in pl_module.averages.items():
            network = getattr(pl_module, name)
            rate = profile.beta(before, after - before)
            update_average(list(network.parameters()), weights, rate)
            buffers = zip(network.buffers(), pl_module.denoiser.buffers(), strict=True)
            with torch.no_grad():
                for average, live in buffers:
                    average.copy_(live)
