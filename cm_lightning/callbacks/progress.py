"""A progress bar that counts what schedules count: images."""

from __future__ import annotations

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from cm_lightning.callbacks.diagnostics import DiagnosticsCallback
from cm_lightning.callbacks.step import find_callback

__all__ = ["KimgProgress"]


class KimgProgress(ProgressBar):
    """Regime, kimg of total, images/s, time left, loss and stage; rank 0 only.

    The loss is the mean over the last window of the diagnostics: that of a step would have to be
    waited for.

    On a terminal the line is redrawn in place; elsewhere (a log file) one line is printed every
    ``log_seconds``.

    Args:
        log_seconds: Seconds between lines when the output is not a terminal.
    """

    _REFRESH_SECONDS = 0.5

    def __init__(self, log_seconds: float = 20.0) -> None:
        super().__init__()
        self.log_seconds = log_seconds
        self._enabled = True
        self._bar: Any = None
        self._printed = 0.0
        self._started = 0.0
        self._first = 0

    def disable(self) -> None:
        """Turn the bar off (Lightning does so on ranks above 0)."""
        self._enabled = False

    def enable(self) -> None:
        """Turn the bar on."""
        self._enabled = True

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Open the bar at the present count."""
        from tqdm import tqdm

        self._started, self._first = time.perf_counter(), pl_module.nimg
        self._printed = self._started
        if self._enabled and sys.stderr.isatty():
            self._bar = tqdm(
                total=round(pl_module.total_kimg, 3),
                initial=round(pl_module.nimg / 1000, 3),
                desc=type(pl_module).__name__,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}%|{bar}| {n:.1f}/{total:g} kimg{postfix}",
            )

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Redraw or print when it is time."""
        now = time.perf_counter()
        interval = self._REFRESH_SECONDS if self._bar is not None else self.log_seconds
        if not self._enabled or now - self._printed < interval:
            return
        self._printed = now
        diagnostics = find_callback(trainer, DiagnosticsCallback)
        loss = None if diagnostics is None else diagnostics.loss
        text = self.line(pl_module, loss, now - self._started)
        if self._bar is not None:
            self._bar.n = round(pl_module.nimg / 1000, 3)
            self._bar.set_postfix_str(text)
        else:
            sys.stderr.write(
                f"{type(pl_module).__name__} {pl_module.nimg / 1000:.1f}/"
                f"{pl_module.total_kimg:g} kimg, {text}\n"
            )
            sys.stderr.flush()

    def line(self, pl_module: Any, loss: float | None, seconds: float) -> str:
        """Speed, time left, loss and stage in words.

        Args:
            pl_module: The module.
            loss: Mean loss of the last window, ``None`` before the first.
            seconds: Time since training started in this process.
        """
        speed = (pl_module.nimg - self._first) / max(seconds, 1e-9)
        left = (pl_module.total_nimg - pl_module.nimg) / max(speed, 1e-9)
        minutes, rest = divmod(int(max(left, 0)), 60)
        hours, minutes = divmod(minutes, 60)
        eta = f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
        shown = "" if loss is None else f", loss {loss:.4g}"
        stage = "" if pl_module.stage is None else f", stage {pl_module.stage}"
        return f"{speed:.0f} img/s, {eta} left{shown}{stage}"

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.n = round(pl_module.nimg / 1000, 3)
            self._bar.close()
            self._bar = None

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Close the bar so that the message stands on its own line."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
