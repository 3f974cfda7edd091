"""Checkpoints on the clock in images, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from cm_lightning.callbacks.step import StepCallback, check_interval, due
from cm_lightning.types import InputError

__all__ = ["CheckpointCallback", "newest_checkpoint"]


def newest_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint of a run directory with the most images, ``None`` if there is none."""
    found = sorted((run_dir / "checkpoints").glob("nimg*.ckpt"), key=lambda path: path.name)
    return found[-1] if found else None


class CheckpointCallback(StepCallback, Checkpoint):
    """Write ``<run>/checkpoints/nimg<images>.ckpt``; the file appears whole or not at all.

    It runs after every other callback (Lightning puts checkpoint callbacks last), so averages and
    target networks are already updated.

    Args:
        every_kimg: Interval in thousands of images; one is always written at the end.
        keep: Number of newest checkpoints kept, >= 1.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(self, every_kimg: float | None = 1000.0, keep: int = 2) -> None:
        check_interval("checkpoints", every_kimg)
        if keep < 1:
            raise InputError(f"checkpoints.keep must be 1 or more, got {keep}.")
        self.every_kimg = every_kimg
        self.keep = keep

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Save when it is due."""
        interval = self.every_kimg if self.every_kimg is not None else float("inf")
        if due(before, after, interval, pl_module.total_nimg):
            self.save(trainer, pl_module)

    def save(self, trainer: L.Trainer, pl_module: Any) -> Path:
        """Save now; returns the path."""
        folder = Path(trainer.default_root_dir) / "checkpoints"
        path = folder / f"nimg{pl_module.nimg:012d}.ckpt"
        partial = path.with_name(f".{path.name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
            for old in sorted(folder.glob("nimg*.ckpt"), key=lambda p: p.name)[: -self.keep]:
                old.unlink()
        return path
