"""``cm-fit --check``: build everything, train one step, say what the run would need."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from cm_lightning.callbacks import CheckpointCallback, FIDCallback
from cm_lightning.callbacks.step import find_callback
from cm_lightning.cli.fit_run import starting

if TYPE_CHECKING:
    from cm_lightning.cli.fit import FitCLI

__all__ = ["check"]


def check(cli: FitCLI) -> None:
    """Build everything, train one step, evaluate a few images, write nothing, report."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    fid = find_callback(trainer, FIDCallback)
    checkpoints = find_callback(trainer, CheckpointCallback)
    assert fid is not None
    assert checkpoints is not None
    fid.make_trial()
    checkpoints.make_trial()
    started = time.perf_counter()
    with cli.scratch as folder:
        data.use_temporary_cache(Path(folder))
        with starting(module):
            trainer.fit(module, data)
        seconds = time.perf_counter() - started
        for network in (module, *module.networks):  # the trainer brought them back to the CPU
            network.to(trainer.strategy.root_device)
        values = fid.evaluate(trainer, module) if fid.enabled else {}
    report = check_report(cli, seconds, values)
    if trainer.is_global_zero:
        print(report)


def check_report(cli: FitCLI, seconds: float, values: dict[str, float]) -> str:
    """What a run of this config would need.

    Args:
        cli: The built run, after one step.
        seconds: Time of set-up and the first step.
        values: Frechet distances of the tiny evaluation.
    """
    from cm_lightning.callbacks.diagnostics import peak_memory
    from cm_lightning.callbacks.memory import estimate_memory

    module, data = cli.model, cli.datamodule
    parameters = sum(p.numel() for p in module.denoiser.parameters())
    estimate = estimate_memory(cli.trainer, module)
    peak = f"peak {peak_memory(module.device) / 2**30:.2f} GiB in this step"
    steps = -(-module.total_nimg // data.global_batch)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items()) or "switched off"
    return "\n".join(
        [
            f"{type(module).__name__}: everything was built and one step was trained.",
            f"  parameters  {parameters:,}",
            f"  memory      {peak if estimate is None else f'{estimate}; {peak}'}",
            f"  data        {len(data.store):,} images {data.image_shape}, "
            f"{data.num_classes} classes",
            f"  length      {module.total_kimg:g} kimg, {steps:,} steps of {data.global_batch}",
            f"  evaluation  {shown} (16 images: a test, not a measurement)",
            f"  time        {seconds:.1f} s for set-up and the first step",
            "  Nothing was written.",
        ]
    )
