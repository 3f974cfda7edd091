"""The file of a study: arms, seeds, search, evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cm_lightning.types import InputError

__all__ = ["Arm", "Study", "Tuning", "read_study"]


@dataclass(frozen=True)
class Tuning:
    """Search of one option per arm, on seeds of its own.

    Args:
        key: The option, as ``model.optimizer.init_args.lr``.
        values: Values to try.
        seeds: Seeds of the search; none of them may be a seed of the study.
        metric: Result whose mean over the seeds is minimised.
    """

    key: str
    values: list[Any]
    seeds: list[int]
    metric: str


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        config: Config file, relative to the study's file.
        options: Options of ``cm-fit`` on top of it.
        tuned_as: Take the tuned value of this arm instead of searching.
        evaluate: Options of ``cm-eval`` for finished runs of this arm, none for no evaluation
            besides that of the training run.
    """

    config: Path
    options: dict[str, Any]
    tuned_as: str | None = None
    evaluate: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arms: Arms by name.
        seeds: Seeds of the reported runs.
        tune: Search per arm, ``None`` for none.
        compare: Pairs (arm, baseline) whose difference is taken seed by seed.
        first: Runs made once before all others, by name, such as a teacher; options of arms find
            them at ``{study}/<name>``.
    """

    arms: dict[str, Arm]
    seeds: list[int]
    tune: Tuning | None
    compare: list[tuple[str, str]]
    first: dict[str, Arm] = field(default_factory=dict)


def read_study(path: Path) -> Study:
    """Read a study's file.

    Args:
        path: YAML with ``config``, ``options`` (both for all arms), ``arms``, ``seeds`` and, as
            wanted, ``first``, ``tune``, ``lengths`` and ``compare``. An arm may be ``of`` an
            earlier one, whose options it takes; with a ``share`` the options named by ``lengths``
            are multiplied by it, which is how arms of equal time are made.

    Raises:
        InputError: If a key is unknown or missing, or does not fit the others.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read as YAML.") from error
    allowed = {"config", "options", "arms", "seeds", "tune", "compare", "first", "lengths"}
    _check_keys(content, allowed, {"arms", "seeds"}, str(path))
    arms = _arms(content, "arms", content.get("options") or {}, path)
    first = _arms(content | {"arms": content.get("first") or {}}, "first", {}, path)
    tune = None
    if content.get("tune") is not None:
        names = {field.name for field in fields(Tuning)}
        _check_keys(content["tune"], names, names, f"{path}: tune")
        tune = Tuning(**content["tune"])
    pairs = [(str(a), str(b)) for a, b in content.get("compare") or []]
    study = Study(arms, list(content["seeds"]), tune, pairs, first)
    _check(study, path)
    return study


def _arms(content: dict[str, Any], part: str, common: dict[str, Any], path: Path) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    allowed = {"config", "options", "tuned_as", "of", "share", "evaluate"}
    for name, given in content["arms"].items():
        given, where = given or {}, f"{path}: {part}.{name}"
        _check_keys(given, allowed, set(), where)
        base = arms.get(str(given.get("of")))
        if base is None and given.get("of") is not None:
            raise InputError(f"{where} is of '{given['of']}', which is no arm before it.")
        config = given.get("config", content.get("config") if base is None else None)
        place = base.config if base is not None and config is None else path.parent / str(config)
        if not place.is_file():
            raise InputError(f"{where} has no config file ({config}).")
        options = (common if base is None else base.options) | (given.get("options") or {})
        share = float(given.get("share", 1))
        if not share > 0:
            raise InputError(f"{where}: share must be positive, got {share:g}.")
        for key in content.get("lengths") or []:
            if key in options and share != 1:
                options = options | {key: float(f"{share * options[key]:.4g}")}
        tuned_as = given.get("tuned_as", given.get("of") if content.get("tune") else None)
        words = [str(word) for word in given.get("evaluate") or []]
        arms[name] = Arm(place, options, tuned_as, words)
    return arms


def _check_keys(given: Any, allowed: set[str], needed: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a mapping of {', '.join(sorted(allowed))}.")
    for key in given.keys() - allowed:
        raise InputError(f"{where} knows no '{key}', only {', '.join(sorted(allowed))}.")
    for key in needed - given.keys():
        raise InputError(f"{where} lacks '{key}'.")


def _check(study: Study, path: Path) -> None:
    named = [arm for pair in study.compare for arm in pair]
    named += [arm.tuned_as for arm in study.arms.values() if arm.tuned_as]
    for name in named:
        if name not in study.arms:
            raise InputError(f"{path} names '{name}', but its arms are {', '.join(study.arms)}.")
    if len(set(study.seeds)) < len(study.seeds) or len(study.seeds) < 2:
        raise InputError(f"{path}: seeds must be two or more, each once, got {study.seeds}.")
    if study.tune is not None and set(study.tune.seeds) & set(study.seeds):
        both = sorted(set(study.tune.seeds) & set(study.seeds))
        raise InputError(f"{path}: tune.seeds and seeds share {both}: results would be chosen.")
