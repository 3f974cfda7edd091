"""``cm-fit``: train a regime from one YAML file."""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI

import cm_lightning.networks  # noqa: F401  (short class names resolve to imported classes)
from cm_lightning.callbacks import (
    CheckpointCallback,
    DiagnosticsCallback,
    EMACallback,
    FIDCallback,
    KimgProgress,
    PerformanceCallback,
    RunRecordCallback,
    SamplesCallback,
    checkpoints_of,
)
from cm_lightning.callbacks.run_record import in_use, is_in_use
from cm_lightning.cli.errors import Parser, about_input, about_machine, fail, readable_errors
from cm_lightning.cli.help import fit_help
from cm_lightning.cli.keys import check_keys, misfit
from cm_lightning.cli.modules import allow_modules
from cm_lightning.cli.run_dir import RunPlan, plan_run, run_record
from cm_lightning.data import ImageDataModule
from cm_lightning.documents import complaint, one_line
from cm_lightning.ema import ConstantEMA
from cm_lightning.files import is_intact
from cm_lightning.loggers import KimgWandbLogger, MetricsCSV, WandbOptions, wandb_logger
from cm_lightning.regimes import ConsistencyModule
from cm_lightning.sampling import DEFAULT_SAMPLERS
from cm_lightning.types import InputError, TrainingStopped
from cm_lightning.weights import check_weights, read_checkpoint, save_weights

__all__ = ["FitCLI", "main"]

COMMAND = "cm-fit"

GROUPS: dict[str, type] = {
    "model": ConsistencyModule,
    "data": ImageDataModule,
    "trainer": L.Trainer,
    "ema": EMACallback,
    "fid": FIDCallback,
    "samples": SamplesCallback,
    "diagnostics": DiagnosticsCallback,
    "checkpoints": CheckpointCallback,
    "performance": PerformanceCallback,
    "wandb": WandbOptions,
}
SCALARS: dict[str, Any] = {
    "config": None,
    "run_dir": str | None,
    "resume": str,
    "check": bool,
    "allow_modules": str | None,
    "seed_everything": int,
    "print_config": None,
    "help": None,
}


class FitParser(Parser):
    """The parser, which can say what every key takes."""

    def explain(self) -> str | None:
        """The first value that does not fit its key."""
        return misfit(sys.argv[1:], GROUPS, SCALARS)


