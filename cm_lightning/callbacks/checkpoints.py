"""Checkpoints on the clock in images, written atomically."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint

from cm_lightning.callbacks.ema import find_ema
from cm_lightning.callbacks.fid import FIDCallback
from cm_lightning.callbacks.step import StepCallback, check_interval, due, find_callback
from cm_lightning.files import is_intact
from cm_lightning.loggers import say
from cm_lightning.types import InputError, TrainingStopped

__all__ = ["INTERRUPTED", "CheckpointCallback", "checkpoints_of", "newest_intact"]

INTERRUPTED = 75
"""Exit code after SIGINT, SIGTERM or SIGUSR1, once the checkpoint is written (EX_TEMPFAIL)."""

_AGREE = 8
"""Steps between two questions to all ranks whether one of them got a signal."""


def checkpoints_of(run_dir: Path) -> list[Path]:
    """The checkpoints of a run directory, that with the most images first."""
    found = (run_dir / "checkpoints").glob("nimg*.ckpt")
    return sorted(found, key=lambda path: path.name, reverse=True)


def newest_intact(run_dir: Path) -> Path | None:
    """The checkpoint with the most images that is whole, ``None`` if there are none at all.

    Raises:
        InputError: If there are some and all are damaged.
    """
    found = checkpoints_of(run_dir)
    for number, path in enumerate(found):
        if is_intact(path):
            if number:
                say(
                    f"{', '.join(str(p) for p in found[:number])} cannot be read, it is damaged: "
                    f"continuing from {path}, the one before."
                )
            return path
    if found:
        raise InputError(
            f"Every checkpoint of {run_dir} is damaged ({', '.join(p.name for p in found)}): "
            "choose another --run_dir to start anew; nothing was changed here."
        )
    return None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes files that appear whole or not at all, and notes a failure instead of raising it.

    Attributes:
        failure: Why the last file could not be written, ``None`` if it was.
    """

    failure: str | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a partial file, flush it to the disk and rename it."""
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        self.failure = None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(checkpoint, partial)
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else 0
            reason = " ".join(str(error).split())[:120]
            self.failure = f"{reason}; {free / 2**20:,.0f} MiB are free there"
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


class CheckpointCallback(StepCallback, Checkpoint):
    """Write ``<run>/checkpoints/nimg<images>.ckpt``; the file appears whole or not at all.

    It runs after every other callback (Lightning puts checkpoint callbacks last), so averages and
    target networks are already updated. After a step with non-finite gradients nothing is written
    but at the end of the run: a checkpoint that was due follows the next finite step.

    Args:
        every_kimg: Interval in thousands of images; one is always written at the end, be it that
            of ``trainer.max_time`` or ``trainer.max_steps``.
        keep: Number of newest checkpoints kept, >= 1.
        keep_every_kimg: Distance in thousands of images at which checkpoints are kept for good,
            ``None`` for none.
        max_failures: How many checkpoints in a row may fail to be written, on a full disk for
            example; training goes on until then, and stops with the last good one named. The one at
            the end of a run must not fail.
        best: A Frechet distance as it is named in the logs, as ``fid10k/ema_0.9999/nfe1``; whenever
            an evaluation lowers it, the checkpoint of that moment is kept as ``best.ckpt``.

    Raises:
        InputError: If an argument is outside its range, no such distance is measured, or a new run
            would be written among the checkpoints of an older one.
    """

    def __init__(
        self,
        every_kimg: float | None = 1000.0,
        keep: int = 2,
        best: str | None = None,
        max_failures: int = 3,
        keep_every_kimg: float | None = None,
    ) -> None:
        check_interval("checkpoints", every_kimg)
        if keep_every_kimg is not None and not keep_every_kimg > 0:
            raise InputError(
                f"checkpoints.keep_every_kimg must be positive or null, got {keep_every_kimg}."
            )
        if keep < 1:
            raise InputError(f"checkpoints.keep must be 1 or more, got {keep}.")
        self.every_kimg = every_kimg
        if max_failures < 1:
            raise InputError(f"checkpoints.max_failures must be 1 or more, got {max_failures}.")
        self.keep = keep
        self.best = best
        self.max_failures = max_failures
        self.keep_every_kimg = keep_every_kimg
        self._owed = self._over = self._held = self._trial = False
        self._io = AtomicCheckpointIO()
        self._failures = 0
        self._saved = -1
        self._signal: str | None = None
        self._handlers: dict[int, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check the name of the distance before training starts."""
        trainer.strategy.checkpoint_io = self._io
        if self.best is None:
            return
        fid = self._fid(trainer)
        names = [] if fid is None else fid.metrics(find_ema(trainer))
        if self.best not in names:
            shown = ", ".join(names) or "none"
            raise InputError(
                f"checkpoints.best names '{self.best}', and the distances measured are {shown}."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Check that a new run does not come among the checkpoints of another one."""
        folder = Path(trainer.default_root_dir)
        if not (self._trial or trainer.ckpt_path or pl_module.nimg) and checkpoints_of(folder):
            raise InputError(
                f"{folder} holds the checkpoints of another run: give its newest as ckpt_path to "
                "continue it, or another default_root_dir."
            )

    def make_trial(self) -> None:
        """Write nothing from now on."""
        self._trial = True

    def _fid(self, trainer: L.Trainer) -> FIDCallback | None:
        found = find_callback(trainer, FIDCallback)
        return found if found is not None and found.enabled else None

    def on_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Listen to signals: interactive ones, and those of a cluster that wants its machine."""
        self._owed = self._over = self._held = False
        self._saved = pl_module.nimg
        if self._trial:
            return
        if threading.current_thread() is threading.main_thread() and not self._handlers:
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if hasattr(signal, name):
                    number = getattr(signal, name)
                    self._handlers[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = signal.Signals(number).name
        self._restore()  # a second one ends the process at once
        say(f"{self._signal}: writing a checkpoint at the end of this step, then stopping.")

    def _restore(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._handlers = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Leave signals as they were; Lightning does so before it calls ``teardown``."""
        self._restore()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave signals as they were."""
        self._restore()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Let a step that is under way come to its end before the run is stopped."""
        before = self._seen
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.should_stop and pl_module.nimg == before:
            trainer.should_stop, self._held = False, True

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Save when it is due; after a signal, save and stop."""
        if self._trial:
            return
        trainer.should_stop |= self._held
        self._over = trainer.should_stop or trainer.global_step == trainer.max_steps
        interval = self.every_kimg if self.every_kimg is not None else float("inf")
        self._owed |= due(before, after, interval, pl_module.total_nimg) or self._over
        if self._owed:
            self.save(trainer, pl_module)
        fid = None if self.best is None else self._fid(trainer)
        if fid is not None and fid.best.get(str(self.best), (0.0, -1.0))[1] == after / 1000:
            with self.pause():
                failure = self._write(trainer, "best.ckpt")
            if failure is not None:
                say(f"best.ckpt could not be written ({failure}); training goes on.")
        if self._interrupted(trainer, after // (after - before)):
            if self._saved != after:
                self.save(trainer, pl_module)
            by = self._signal or "a signal to another process"
            written = "checkpoint written" if self._saved == after else "no checkpoint written"
            raise TrainingStopped(
                f"Stopped by {by} at {after / 1000:g} kimg, {written}: the same command continues.",
                INTERRUPTED,
            )

    def _interrupted(self, trainer: L.Trainer, step: int) -> bool:
        """Whether any rank got a signal; all of them agree, so they save together."""
        got = self._signal is not None
        if trainer.world_size == 1:
            return got
        return step % _AGREE == 0 and bool(trainer.strategy.reduce_boolean_decision(got, all=False))

    def save(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Save now, or after the next step if gradients were not finite.

        Raises:
            TrainingStopped: If that failed too often, or at the end of the run.
        """
        over = pl_module.nimg >= pl_module.total_nimg or self._over
        self._owed = (
            pl_module.nimg < pl_module.total_nimg and int(pl_module.gradient_stats.streak) > 0
        )
        if self._owed:
            return
        with self.pause():
            failure = self._write(trainer, f"nimg{pl_module.nimg:012d}.ckpt")
        folder = Path(trainer.default_root_dir)
        if failure is None:
            self._failures, self._saved = 0, pl_module.nimg
            if trainer.is_global_zero:
                self._remove_old(folder)
            return
        self._failures += 1
        last = next((str(path) for path in checkpoints_of(folder)), "none was written before")
        found = f"The checkpoint at {pl_module.nimg / 1000:g} kimg could not be written ({failure})"
        if over or self._failures >= self.max_failures:
            times = "" if over else f", {self._failures} times in a row"
            raise TrainingStopped(f"{found}{times}. Make room; the last good one: {last}.")
        say(f"{found}; training goes on. The last good one: {last}.")

    def _remove_old(self, folder: Path) -> None:
        """Keep the newest ones, and the first one of every ``keep_every_kimg``."""
        found = checkpoints_of(folder)
        kept = set(found[: self.keep])
        if self.keep_every_kimg is not None:
            first: dict[int, Path] = {}
            for path in reversed(found):
                nimg = int(path.stem.removeprefix("nimg"))
                first.setdefault(int(nimg // (1000 * self.keep_every_kimg)), path)
            kept |= {path for number, path in first.items() if number}
        for path in found:
            if path not in kept:
                path.unlink(missing_ok=True)

    def _write(self, trainer: L.Trainer, name: str) -> str | None:
        """Write a checkpoint; returns why it could not be written, the same on all ranks."""
        trainer.save_checkpoint(Path(trainer.default_root_dir) / "checkpoints" / name)
        failure: str | None = trainer.strategy.broadcast(self._io.failure)
        return failure
