"""What ``cm-fit`` does with a run that is built: continue it, train it, export it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.callbacks import Timer

from cm_lightning.callbacks import checkpoints_of, find_ema
from cm_lightning.callbacks.run_record import in_use, is_in_use
from cm_lightning.callbacks.step import find_callback
from cm_lightning.cli.errors import about_input, about_machine, fail
from cm_lightning.cli.run_dir import depends_on_micro_batch, run_record
from cm_lightning.documents import complaint, one_line
from cm_lightning.ema import snapshot_nimg
from cm_lightning.files import is_intact
from cm_lightning.loggers import KimgWandbLogger
from cm_lightning.regimes import ConsistencyModule
from cm_lightning.types import InputError, TrainingStopped
from cm_lightning.weights import averages_of, check_weights, read_checkpoint, save_weights

if TYPE_CHECKING:
    from cm_lightning.cli.fit import FitCLI

__all__ = ["COMMAND", "fit", "out_of_memory", "starting"]

COMMAND = "cm-fit"


def fit(cli: FitCLI) -> None:
    """Train, then write the portable weights of every EMA profile.

    A run that was stopped after its last step trains no further and writes what is missing.
    """
    plan, trainer, module = cli.plan, cli.trainer, cli.model
    checkpoint = prepare_resume(cli)
    if checkpoint is not None and is_finished(plan.run_dir, checkpoint, module.total_nimg):
        print(
            f"{plan.run_dir} is complete: {plan.checkpoint} is at "
            f"{checkpoint['cm_lightning']['nimg'] / 1000:g} of {module.total_kimg:g} kimg."
        )
        return
    try:
        with starting(module, 0 if checkpoint is None else checkpoint["cm_lightning"]["nimg"]):
            trainer.fit(module, cli.datamodule, ckpt_path=plan.checkpoint, weights_only=True)
        if trainer.is_global_zero:
            export(cli)
    except TrainingStopped as error:
        if is_child(trainer):  # with another code its parent would be killed before it has ended
            sys.exit(0)
        fail(COMMAND, str(error), error.code)
    except OSError as error:
        fail(COMMAND, f"{error} (in {plan.run_dir}); afterwards the same command continues.", 1)
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, KimgWandbLogger) and not logger.finish(exit_code()):
                leave_at_once()


def is_child(trainer: L.Trainer) -> bool:
    """Whether Lightning's own launcher started this process beside that of the command line."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return isinstance(environment, LightningEnvironment) and trainer.local_rank > 0


def out_of_memory(cli: FitCLI, error: Exception) -> str:
    """What to change when a device's memory is too small, by what the run has not done yet.

    Args:
        cli: The run.
        error: What torch says.
    """
    plan = cli.datamodule.plan(cli.trainer.world_size)
    advice = []
    if plan.micro_batch > 1:
        parts = next(n for n in range(2, plan.micro_batch + 1) if plan.micro_batch % n == 0)
        changes = depends_on_micro_batch(cli.config.as_dict())
        same = "its rows see fewer others" if changes else "the same results by accumulation"
        advice.append(f"--data.micro_batch {plan.micro_batch // parts} ({same})")
    if cli.trainer.precision == "32-true":
        advice.append("--trainer.precision bf16-mixed (rounds more than late stages' pairs differ)")
    if not cli.config["performance"]["checkpointing"]:
        advice.append("--performance.checkpointing true (about a quarter slower)")
    if cli.datamodule.resident:
        advice.append("--data.resident false")
    if cli.datamodule.reference_bytes > 1 << 28:
        advice.append("--model.references.n N (a random subset at each step)")
    return (
        f"The device's memory is too small for micro-batches of {plan.micro_batch} images: try "
        f"{', '.join(advice) or 'a smaller network'}. torch says: {one_line(error)[:200]}"
    )


def exit_code() -> int:
    """Code with which the program ends, by the exception on its way."""
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    return code if isinstance(code, int) else 1


def leave_at_once() -> None:
    """End the process without waiting for W&B, which waits for its server."""
    error = sys.exc_info()[1]
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code())


def is_finished(run_dir: Path, checkpoint: dict[str, Any], total_nimg: int) -> bool:
    """Whether a run reached its end and wrote its record and its weights."""
    nimg = checkpoint["cm_lightning"]["nimg"]
    names = averages_of(checkpoint)
    record = run_record(run_dir).get("results", {})
    return (
        nimg >= total_nimg
        and record.get("kimg") == nimg / 1000
        and all((run_dir / "weights" / name / "config.json").is_file() for name in names)
    )


@contextmanager
def starting(module: ConsistencyModule, nimg: int = 0) -> Iterator[None]:
    """Until the first step is done, an error is a mistake in the input; later ones pass through.

    Args:
        module: What is trained.
        nimg: Images seen before.

    Raises:
        InputError: If there was one.
    """
    try:
        yield
    except Exception as error:
        known = isinstance(error, (TrainingStopped, torch.OutOfMemoryError))
        if known or about_input(error) or about_machine(error) or module.nimg > nimg:
            raise
        what = "This checkpoint cannot be continued" if nimg else "This config cannot be trained"
        raise InputError(f"{what}: {complaint(error)}.") from error


