"""Where a run lives and what it continues from, decided before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cm_lightning.callbacks import newest_intact
from cm_lightning.types import InputError

__all__ = ["RunPlan", "differences", "plan_run"]

_HARMLESS = {
    "data.num_workers",
    "data.micro_batch",
    "data.resident",
    "data.cache",
    "model.init_args.posterior.init_args.chunk",
}
"""Keys below model and data that change speed, and results at most by rounding."""


@dataclass(frozen=True)
class RunPlan:
    """The decision.

    Attributes:
        run_dir: Directory of the run.
        checkpoint: Checkpoint to continue from, ``None`` for a fresh start.
        config_text: The resolved config as YAML.
        wandb_id: Identity of the W&B run to continue.
    """

    run_dir: Path
    checkpoint: Path | None
    config_text: str
    wandb_id: str | None


def plan_run(config: Any, text: str) -> RunPlan:
    """Decide from the parsed config.

    Args:
        config: The parsed config, with ``run_dir``, ``resume``, ``check`` and ``config``.
        text: The same as YAML text.

    Raises:
        InputError: If the directory holds another run, or the checkpoint does not exist.
    """
    run_dir = Path(config["run_dir"] or default_run_dir(config))
    if config["check"]:
        return RunPlan(run_dir, None, text, None)
    resume = config["resume"]
    if resume not in ("auto", "never") and not Path(resume).is_file():
        raise InputError(
            f"--resume must be auto, never or a checkpoint; there is no file {resume}."
        )
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--run_dir {run_dir} is a file.")
    old = run_dir / "config.yaml"
    occupied = run_dir.is_dir() and any(run_dir.iterdir())
    if occupied and not old.is_file():
        raise InputError(
            f"--run_dir {run_dir} is not empty and not a run: choose an empty directory."
        )
    if occupied and resume == "never":
        raise InputError(
            f"--run_dir {run_dir} already holds a run and --resume is never: choose another "
            "directory, or --resume auto to continue it."
        )
    if occupied:
        changed = differences(read_config(old), yaml.safe_load(text))
        if changed:
            raise InputError(
                f"--run_dir {run_dir} holds a run of a different config ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}): choose another directory."
            )
    checkpoint = newest_intact(run_dir) if resume == "auto" else None
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
    return RunPlan(run_dir, checkpoint, text, wandb_id(run_dir))


def default_run_dir(config: Any) -> Path:
    """``runs/<name of the first config file>``.

    Raises:
        InputError: If there is no config file to name it after.
    """
    files = config.get("config") or []
    if not files:
        raise InputError("Without --config the run needs a place: give --run_dir.")
    return Path("runs") / Path(str(files[0])).stem


def read_config(path: Path) -> dict[str, Any]:
    """Read a run's config.

    Raises:
        InputError: If it is not a YAML mapping.
    """
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML.") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} is not a config.")
    return config


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that change results and differ between two configs, as ``key: old -> new``."""
    kept = ("model", "data", "ema", "seed_everything")
    a = dict(_flatten({key: old.get(key) for key in kept}))
    b = dict(_flatten({key: new.get(key) for key in kept}))
    return [
        f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}"
        for key in sorted(a.keys() | b.keys())
        if key not in _HARMLESS and a.get(key, "absent") != b.get(key, "absent")
    ]


def _flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for number, value in enumerate(node):
            yield from _flatten(value, f"{prefix}.{number}")
    else:
        yield prefix, node


def wandb_id(run_dir: Path) -> str | None:
    """The W&B identity stored in ``run.json``."""
    path = run_dir / "run.json"
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8")).get("wandb_id")
    except ValueError:
        return None
    return None if value is None else str(value)