class FitCLI(LightningCLI):
    """The parser, and from it the module, the data, the callbacks and the trainer."""

    plan: RunPlan

    def __init__(self, args: list[str] | None = None) -> None:
        super().__init__(
            ConsistencyModule,
            ImageDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            trainer_defaults={
                "max_epochs": -1,
                "use_distributed_sampler": False,
                "num_sanity_val_steps": 0,
                "enable_model_summary": False,
            },
            parser_class=FitParser,
            parser_kwargs={"prog": COMMAND, "allow_abbrev": False},
            subclass_mode_model=True,
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def add_arguments_to_parser(self, parser: Any) -> None:
        """Add the run's own keys and the callbacks every run has."""
        parser.add_argument("--run_dir", type=str | None, default=None, help="where the run lives")
        parser.add_argument("--resume", type=str, default="auto", help="auto, never or a .ckpt")
        parser.add_argument("--check", type=bool, default=False, nargs="?", const=True, help="test")
        parser.add_argument(
            "--allow_modules",
            type=str | None,
            default=None,
            help="packages besides torch's that configs may name, on the command line alone",
        )
        parser.add_lightning_class_args(EMACallback, "ema")
        parser.add_lightning_class_args(FIDCallback, "fid")
        parser.add_lightning_class_args(SamplesCallback, "samples")
        parser.add_lightning_class_args(DiagnosticsCallback, "diagnostics")
        parser.add_lightning_class_args(CheckpointCallback, "checkpoints")
        parser.add_lightning_class_args(PerformanceCallback, "performance")
        parser.add_class_arguments(WandbOptions, "wandb")
        samplers = [as_config(sampler) for sampler in DEFAULT_SAMPLERS]
        parser.set_defaults(
            {
                "ema.profiles": [as_config(ConstantEMA())],
                "fid.features": {"class_path": "cm_lightning.evaluation.Inception"},
                "fid.samplers": samplers,
                "samples.samplers": samplers,
            }
        )
        parser.link_arguments("seed_everything", "model.init_args.seed")
        parser.link_arguments("seed_everything", "data.seed")

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Parse, and check the seed before it is used."""
        super().parse_arguments(parser, args)
        seed = self.config["seed_everything"]
        if isinstance(seed, bool) or not 0 <= seed < 2**32:
            raise InputError(f"seed_everything must be a number from 0 to 2^32 - 1, got {seed}.")

    def instantiate_classes(self) -> None:
        """Build everything; what a class refuses is a mistake in the config."""
        try:
            super().instantiate_classes()
        except (InputError, MisconfigurationException):
            raise
        except Exception as error:  # classes of any package raise whatever they like
            reason = about_input(error) or about_machine(error)
            reason = reason or f"The config cannot be built: {complaint(error)}."
            raise InputError(reason) from error

    def before_instantiate_classes(self) -> None:
        """Decide where the run lives and what it continues from; nothing is written yet."""
        try:
            text = self.parser.dump(self.config, skip_none=False)
        except (TypeError, ValueError) as error:
            raise InputError(
                "A value of the config cannot be written to config.yaml, so that the run could not "
                f"be repeated: {one_line(error)[-200:]}."
            ) from error
        self.plan = plan_run(self.config, text)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run's loggers, progress bar and directory."""
        run_dir = self.plan.run_dir
        kwargs["default_root_dir"] = str(run_dir)
        kwargs["callbacks"] = list(self.config_init["trainer"]["callbacks"] or [])
        if self.config["check"]:
            kwargs |= {"logger": False, "max_steps": 1, "enable_progress_bar": False}
        else:
            if self.config["trainer"]["logger"] is not None:
                raise InputError(
                    "trainer.logger cannot be set: metrics.csv is always written, and "
                    "wandb.project adds W&B."
                )
            kwargs["logger"] = MetricsCSV(run_dir)
            resumed = None if self.plan.checkpoint is None else str(self.plan.checkpoint)
            wandb = partial(wandb_logger, self.config_init["wandb"], run_dir, self.plan.wandb_id)
            record = RunRecordCallback(self.plan.config_text, resumed, wandb)
            kwargs["callbacks"].append(record)
            if self.config["trainer"]["enable_progress_bar"] is not False:
                kwargs["callbacks"].append(KimgProgress())
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise InputError(f"The trainer refuses its settings: {one_line(error)}.") from error


def as_config(leaf: Any) -> dict[str, Any]:
    """A frozen dataclass as ``class_path`` and ``init_args``, so that configs show it."""
    path = f"{type(leaf).__module__}.{type(leaf).__name__}"
    values = {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(leaf).items()
    }
    return {"class_path": path, "init_args": values}


def main(args: list[str] | None = None) -> None:
    """Entry point of ``cm-fit``."""
    argv = sys.argv[1:] if args is None else args
    if not argv or argv in (["-h"], ["--help"]):
        print(fit_help())
        return
    quiet()
    with readable_errors(COMMAND):
        if "--help_all" in argv:
            sys.argv[1:] = ["--help"]
        else:
            allow_modules(argv)
            check_keys(argv, GROUPS, SCALARS)
        cli = FitCLI(args)
        try:
            (check if cli.config["check"] else fit)(cli)
        except torch.OutOfMemoryError as error:
            fail(COMMAND, out_of_memory(cli, error), 1)


def quiet() -> None:
    """Silence warnings and notices that tell our users nothing they can act on."""
    import logging

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for pattern in (
        ".*does not have many workers.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*No negative numbers.*",
        ".*does not support `log_every_n_steps`.*",
        ".*LeafSpec.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",
        ".*no `val_dataloader`.*",
        ".*defined a `validation_step`.*",
        ".*Checkpoint directory.*exists and is not empty.*",
        ".*lightning_module.*could not find the monitored key.*",
    ):
        warnings.filterwarnings("ignore", pattern)
    for name in (
        "lightning.pytorch.utilities.rank_zero",
        "lightning.pytorch.accelerators.cuda",
        "lightning.pytorch.trainer.connectors.checkpoint_connector",
    ):
        logging.getLogger(name).addFilter(_is_ours)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)


def _is_ours(record: Any) -> bool:
    noise = (
        "GPU available",
        "TPU available",
        "Running in `fast_dev_run`",
        "HPU available",
        "`Trainer.fit` stopped",
        "💡 Tip",
        "`weights_only` was not set",
        "Restoring states",
        "Restored all",
    )
    return not str(record.getMessage()).startswith(noise)


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
        fail(COMMAND, str(error), error.code)
    except OSError as error:
        fail(COMMAND, f"{error} (in {plan.run_dir}); afterwards the same command continues.", 1)
    finally:
        for logger in trainer.loggers:
            if isinstance(logger, KimgWandbLogger) and not logger.finish():
                leave_at_once()


