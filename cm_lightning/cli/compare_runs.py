"""What ``cm-compare`` reads of a run."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from cm_lightning.cli.evaluate_results import RESULTS, guidance_words
from cm_lightning.cli.run_dir import flatten, read_config
from cm_lightning.cli.study_report import RECORD
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.evaluation import read_metrics
from cm_lightning.types import InputError

__all__ = [
    "SAME",
    "Entry",
    "curves",
    "distinct",
    "grids",
    "made",
    "nfe_of",
    "origin",
    "read_entry",
    "read_record",
    "settings",
]

_START = {
    "device": str,
    "seconds?": float,
    "git?": {"commit": str},
    "resumed_from?": str,
    "kimg?": float,
    "time?": str,
    "host?": str,
    "versions?": {...: str},
}
_IDENTITY = {
    "features?": str,
    "features_sha256?": str,
    "n?": int,
    "reference?": str,
    "data_fingerprint?": str,
}

SAME = {
    "features_sha256": "features",
    "n": "number of samples",
    "reference": "reference statistics",
    "data_fingerprint": "training images",
}
"""What must agree for distances to be ranked, in words."""


@dataclass(frozen=True)
class Entry:
    """A run, or its evaluation.

    Args:
        name: Name of the run directory.
        path: Where it is.
        record: ``run.json``.
        rows: ``metrics.csv``.
        identity: What its distances were measured with, by the keys of :data:`SAME`.
        distances: Per way of sampling: distances of one or more seeds.
        config: ``config.yaml``.
    """

    name: str
    path: Path
    record: dict[str, Any]
    rows: list[dict[str, float]]
    identity: dict[str, Any]
    distances: dict[str, list[float]]
    config: dict[str, Any]


def read_record(path: Path) -> dict[str, Any]:
    """``run.json`` of a run.

    Args:
        path: The run directory.

    Raises:
        InputError: If it is not a run.
    """
    try:
        record = read_mapping(path / "run.json")
        form = RECORD | {"seed": int, "starts": [_START], "wandb_id?": str}
        check_form(record, form, str(path / "run.json"))
        if not record["starts"]:
            raise InputError("It has no start.")
    except InputError as error:
        raise InputError(
            f"{path} is not a run directory: run.json cannot be read. {error}"
        ) from error
    return record


def read_entry(path: Path, evaluated: bool = True) -> Entry:
    """Read a run directory.

    Args:
        path: The run directory.
        evaluated: Whether results of ``cm-eval`` in it take the place of those of training.

    Raises:
        InputError: If it is not a run, or has no results yet.
    """
    record = read_record(path)
    rows = read_metrics(path / "metrics.csv")
    found = path / "eval" / "eval.json"
    content = read_mapping(found) if evaluated and found.is_file() else {}
    if content:
        check_form(content, RESULTS | {"kimg?": (float, type(None))}, str(found))
    measured, trained = content.get("kimg"), (record.get("results") or {}).get("kimg")
    if measured and trained and measured < trained and not _has_snapshots(content):
        print(
            f"{found} is of {measured:g} kimg and the run of {trained:g}: its distances of "
            "training are shown.",
            file=sys.stderr,
        )
        content = {}
    if content:
        distances: dict[str, list[float]] = {}
        for row in content["results"]:
            if "fd" in row:
                key = f"{row['ema']}, {row['sampling']}{guidance_words(row)}, NFE {row['nfe']}"
                distances.setdefault(key, []).append(row["fd"])
        identity = {key: content.get(key) for key in [*SAME, "features"]}
    else:
        results = record.get("results")
        if not results:
            raise InputError(f"{path} has no results yet: let it finish, or run cm-eval on it.")
        distances = {key: [value] for key, value in results["last"].items()}
        measured = results.get("measured_with") or {}
        identity = {key: measured.get(key) for key in [*SAME, "features"]}
        identity["data_fingerprint"] = record.get("data_fingerprint")
    check_form(identity, _IDENTITY, f"What {path} was measured with")
    config = read_config(path / "config.yaml")
    check_form(config, {"samples?": {"seed?": int}}, str(path / "config.yaml"))
    return Entry(path.name, path, record, rows, identity, distances, config)


def _has_snapshots(content: dict[str, Any]) -> bool:
    """Whether averages of earlier moments were evaluated, whose length is their own."""
    return any("@" in row["ema"] for row in content["results"])


def nfe_of(key: str) -> str:
    """Columns of the table: the number of network calls in a metric's name."""
    match = re.search(r"nfe ?(\d+)", key, re.IGNORECASE)
    return "?" if match is None else match[1]


