"""Grids of samples from fixed noise, as PNG files and in the logs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from cm_lightning.callbacks.ema import find_ema
from cm_lightning.callbacks.step import (
    StepCallback,
    check_data,
    check_interval,
    check_reach,
    due,
    step_of,
)
from cm_lightning.evaluation import grid_columns, image_grid, save_png, to_uint8
from cm_lightning.loggers import KimgWandbLogger, tolerated
from cm_lightning.sampling import (
    DEFAULT_SAMPLERS,
    Sampler,
    check_samplers,
    draw_images,
    evaluating,
)
from cm_lightning.types import InputError

__all__ = ["SamplesCallback"]


class SamplesCallback(StepCallback):
    """Draw a grid of images with fixed noise into ``<run>/samples/<profile>/<sampler>/``.

    Conditional models draw class 0, 1, 2, ... from left to right, 16 to a row or as many as there
    are classes. Rank 0 alone draws.

    Args:
        samplers: How to draw.
        every_kimg: Interval in thousands of images, ``None`` for none at all.
        n: Number of images, >= 1.
        profile: EMA profile, ``None`` for the first tracked one.
        seed: Seed of the noise, the same every time.

    Raises:
        InputError: If an argument is outside its range.
    """

    def __init__(
        self,
        samplers: Sequence[Sampler] = DEFAULT_SAMPLERS,
        every_kimg: float | None = 1000.0,
        n: int = 64,
        profile: str | None = None,
        seed: int = 0,
    ) -> None:
        check_samplers(samplers)
        check_interval("samples", every_kimg)
        if n < 1:
            raise InputError(f"samples.n must be 1 or more, got {n}.")
        self.samplers = list(samplers)
        self.every_kimg = every_kimg
        self.n = n
        self.profile = profile
        self.seed = seed
        self.paths: dict[str, Path] = {}
        """The newest grid of each sampler."""

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check profile and samplers before training starts."""
        if self.every_kimg is not None:
            check_data("SamplesCallback", trainer)
            check_reach("samples", self.samplers, pl_module)
        ema = find_ema(trainer)
        if self.profile not in (None, "live", *ema.names):
            raise InputError(
                f"samples.profile is '{self.profile}', but the EMA callback tracks {ema.names}."
            )

    def on_step(self, trainer: L.Trainer, pl_module: Any, before: int, after: int) -> None:
        """Draw when it is due."""
        if trainer.is_global_zero and due(before, after, self.every_kimg, pl_module.total_nimg):
            for sampler in self.samplers:
                with self.pause(), tolerated("A grid of samples"):
                    self.draw(trainer, pl_module, sampler)

    def draw(self, trainer: L.Trainer, pl_module: Any, sampler: Sampler) -> None:
        """Draw one grid, write it and send it to the loggers that take images."""
        ema = find_ema(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        name = self.profile or ema.names[0]
        labels = torch.arange(self.n) % data.num_classes if data.num_classes else None
        with ema.lend(pl_module.denoiser, name), evaluating(pl_module.denoiser):
            batches = draw_images(
                pl_module.denoiser,
                sampler,
                range(self.n),
                labels,
                seed=self.seed,
                shape=data.image_shape,
                batch=64,
                device=pl_module.device,
            )
            images = torch.cat([to_uint8(batch).cpu() for batch in batches])
        grid = image_grid(images, columns=grid_columns(data.num_classes))
        folder = Path(trainer.default_root_dir) / "samples" / name / sampler.name
        path = folder / f"kimg{pl_module.nimg / 1000:09.2f}.png"
        save_png(path, grid)
        self.paths[sampler.name] = path
        for logger in trainer.loggers:
            if isinstance(logger, KimgWandbLogger):
                key = f"samples/{name}/{sampler.name}"
                logger.log_picture(key, grid, pl_module.nimg, step_of(trainer))
