"""Where a run lives and what it continues from, decided before anything is written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cm_lightning.callbacks import newest_intact
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.evaluation import read_metrics
from cm_lightning.types import InputError
from cm_lightning.weights import newest_of

__all__ = ["RunPlan", "depends_on_micro_batch", "differences", "plan_run", "run_record"]

_HARMLESS = {
    "data.num_workers",
    "data.micro_batch",
    "data.resident",
    "data.cache",
    "model.init_args.posterior.init_args.chunk",
}
"""Keys below model and data that change speed, and results at most by rounding (micro-batches
whose rows act on each other are compared where the number of devices is known)."""


@dataclass(frozen=True)
class RunPlan:
    """The decision.

    Attributes:
        run_dir: Directory of the run.
        checkpoint: Checkpoint to continue from, ``None`` for a fresh start.
        config_text: The resolved config as YAML.
        wandb_id: Identity of the W&B run to continue.
        wandb_sent: Last optimizer step that it got in the starts before the last one.
    """

    run_dir: Path
    checkpoint: Path | None
    config_text: str
    wandb_id: str | None = None
    wandb_sent: int = -1


def plan_run(config: Any, text: str) -> RunPlan:
    """Decide from the parsed config.

    Args:
        config: The parsed config, with ``run_dir``, ``resume``, ``check`` and ``config``.
        text: The same as YAML text.

    Raises:
        InputError: If the directory holds another run, or the checkpoint does not exist.
    """
    run_dir = Path(config["run_dir"] or default_run_dir(config)).expanduser()
    if not _is_local(str(run_dir)):
        raise InputError(f"--run_dir {run_dir}: {_AS_IT_STANDS}.")
    check_places(config["trainer"], run_dir)
    if config["check"]:
        return RunPlan(run_dir, None, text)
    resume = config["resume"]
    if resume not in ("auto", "never") and not Path(resume).exists():
        raise InputError(
            f"--resume must be auto, never, a checkpoint or a run; there is no {resume}."
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
        check_links(run_dir)
        changed = differences(read_config(old), yaml.safe_load(text))
        if changed:
            raise InputError(
                f"--run_dir {run_dir} holds a run of a different config ({'; '.join(changed[:3])}"
                f"{'; ...' if len(changed) > 3 else ''}): choose another directory; with "
                f"--resume {run_dir} the run goes on there from this one's checkpoint."
            )
        if (run_dir / "metrics.csv").exists():
            read_metrics(run_dir / "metrics.csv")  # rows are dropped from it and added to it
    checkpoint = newest_intact(run_dir) if resume == "auto" else None
    if resume not in ("auto", "never"):
        checkpoint = newest_of(Path(resume))
    check_writable(run_dir)
    record = run_record(run_dir)
    known = record.get("wandb_id"), record.get("wandb_sent", -1)
    return RunPlan(run_dir, checkpoint, text, *known)


def check_links(run_dir: Path) -> None:
    """Check that the folders of a run are not those of another one.

    Raises:
        InputError: If a link leads into another run, whose files this one would replace.
    """
    for folder in ("checkpoints", "samples", "weights"):
        other = (run_dir / folder).resolve().parent
        if other != run_dir.resolve() and (other / "config.yaml").exists():
            raise InputError(f"{run_dir / folder} is a link into another run, {other}: remove it.")


def check_writable(run_dir: Path) -> None:
    """Check that a run directory could be written, without writing.

    Raises:
        InputError: If it, or the folder it would be made in, is read-only.
    """
    place = run_dir.resolve()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--run_dir {run_dir} cannot be written: {place} is read-only.")


_PLACES = {"dirpath", "filename", "save_dir", "root_dir", "log_dir", "output_filename", "dir"}
"""Arguments of Lightning's classes that say where they write."""
_PARTS = {"name", "version", "sub_dir"}
"""Arguments of its loggers that become folders there."""


_AS_IT_STANDS = "give a path of this machine as it stands, without ~, $ or the name of a protocol"


def _is_local(path: str) -> bool:
    """Whether a path means the same to Lightning and its helpers, which expand ~, $ and URLs."""
    return not re.match(r"~|\w+:", path) and "::" not in path and "$" not in path


def check_places(trainer: Any, run_dir: Path) -> None:
    """Check that nothing a config names writes outside the run directory.

    Args:
        trainer: The config's ``trainer``.
        run_dir: The run directory.

    Raises:
        InputError: If a callback, profiler or plugin would, or if Lightning's root is given.
    """
    if trainer["default_root_dir"] is not None:
        raise InputError("trainer.default_root_dir cannot be set: --run_dir is the place of a run.")
    for key, value in flatten(json.loads(json.dumps(trainer.as_dict(), default=str))):
        name = key.split(".")[-1]
        shown = f"trainer.{key.replace('.init_args', '')} is {value}"
        part = name in _PARTS and key.startswith("logger")
        if (part or name in _PLACES) and not _is_local(f"{value}"):
            raise InputError(f"{shown}: {_AS_IT_STANDS}.")
        if part and {"..", "/"} & set(Path(f"{value}").parts):
            raise InputError(f"{shown}, which leads out of the run directory: give a plain name.")
        if name in _PLACES and value is not None:
            inside = run_dir.resolve()
            place = (inside / str(value) if "filename" in name else Path(str(value))).resolve()
            if inside not in (place, *place.parents):
                raise InputError(
                    f"{shown}, outside the run directory: give a path below {run_dir}."
                )


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
    return read_mapping(path, "config")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Keys that change results and differ between two configs, as ``key: old -> new``."""
    kept = ("model", "data", "ema", "seed_everything")
    a = dict(flatten({key: old.get(key) for key in kept}))
    b = dict(flatten({key: new.get(key) for key in kept}))
    return [
        f"{key}: {a.get(key, 'absent')} -> {b.get(key, 'absent')}"
        for key in sorted(a.keys() | b.keys())
        if key not in _HARMLESS and a.get(key, "absent") != b.get(key, "absent")
    ]


def depends_on_micro_batch(config: Mapping[str, Any]) -> bool:
    """Whether images of a micro-batch act on each other: as references, or in a transport plan.

    Args:
        config: The parsed config.
    """
    given = config["model"]["init_args"]
    references, coupling = given.get("references") or {}, given.get("coupling") or {}
    plan = str(coupling.get("class_path")).endswith("MinibatchOT")
    return plan or references.get("source") == "batch"


def flatten(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings of a nested config by their dotted key.

    Args:
        node: The config, or a part of it.
        prefix: Key of that part.
    """
    if isinstance(node, dict):
        for key, value in node.items():
            yield from flatten(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
        for number, value in enumerate(node):
            yield from flatten(value, f"{prefix}.{number}")
    else:
        yield prefix, node


def run_record(run_dir: Path) -> dict[str, Any]:
    """What ``run.json`` holds; empty if there is none.

    Raises:
        InputError: If it cannot be read.
    """
    path = run_dir / "run.json"
    if not path.exists():
        return {}
    record = read_mapping(path)
    check_form(
        record,
        {"starts": [dict], "wandb_id?": str, "wandb_sent?": int, "results?": dict},
        str(path),
    )
    return record
