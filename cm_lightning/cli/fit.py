"""``cm-fit``: train a regime from one YAML file."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import WandbLogger

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
)
from cm_lightning.cli.errors import (
    Parser,
    about_input,
    about_machine,
    fail,
    lacks_memory,
    name_modules,
    readable_errors,
)
from cm_lightning.cli.fit_check import check
from cm_lightning.cli.fit_run import COMMAND, fit, out_of_memory
from cm_lightning.cli.help import fit_help, wants_help
from cm_lightning.cli.keys import check_keys, misfit
from cm_lightning.cli.run_dir import RunPlan, plan_run
from cm_lightning.data import ImageDataModule
from cm_lightning.documents import complaint, one_line
from cm_lightning.ema import ConstantEMA
from cm_lightning.loggers import MetricsCSV, WandbOptions, say, wandb_logger
from cm_lightning.modules import CONFIG, only
from cm_lightning.regimes import ConsistencyModule
from cm_lightning.sampling import DEFAULT_SAMPLERS
from cm_lightning.types import InputError

__all__ = ["FitCLI", "main"]

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


_IDLE = (
    "max_epochs",
    "min_epochs",
    "min_steps",
    "limit_train_batches",
    "limit_val_batches",
    "limit_test_batches",
    "limit_predict_batches",
    "overfit_batches",
    "val_check_interval",
    "check_val_every_n_epoch",
    "log_every_n_steps",
    "reload_dataloaders_every_n_epochs",
)
"""Settings of Lightning's trainer that count in batches or epochs."""


class FitParser(Parser):
    """The parser, which can say what every key takes."""

    folder = "."
    """Where the command was given; while a config is read, its own folder is the current one."""

    def explain(self) -> str | None:
        """The first value that does not fit its key."""
        with contextlib.chdir(self.folder):
            return misfit(sys.argv[1:], GROUPS, SCALARS)


class FitCLI(LightningCLI):
    """The parser, and from it the module, the data, the callbacks and the trainer."""

    plan: RunPlan
    scratch: tempfile.TemporaryDirectory[str]
    """Where ``--check`` writes what a run of one step would."""

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
        parser.add_argument(
            "--resume", type=str, default="auto", help="auto, never, a .ckpt or a run"
        )
        parser.add_argument(
            "--check",
            type=bool,
            default=False,
            nargs="?",
            const=True,
            help="build everything, train one step, write no run",
        )
        parser.add_argument(
            "--allow_modules",
            type=str | None,
            default=None,
            help="packages of your own that configs may name classes of; on the command line alone",
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
        init = self.config["model"]["init_args"].get("init")
        path = getattr(init, "path", None)
        own = self.plan.checkpoint is not None and self.config["resume"] == "auto"
        if own and path is not None and not Path(path).exists():
            say(f"model.init.path {path} is gone: the run goes on without teacher/ode_distance.")
            self.config["model"]["init_args"]["init"] = None

    def check_trainer(self) -> None:
        """Refuse settings of Lightning's loop that would do nothing here, or something else."""
        for key in _IDLE:
            if self.config["trainer"][key] != self.parser.get_default(f"trainer.{key}"):
                raise InputError(
                    f"trainer.{key} cannot be set, as images are counted here: model.total_kimg is "
                    "the length of a run, and every_kimg of diagnostics, fid, samples and "
                    "checkpoints their intervals."
                )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Build the trainer with the run's loggers, progress bar and directory."""
        run_dir = self.plan.run_dir
        self.check_trainer()
        kwargs["default_root_dir"] = str(run_dir)
        given = self.config["trainer"]
        if given["benchmark"] is None and not given["deterministic"]:
            kwargs["benchmark"] = True  # shapes are fixed, so cuDNN may try its algorithms
        made = self.config_init["trainer"]
        kwargs["callbacks"] = as_list(made["callbacks"])
        if self.config["check"]:
            self.scratch = tempfile.TemporaryDirectory()
            kwargs |= {"logger": False, "max_steps": 1, "enable_progress_bar": False}
            kwargs["default_root_dir"] = self.scratch.name
        else:
            others = as_list(made["logger"])
            if True in others or any(isinstance(logger, WandbLogger) for logger in others):
                raise InputError(
                    "trainer.logger adds loggers such as TensorBoardLogger by their class_path: "
                    "metrics.csv is always written, and wandb.project adds W&B."
                )
            kwargs["logger"] = [MetricsCSV(run_dir), *others]
            resumed = None if self.plan.checkpoint is None else str(self.plan.checkpoint)
            known = run_dir, self.plan.wandb_id, self.plan.wandb_sent
            wandb = partial(wandb_logger, self.config_init["wandb"], *known)
            record = RunRecordCallback(self.plan.config_text, resumed, wandb)
            kwargs["callbacks"].append(record)
            if self.config["trainer"]["enable_progress_bar"] is not False:
                kwargs["callbacks"].append(KimgProgress())
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, RuntimeError, ImportError, MisconfigurationException) as error:
            raise InputError(f"The trainer refuses its settings: {one_line(error)}.") from error


def as_list(given: Any) -> list[Any]:
    """What a key holds that takes one thing or several: a list, empty for ``None`` or false."""
    return list(given) if isinstance(given, (list, tuple)) else [given] if given else []


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
    if wants_help(argv):
        print(fit_help())
        return
    quiet()
    FitParser.folder = os.getcwd()
    with readable_errors(COMMAND):
        if "--help_all" in argv:
            sys.argv[1:] = ["--help"]
        else:
            name_modules(allowed_by(argv))
            check_keys(argv, GROUPS, SCALARS)
        with only(CONFIG):  # to the end, as the optimizer is made when training starts
            cli = FitCLI(args)
            try:
                (check if cli.config["check"] else fit)(cli)
            except Exception as error:
                if not lacks_memory(error):
                    raise
                fail(COMMAND, out_of_memory(cli, error), 1)


def allowed_by(argv: list[str]) -> list[str]:
    """Packages that ``--allow_modules`` names; a config cannot allow itself anything.

    Args:
        argv: Command line without the program.
    """
    found: list[str] = []
    for number, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key == "--allow_modules":
            value = value if equals else "".join(argv[number + 1 : number + 2])
            found += value.split(",")
    return found


def quiet() -> None:
    """Silence warnings and notices that tell our users nothing they can act on."""
    import logging

    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for pattern in (
        ".*does not have many workers.*",
        ".*`IterableDataset` has `__len__` defined.*",
        ".*does not support `log_every_n_steps`.*",
        ".*LeafSpec.*",
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


if __name__ == "__main__":
    main()
