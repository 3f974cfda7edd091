"""A run directory that describes itself, and the summaries at both ends of a run."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L
import yaml

from cm_lightning.callbacks.checkpoints import checkpoints_of
from cm_lightning.callbacks.fid import FIDCallback
from cm_lightning.callbacks.memory import estimate_memory
from cm_lightning.callbacks.processor import device_name, slow_because
from cm_lightning.callbacks.samples import SamplesCallback
from cm_lightning.callbacks.step import find_callback
from cm_lightning.files import write_json, write_text
from cm_lightning.loggers import KimgWandbLogger, tolerated
from cm_lightning.types import InputError
from cm_lightning.version import __version__

__all__ = ["RunRecordCallback", "in_use", "is_in_use"]


class RunRecordCallback(L.Callback):
    """Write ``config.yaml`` and ``run.json``; print a summary at the start and at the end.

    A resumed run whose config differs in something harmless (devices, workers, intervals) keeps
    the first ``config.yaml`` and adds ``config.2.yaml`` and so on.

    Args:
        config: The resolved config as YAML text.
        resumed_from: Checkpoint this start continues from, ``None`` for a fresh start.
        late_logger: Makes a logger that writes as soon as it exists, or ``None``; called once
            every check has passed.
    """

    def __init__(
        self,
        config: str,
        resumed_from: str | None = None,
        late_logger: Callable[[], KimgWandbLogger | None] | None = None,
    ) -> None:
        self.config = config
        self.resumed_from = resumed_from
        self.late_logger = late_logger
        self._started = 0.0
        self._lock = _Lock()

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Check that all processes begin at one place.

        Raises:
            InputError: If they do not.
        """
        first = trainer.strategy.broadcast(self.resumed_from)
        if not trainer.strategy.reduce_boolean_decision(first == self.resumed_from, all=True):
            raise InputError(
                f"Some processes go on from {first or 'nothing'} and others do not find it: the "
                "run directory must be on a file system that all nodes share."
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Write both files, send the settings to every logger, say what is about to happen.

        Raises:
            InputError: If another process trains in the run directory, or it cannot be written.
        """
        try:
            self._begin(trainer, pl_module)
        except OSError as error:
            raise InputError(
                f"--run_dir {trainer.default_root_dir} cannot be written: {error}."
            ) from error

    def _begin(self, trainer: L.Trainer, pl_module: Any) -> None:
        run_dir = Path(trainer.default_root_dir)
        started = time.perf_counter()
        free = trainer.strategy.broadcast(
            self._lock.take(run_dir) if trainer.is_global_zero else None
        )
        if not free:
            raise in_use(run_dir)
        if trainer.is_global_zero:  # first of all: what begins is a run, wherever it is stopped
            self._write_config(run_dir)
        late = None if self.late_logger is None else self.late_logger()
        if late is not None:
            trainer.loggers = [*trainer.loggers, late]
        if trainer.is_global_zero:
            record = self._write_record(run_dir, trainer, pl_module)
            facts = {key: record[key] for key in record if key not in ("starts", "results")}
            settings = yaml.safe_load(self.config) | {"run": facts | record["starts"][-1]}
            for logger in trainer.loggers:
                logger.log_hyperparams(settings)
            self._started = started
            print(start_summary(trainer, pl_module, self.resumed_from), flush=True)

    def _write_config(self, run_dir: Path) -> None:
        path, number = run_dir / "config.yaml", 1
        while path.exists():
            if path.read_text(encoding="utf-8") == self.config:
                return
            number += 1
            path = run_dir / f"config.{number}.yaml"
        write_text(path, self.config)

    def _write_record(self, run_dir: Path, trainer: L.Trainer, pl_module: Any) -> dict[str, Any]:
        path = run_dir / "run.json"
        record = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"starts": []}
        data = trainer.datamodule  # type: ignore[attr-defined]
        start = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": sys.argv,
            "resumed_from": self.resumed_from,
            "kimg": pl_module.nimg / 1000,
            "versions": versions(),
            "git": git_state(),
            "host": platform.node(),
            "device": device_name(pl_module.device),
            "world_size": trainer.world_size,
            "accumulation": trainer.accumulate_grad_batches,
            "precision": str(trainer.precision),
        }
        record |= {
            "regime": type(pl_module).__name__,
            "parameters": sum(p.numel() for p in pl_module.denoiser.parameters()),
            "seed": pl_module.seed,
            "global_batch": data.global_batch,
            "total_kimg": pl_module.total_kimg,
            "data_fingerprint": data.fingerprint,
            "origins": pl_module.origins,
        }
        for logger in trainer.loggers:
            if isinstance(logger, KimgWandbLogger) and not logger.experiment.disabled:
                record |= {"wandb_id": logger.version, "wandb_sent": logger.sent}
        record["starts"].append(start)
        write_json(path, record)
        return record

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Say what came out and where it lies; add the results to ``run.json``."""
        if trainer.is_global_zero:
            seconds = time.perf_counter() - self._started
            path, record = self._timed(trainer, seconds)
            record["results"] = {"kimg": pl_module.nimg / 1000, **results(trainer)}
            write_json(path, record)
            for logger in trainer.loggers:
                if isinstance(logger, KimgWandbLogger):
                    best = record["results"]["best"]
                    logger.log_best({key: best[key]["value"] for key in best})
            print(end_summary(trainer, pl_module, seconds), flush=True)

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """Let go of the run directory."""
        self._lock.release()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Note the time that was spent, and let go of the run directory."""
        if trainer.is_global_zero and self._started:
            with tolerated("The time of this start"):
                write_json(*self._timed(trainer, time.perf_counter() - self._started))
        self._lock.release()

    def _timed(self, trainer: L.Trainer, seconds: float) -> tuple[Path, dict[str, Any]]:
        """``run.json``, and its content with the time of this start."""
        path = Path(trainer.default_root_dir) / "run.json"
        record = json.loads(path.read_text(encoding="utf-8"))
        record["starts"][-1]["seconds"] = round(seconds, 1)
        return path, record


class _Lock:
    """An advisory lock on a directory itself; the system lifts it when the process ends."""

    def __init__(self) -> None:
        self._handle: int | None = None

    def take(self, folder: Path) -> bool:
        """Whether the directory is ours now; file systems without locks say yes."""
        folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl

            self._handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            return False
        except (ImportError, OSError):
            return True
        return True

    def release(self) -> None:
        """Give it back."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def is_in_use(run_dir: Path) -> bool:
    """Whether another process trains in a run directory that is there."""
    lock = _Lock()
    try:
        return not lock.take(run_dir)
    finally:
        lock.release()


def in_use(run_dir: Path) -> InputError:
    """The error about a run directory where another process trains."""
    return InputError(
        f"--run_dir {run_dir} is in use: another process trains there. Wait for it, or "
        "choose another directory."
    )


def results(trainer: L.Trainer) -> dict[str, dict[str, Any]]:
    """Last and best Frechet distances, and what they were measured with."""
    fid = find_callback(trainer, FIDCallback)
    if fid is None:
        return {"last": {}, "best": {}}
    best = {key: {"value": value, "kimg": kimg} for key, (value, kimg) in fid.best.items()}
    return {"last": fid.last, "best": best, "measured_with": fid.identity}


@cache
def versions() -> dict[str, str]:
    """Versions of Python, this package and what results depend on."""
    names = ("torch", "torchvision", "lightning", "torchmetrics", "numpy")
    found = {name: metadata.version(name) for name in names}
    return {"python": platform.python_version(), "cm_lightning": __version__, **found}


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the package's source tree and whether it has changes, ``None`` if not in git."""
    package = Path(__file__).resolve().parents[1]
    try:
        commit, changes = (
            subprocess.run(  # noqa: S603
                ["git", *arguments],  # noqa: S607
                cwd=package,
                capture_output=True,
                text=True,
                check=True,
                timeout=10,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def start_summary(trainer: L.Trainer, pl_module: Any, resumed_from: str | None) -> str:
    """What is trained, on what, where the results go and how long it is."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    parameters = sum(p.numel() for p in pl_module.denoiser.parameters())
    classes = f", {data.num_classes} classes" if data.num_classes else ""
    shape = "x".join(str(size) for size in data.image_shape)
    steps = -(-(pl_module.total_nimg - pl_module.nimg) // data.global_batch)
    split = f"{trainer.world_size} device(s), accumulation {trainer.accumulate_grad_batches}"
    lines = [
        f"{type(pl_module).__name__} with {parameters:,} parameters",
        f"  data      {len(data.store):,} images {shape}{classes}, {data.fingerprint[:16]}",
        f"  length    {pl_module.total_kimg:g} kimg, {steps:,} steps of {data.global_batch} images",
        f"  device    {device_name(pl_module.device)}; {split}; precision {trainer.precision}",
        *(f"  slow      {why}" for why in slow_because(pl_module.device, str(trainer.precision))),
        f"  run       {trainer.default_root_dir}",
    ]
    memory = estimate_memory(trainer, pl_module)
    if memory is not None:
        lines.insert(-1, f"  memory    {memory}")
    for role, origin in pl_module.origins.items():
        left = origin.get("left_out")
        note = f"; left out, as the network has no such layer: {', '.join(left)}" if left else ""
        lines.append(f"  {role:<9} {origin['path']} ({origin['sha256'][:16]}){note}")
    if resumed_from is not None:
        lines.append(f"  resumed   {resumed_from} at {pl_module.nimg / 1000:g} kimg")
    return "\n".join(lines)


def end_summary(trainer: L.Trainer, pl_module: Any, seconds: float) -> str:
    """Best Frechet distances and the paths of pictures, metrics, config and weights."""
    run_dir = Path(trainer.default_root_dir)
    kimg, total = pl_module.nimg / 1000, pl_module.total_kimg
    over = pl_module.nimg >= pl_module.total_nimg
    end = f"Finished at {kimg:g} kimg" if over else f"Ended at {kimg:g} of {total:g} kimg"
    lines = [f"{end} after {seconds / 60:.1f} minutes."]
    if (fid := find_callback(trainer, FIDCallback)) is not None:
        for key, value in fid.last.items():
            best, kimg = fid.best[key]
            lines.append(f"  {key:<32} {value:9.4g}   best {best:.4g} at {kimg:g} kimg")
    if (samples := find_callback(trainer, SamplesCallback)) is not None:
        lines += [f"  picture    {path}" for path in samples.paths.values()]
    if (run_dir / "metrics.csv").is_file():
        lines.append(f"  metrics    {run_dir / 'metrics.csv'}")
    lines.append(f"  config     {run_dir / 'config.yaml'}")
    lines += [f"  checkpoint {path}" for path in checkpoints_of(run_dir)[:1]]
    return "\n".join(lines)
