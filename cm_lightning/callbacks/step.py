"""What callbacks share: acting once per optimizer step on the clock in images, and logging."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import lightning as L

from cm_lightning.sampling import Sampler, check_phases
from cm_lightning.types import InputError

__all__ = [
    "StepCallback",
    "check_data",
    "check_interval",
    "check_reach",
    "due",
    "find_callback",
    "log_metrics",
    "step_of",
    "training_clock",
]


Found = TypeVar("Found", bound=L.Callback)


def check_data(owner: str, trainer: L.Trainer) -> None:
    """Check that a callback finds the data it needs.

    Args:
        owner: Its class.
        trainer: The trainer.

    Raises:
        InputError: If training has no data module.
    """
    if getattr(trainer, "datamodule", None) is None:
        raise InputError(
            f"{owner} asks the data for shapes and labels: train with an ImageDataModule, "
            "trainer.fit(module, datamodule=data)."
        )


def check_interval(owner: str, every_kimg: float | None) -> None:
    """Check an interval in kimg.

    Args:
        owner: Whose it is, as ``fid``.
        every_kimg: The interval, ``None`` for none.

    Raises:
        InputError: If it is neither positive nor ``None``.
    """
    if every_kimg is not None and not every_kimg > 0:
        null = "" if owner == "diagnostics" else " or null"
        raise InputError(f"{owner}.every_kimg must be positive{null}, got {every_kimg}.")


def check_reach(owner: str, samplers: Sequence[Sampler], module: Any) -> None:
    """Check that the model is trained where sampling starts, and in the sampler's phases.

    Args:
        owner: Whose samplers they are, ``fid`` or ``samples``.
        samplers: The samplers.
        module: The module being trained.

    Raises:
        InputError: If a sampler starts above the largest level of the discretization, or does not
            follow the model's phases.
    """
    objective = getattr(module, "objective", None)
    phases = getattr(objective, "phases", None)
    check_phases(None if phases is None else phases.edges, samplers, f"{owner}.samplers")
    grid = getattr(objective, "discretization", None)
    largest = getattr(grid, "sigma_max", None)
    for sampler in samplers:
        if largest is not None and sampler.start > largest:
            raise InputError(
                f"{owner}.samplers start at the noise level {sampler.start:g}, and "
                f"model.discretization.sigma_max is {largest:g}: the model learns nothing above it."
            )


def due(before: int, after: int, every_kimg: float | None, total_nimg: int) -> bool:
    """Whether an action is due between two readings of the clock.

    A pure function of the clock, so a resumed run acts at the same images as an uninterrupted one.

    Args:
        before: Images seen before the optimizer step.
        after: Images seen after it.
        every_kimg: Interval in thousands of images; ``None`` for never.
        total_nimg: Length of the run in images, where the action is always due.
    """
    if every_kimg is None:
        return False
    interval = 1000 * every_kimg
    return after >= total_nimg or int(after // interval) > int(before // interval)


def step_of(trainer: L.Trainer) -> int:
    """Optimizer steps so far, those that a return to a checkpoint undid included."""
    module: Any = trainer.lightning_module
    data = getattr(trainer, "datamodule", None)
    batch = module.global_batch or getattr(data, "global_batch", 1)  # 0 before the first step
    return int(module.position // batch)


def log_metrics(trainer: L.Trainer, nimg: int, metrics: Mapping[str, float]) -> None:
    """Send numbers to every logger with ``kimg`` as their x-axis (rank 0 only)."""
    if trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics({"kimg": nimg / 1000, **metrics}, step=step_of(trainer))


def find_callback(trainer: L.Trainer, kind: type[Found]) -> Found | None:
    """The trainer's callback of a class, ``None`` if it has none."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def training_clock(trainer: L.Trainer) -> float:
    """Seconds that go on while training does: the pauses of callbacks are left out."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return time.perf_counter() - sum(getattr(callback, "paused", 0.0) for callback in callbacks)


class StepCallback(L.Callback):
    """A callback that acts once per optimizer step, however many micro-batches that takes."""

    paused = 0.0
    """Seconds that it has kept training waiting."""

    _seen = 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Count the time of what is no training: evaluations, pictures, checkpoints."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.paused += time.perf_counter() - start

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Read the clock; the module is on its device and any checkpoint has been applied."""
        self._seen = pl_module.nimg
        self.on_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call :meth:`on_micro_batch` and, when the clock advanced, :meth:`on_step`."""
        self.on_micro_batch(trainer, pl_module, outputs)
        before, after = self._seen, pl_module.nimg
        if after > before:
            self._seen = after
            self.on_step(trainer, pl_module, before, after)

    def on_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Act before the first step."""

    def on_micro_batch(self, trainer: L.Trainer, pl_module: Any, outputs: Any) -> None:
        """Act after each micro-batch."""

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Act after each optimizer step.

        Args:
            trainer: The trainer.
            pl_module: The module.
            before: Images seen before the step.
            after: Images seen after it.
        """
