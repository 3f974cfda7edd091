"""Checkpoints on the clock in images, written atomically."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from cm_lightning.callbacks.ema import find_ema
from cm_lightning.callbacks.fid import FIDCallback
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
        best: A Frechet distance as it is named in the logs, as ``fid10k/ema_0.9999/nfe1``; whenever
            an evaluation lowers it, the checkpoint of that moment is kept as ``best.ckpt``.

    Raises:
        InputError: If an argument is outside its range, or no such distance is measured.
    """

    def __init__(
        self, every_kimg: float | None = 1000.0, keep: int = 2, best: str | None = None
    ) -> None:
        check_interval("checkpoints", every_kimg)
        if keep < 1:
            raise InputError(f"checkpoints.keep must be 1 or more, got {keep}.")
        self.every_kimg = every_kimg
        self.keep = keep
        self.best = best

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the name of the distance before training starts."""
        if self.best is None:
            return
        fid = self._fid(trainer)
        names = [] if fid is None else fid.metrics(find_ema(trainer))
        if self.best not in names:
            shown = ", ".join(names) or "none"
            raise InputError(
                f"checkpoints.best names '{self.best}', and the distances measured are {shown}."
            )

    def _fid(self, trainer: L.Trainer) -> FIDCallback | None:
        found = [c for c in trainer.callbacks if isinstance(c, FIDCallback)]  # type: ignore[attr-defined]
        return found[0] if found and found[0].enabled else None

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Save when it is due."""
        interval = self.every_kimg if self.every_kimg is not None else float("inf")
        if due(before, after, interval, pl_module.total_nimg):
            self.save(trainer, pl_module)
        fid = None if self.best is None else self._fid(trainer)
        if fid is not None and fid.best.get(str(self.best), (0.0, -1.0))[1] == after / 1000:
            self._write(trainer, "best.ckpt")

    def save(self, trainer: L.Trainer, pl_module: Any) -> Path:
        """Save now; returns the path."""
        path = self._write(trainer, f"nimg{pl_module.nimg:012d}.ckpt")
        if trainer.is_global_zero:
            for old in sorted(path.parent.glob("nimg*.ckpt"), key=lambda p: p.name)[: -self.keep]:
                old.unlink()
        return path

    def _write(self, trainer: L.Trainer, name: str) -> Path:
        path = Path(trainer.default_root_dir) / "checkpoints" / name
        partial = path.with_name(f".{name}.partial")
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        return path