def prepare_resume(cli: FitCLI) -> dict[str, Any] | None:
    """Check the checkpoint against the config and say which one it is."""
    path = cli.plan.checkpoint
    if path is None:
        return None
    checkpoint = read_checkpoint(path)
    check_weights(cli.model.state_dict(), checkpoint["state_dict"], str(path))
    nimg = checkpoint["cm_lightning"]["nimg"]
    run = path.absolute().parent.parent.resolve()
    fork = cli.config["resume"] != "auto" and run != cli.plan.run_dir.resolve()
    start = (run_record(run if fork else cli.plan.run_dir).get("origins") or {}).get("init")
    if fork:
        check_fork(cli, path, nimg, start)
    if start is not None:  # the weights keep their origin, and its licence
        cli.model.origins = cli.model.origins | {"init": start}
    newest = next(filter(is_intact, checkpoints_of(cli.plan.run_dir)), None)
    if newest is not None and newest.name > f"nimg{nimg:012d}.ckpt":
        if is_in_use(cli.plan.run_dir):
            raise in_use(cli.plan.run_dir)
        raise InputError(
            f"{cli.plan.run_dir} holds a newer checkpoint, {newest.name}, than {path}: choose "
            "another --run_dir, so that nothing is lost."
        )
    if not fork:
        check_micro_batch(cli)
    if cli.trainer.is_global_zero:
        print(f"Resuming from {path} at {nimg / 1000:g} kimg.")
    return checkpoint


def check_micro_batch(cli: FitCLI) -> None:
    """Check that rows which act on each other do so among as many as before.

    Args:
        cli: The run, which goes on.

    Raises:
        InputError: If micro-batches, or those of all devices together, have another size.
    """
    config = cli.config.as_dict()
    if not depends_on_micro_batch(config):
        return
    record = run_record(cli.plan.run_dir)
    start = record["starts"][-1] if record.get("starts") else {}
    try:
        parts = start["world_size"] * start["accumulation"], start["world_size"]
        before = record["global_batch"] // parts[0]
    except (KeyError, TypeError, ZeroDivisionError):
        return  # an incomplete record
    plan, now = cli.datamodule.plan(cli.trainer.world_size), "micro-batches"
    after = plan.micro_batch
    if (config["model"]["init_args"].get("references") or {}).get("gather"):
        before, after, now = before * parts[1], after * plan.world, "micro-batches of all devices"
    if before != after:
        raise InputError(
            f"{cli.plan.run_dir} was trained in {now} of {before} images, whose rows act on each "
            f"other, and would go on with {after}: change data.micro_batch or the devices."
        )


def check_fork(cli: FitCLI, path: Path, nimg: int, start: dict[str, Any] | None) -> None:
    """Check a run that goes on from another one's checkpoint.

    Args:
        cli: The run.
        path: The checkpoint.
        nimg: Images it has seen.
        start: The initial weights of the other run, as its record tells.

    Raises:
        InputError: If nothing is left to train, or if the config asks for other initial weights.
    """
    timer = find_callback(cli.trainer, Timer)
    if timer is not None:  # the time of another run is no time of this one
        timer.load_state_dict = lambda state: None  # type: ignore[assignment,method-assign]
    if nimg >= cli.model.total_nimg:
        raise InputError(
            f"{path} is at {nimg / 1000:g} kimg, where model.total_kimg {cli.model.total_kimg:g} "
            "ends already: raise it."
        )
    asked = cli.model.origins.get("init")
    if asked is not None and asked["sha256"] != (start or {}).get("sha256"):
        raise InputError(
            f"model.init.path {asked['path']} would not be used: the run goes on from the weights "
            f"in {path}. Leave it out."
        )


def export(cli: FitCLI) -> None:
    """Write ``<run>/weights/<profile>/`` for every EMA profile."""
    import json

    ema = find_ema(cli.trainer)
    model = json.loads(cli.parser.dump(cli.config, format="json"))["model"]
    for name in ema.averages:
        weights = dict(cli.model.denoiser.state_dict()) | ema.averages[name]
        taken = snapshot_nimg(name, cli.model.total_nimg, cli.datamodule.global_batch)
        info = {
            "regime": type(cli.model).__name__,
            "ema": name,
            "kimg": (cli.model.nimg if taken is None else taken) / 1000,
            "data_fingerprint": cli.datamodule.fingerprint,
            "origins": cli.model.origins,
        }
        phases = getattr(getattr(cli.model, "objective", None), "phases", None)
        if phases is not None:
            info["phases"] = list(phases.edges)
        folder = cli.plan.run_dir / "weights" / name
        save_weights(folder, model["init_args"]["denoiser"], weights, info)
        print(f"  weights    {folder}")