def out_of_memory(cli: FitCLI, error: Exception) -> str:
    """What to change when a device's memory is too small, by what the run has not done yet.

    Args:
        cli: The run.
        error: What torch says.
    """
    plan = cli.datamodule.plan(cli.trainer.world_size)
    advice = []
    if plan.micro_batch > 1:
        fitting = max(m for m in range(1, plan.micro_batch) if plan.micro_batch % m == 0)
        advice.append(f"--data.micro_batch {fitting} (the same results by accumulation)")
    if cli.trainer.precision == "32-true":
        advice.append("--trainer.precision bf16-mixed")
    if not cli.config["performance"]["checkpointing"]:
        advice.append("--performance.checkpointing true (about a quarter slower)")
    if cli.datamodule.resident:
        advice.append("--data.resident false")
    return (
        f"The device's memory is too small for micro-batches of {plan.micro_batch} images: try "
        f"{', '.join(advice) or 'a smaller network'}. torch says: {one_line(error)[:200]}"
    )


def leave_at_once() -> None:
    """End the process without waiting for W&B, which waits for its server."""
    error = sys.exc_info()[1]
    code = error.code if isinstance(error, SystemExit) else int(error is not None)
    if error is not None and not isinstance(error, SystemExit):
        sys.excepthook(type(error), error, error.__traceback__)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 1)


def is_finished(run_dir: Path, checkpoint: dict[str, Any], total_nimg: int) -> bool:
    """Whether a run reached its end and wrote its record and its weights."""
    nimg = checkpoint["cm_lightning"]["nimg"]
    names = checkpoint["callbacks"]["EMACallback"]["averages"]
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
    newest = next(filter(is_intact, checkpoints_of(cli.plan.run_dir)), None)
    if newest is not None and newest.name > f"nimg{nimg:012d}.ckpt":
        if is_in_use(cli.plan.run_dir):
            raise in_use(cli.plan.run_dir)
        raise InputError(
            f"{cli.plan.run_dir} holds a newer checkpoint, {newest.name}, than {path}: choose "
            "another --run_dir, so that nothing is lost."
        )
    if cli.trainer.is_global_zero:
        print(f"Resuming from {path} at {nimg / 1000:g} kimg.")
    return checkpoint


def export(cli: FitCLI) -> None:
    """Write ``<run>/weights/<profile>/`` for every EMA profile."""
    import json

    ema = next(c for c in cli.trainer.callbacks if isinstance(c, EMACallback))  # type: ignore[attr-defined]
    model = json.loads(cli.parser.dump(cli.config, format="json"))["model"]
    for name in ema.averages:
        weights = dict(cli.model.denoiser.state_dict()) | ema.averages[name]
        info = {
            "regime": type(cli.model).__name__,
            "ema": name,
            "kimg": cli.model.nimg / 1000,
            "data_fingerprint": cli.datamodule.fingerprint,
            "origins": cli.model.origins,
        }
        folder = cli.plan.run_dir / "weights" / name
        save_weights(folder, model["init_args"]["denoiser"], weights, info)
        print(f"  weights    {folder}")


def check(cli: FitCLI) -> None:
    """Build everything, train one step, evaluate a few images, write nothing, report."""
    module, data, trainer = cli.model, cli.datamodule, cli.trainer
    fid = next(c for c in trainer.callbacks if isinstance(c, FIDCallback))  # type: ignore[attr-defined]
    fid.make_trial()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        data.use_temporary_cache(Path(folder))
        with starting(module):
            trainer.fit(module, data)
        seconds = time.perf_counter() - started
        values = fid.evaluate(trainer, module) if fid.enabled else {}
    print(check_report(cli, seconds, values))


def megabytes(size: float) -> str:
    """A number of bytes in words."""
    return f"{size / 2**20:,.0f} MB"


def check_report(cli: FitCLI, seconds: float, values: dict[str, float]) -> str:
    """What a run of this config would need.

    Args:
        cli: The built run, after one step.
        seconds: Time of set-up and the first step.
        values: Frechet distances of the tiny evaluation.
    """
    from cm_lightning.callbacks.diagnostics import peak_memory

    module, data = cli.model, cli.datamodule
    parameters = sum(p.numel() for p in module.denoiser.parameters())
    profiles = len(next(c for c in cli.trainer.callbacks if isinstance(c, EMACallback)).names)  # type: ignore[attr-defined]
    fixed = megabytes(parameters * 4 * (4 + profiles))
    peak = megabytes(peak_memory(module.device))
    steps = -(-module.total_nimg // data.global_batch)
    shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items()) or "switched off"
    return "\n".join(
        [
            f"{type(module).__name__}: everything was built and one step was trained.",
            f"  parameters  {parameters:,}",
            f"  memory      {fixed} for weights, gradients, optimizer and {profiles} EMA; "
            f"peak {peak} in this step",
            f"  data        {len(data.store):,} images {data.image_shape}, "
            f"{data.num_classes} classes",
            f"  length      {module.total_kimg:g} kimg, {steps:,} steps of {data.global_batch}",
            f"  evaluation  {shown} (16 images: a test, not a measurement)",
            f"  time        {seconds:.1f} s for set-up and the first step",
            "  Nothing was written.",
        ]
    )


if __name__ == "__main__":
    main()