def curves(entry: Entry) -> dict[str, list[tuple[float, float, float]]]:
    """Distances in training: kimg, minutes and value, by metric.

    Minutes are those of the training windows, from their images per second.
    """
    ends, minutes = [0.0], [0.0]
    for row in entry.rows:
        if row.get("speed/images_per_second"):
            images = (row["kimg"] - ends[-1]) * 1000
            minutes.append(minutes[-1] + images / row["speed/images_per_second"] / 60)
            ends.append(row["kimg"])
    found: dict[str, list[tuple[float, float, float]]] = {}
    for key in (entry.record.get("results") or {}).get("last", {}):
        for row in entry.rows:
            if key in row:
                time = float(np.interp(row["kimg"], ends, minutes))
                found.setdefault(key, []).append((row["kimg"], time, row[key]))
    return found


def grids(entry: Entry) -> dict[tuple[str, str], Path]:
    """The newest sample grid by profile and sampler.

    Args:
        entry: The run.
    """
    found = {}
    for folder in sorted((entry.path / "samples").glob("*/*")):
        pictures = sorted(folder.glob("kimg[0-9]*.png"))
        pictures = [path for path in pictures if re.fullmatch(r"kimg\d+(\.\d+)?", path.stem)]
        if pictures:
            found[folder.parent.name, folder.name] = pictures[-1]
    return found


def settings(entries: Sequence[Entry]) -> dict[str, list[str]]:
    """Settings that change results and are not equal in all runs, one value per run.

    Args:
        entries: The runs.
    """
    kept = ("seed_everything", "model", "data", "ema")
    flat = [dict(flatten({key: entry.config.get(key) for key in kept})) for entry in entries]
    found = {}
    for key in dict.fromkeys(key for values in flat for key in values):
        row = [_words(values.get(key, "–")) for values in flat]
        if len(set(row)) > 1 and key != "model.init_args.seed":
            found[key.replace(".init_args", "").removesuffix(".class_path")] = row
    return found


def _words(value: Any) -> str:
    """A setting as people write it: classes of this package by their own name."""
    text = str(value)
    return text.rpartition(".")[2] if text.startswith("cm_lightning.") else text


def origin(record: Mapping[str, Any], path: Path) -> str:
    """Where a run was made, from what, and the command that makes it again.

    Args:
        record: Its ``run.json``.
        path: The run directory.
    """
    start, first = record["starts"][-1], record["starts"][0]
    parent = first.get("resumed_from")  # a run's own checkpoints are no part of its first start
    words = ["cm-fit", "--config", str(path / "config.yaml")]
    words += ["--resume", parent] if parent else []
    wandb = record.get("wandb_id")
    return (
        f"{record['regime']} on {start['device']}, seed {record['seed']}, "
        + (f"{_day(start)}, " if start.get("time") else "")
        + f"commit {_commit(start)}"
        + (f", W&B run {wandb}" if wandb else "")
        + (f", from {parent} at {first.get('kimg') or 0:g} kimg" if parent else "")
        + f"; again: `{shlex.join(words)} --run_dir NEW`"
    )


def made(records: Sequence[Mapping[str, Any]]) -> str:
    """When, on which machines and by which programs runs were made, in a sentence.

    Args:
        records: Their ``run.json``.
    """
    starts = [start for record in records for start in record["starts"]]
    days = sorted(_day(start) for start in starts if start.get("time"))
    when = f" from {days[0]} to {days[-1]}" if days else ""
    devices = dict.fromkeys(start["device"] for start in starts)
    hosts = dict.fromkeys(start["host"] for start in starts if start.get("host"))
    versions = dict.fromkeys(
        f"{name} {start['versions'][name]}"
        for name in ("cm_lightning", "python", "torch", "lightning")
        for start in starts
        if name in (start.get("versions") or {})
    )
    commits = dict.fromkeys(_commit(start) for start in starts)
    return (
        f"{len(records)} runs{when} on {' and '.join(devices)}"
        + (f" (machine {', '.join(hosts)})" if hosts else "")
        + (f", by {', '.join(versions)}" if versions else "")
        + f", commit {', '.join(commits)}."
    )


def _commit(start: Mapping[str, Any]) -> str:
    git = start.get("git") or {}
    return str(git.get("commit", "unknown"))[:12] + (" with changes" if git.get("changed") else "")


def _day(start: Mapping[str, Any]) -> str:
    return str(start["time"])[:16].replace("T", " ") + " UTC"


def distinct(entries: list[Entry]) -> list[Entry]:
    """The runs, those of one name called by the folder above as well."""
    names = [entry.name for entry in entries]
    return [
        replace(entry, name=f"{entry.path.resolve().parent.name}/{entry.name}")
        if names.count(entry.name) > 1
        else entry
        for entry in entries
    ]
