"""What happens when gradients stay non-finite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L

from cm_lightning.callbacks.checkpoints import newest_intact
from cm_lightning.callbacks.step import StepCallback
from cm_lightning.loggers import MetricsCSV, say
from cm_lightning.optim import GradientGuard
from cm_lightning.types import TrainingStopped
from cm_lightning.weights import read_checkpoint

__all__ = ["GuardCallback"]

_LOOK = 20
"""Optimizer steps between two looks at the streak (a look waits for the device)."""


class GuardCallback(StepCallback):
    """Stop, or go back to the last checkpoint, after a streak of non-finite gradients.

    Gradients are the same on all ranks, so all of them act together. No checkpoint is written
    during a streak; the newest one is from before it.

    Args:
        guard: Length of the streak, and how often to go back.
    """

    def __init__(self, guard: GradientGuard) -> None:
        self.guard = guard
        self.returned = 0

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Look at the streak now and then.

        Raises:
            TrainingStopped: If it is too long, and going back is not allowed or not possible.
        """
        if after // (after - before) % _LOOK:
            return
        streak = int(pl_module.gradient_stats.streak)
        if streak < self.guard.stop_after:
            return
        last = newest_intact(Path(trainer.default_root_dir)) if trainer.is_global_zero else None
        last = trainer.strategy.broadcast(last)
        kimg = after / 1000
        found = f"Gradients were not finite in {streak} steps in a row (up to {kimg:g} kimg)"
        if last is None or self.returned >= self.guard.returns:
            good = last or "none was written before"
            raise TrainingStopped(
                f"{found}. Try a lower learning rate, 32-bit precision, or "
                f"model.gradients.returns; the last good checkpoint: {good}."
            )
        self.returned += 1
        self._go_back(trainer, pl_module, last)
        say(
            f"{found}: back to {last}, return {self.returned} of {self.guard.returns}; the "
            f"{(after - pl_module.nimg) / 1000:g} kimg since are skipped."
        )

    def _go_back(self, trainer: L.Trainer, pl_module: Any, path: Path) -> None:
        """Take weights, optimizer, averages and clock from a checkpoint; the data go on."""
        position = pl_module.position
        checkpoint = read_checkpoint(path)
        pl_module.load_state_dict(checkpoint["state_dict"])
        trainer.strategy.load_optimizer_state_dict(checkpoint)
        pl_module.on_load_checkpoint(checkpoint)
        pl_module.skipped = position - pl_module.nimg
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if state is not None and callback is not self:
                callback.load_state_dict(state)
            if isinstance(callback, StepCallback):
                callback.on_train_start(trainer, pl_module)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                if isinstance(logger, MetricsCSV):
                    logger.resume_at(pl_module.nimg)

    def state_dict(self) -> dict[str, Any]:
        """How often it went back."""
        return {"returned": self.returned}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self.returned = state_dict["returned"]
