"""The file of a study: arms, seeds, search, evaluations."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cm_lightning.cli.keys import plain
from cm_lightning.documents import check_form, read_mapping
from cm_lightning.types import InputError

__all__ = ["Arm", "Study", "Tuning", "merged", "read_study", "scaled"]

FORM = {
    "of?": str,
    "share?": float,
    "title?": str,
    "config?": str,
    "options?": dict,
    "evaluate?": {...: list},
    "arms?": {...: (dict, type(None))},
    "seeds?": [int],
    "tune?": {
        "key": str,
        "values": list,
        "seeds": [int],
        "metric": str,
        "chosen?": {...: object},
    },
    "questions?": {...: [[str]]},
    "first?": {...: (dict, type(None))},
    "lengths?": [str],
}
"""Form of a study; one that is not of another needs arms and seeds."""
ARM = {
    "about?": str,
    "config?": str,
    "options?": dict,
    "tuned_as?": str,
    "of?": str,
    "share?": float,
    "time_of?": str,
    "evaluate?": {...: list},
}
"""Form of one of its arms."""


@dataclass(frozen=True)
class Tuning:
    """Search of one option per arm, on seeds of its own.

    Args:
        key: The option, as ``model.optimizer.init_args.lr``.
        values: Values to try.
        seeds: Seeds of the search; none of them may be a seed of the study.
        metric: Result whose mean over the seeds is minimised.
        chosen: Values that an earlier search found, by arm; these arms are not searched again.
    """

    key: str
    values: list[Any]
    seeds: list[int]
    metric: str
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        config: Config file, relative to the study's file.
        options: Options of ``cm-fit`` on top of it.
        tuned_as: Take the tuned value of this arm instead of searching.
        evaluate: Options of ``cm-eval`` for finished runs of this arm, by the name that its results
            get; none for no evaluation besides that of the training run.
        of: The arm it was derived from.
        time_of: Arm in whose training time it is to be trained: its lengths are those of ``of``
            times the ratio of the two arms' times, as measured in their finished runs.
        about: What it is, in a few words for the tables.
    """

    config: Path
    options: dict[str, Any]
    tuned_as: str | None = None
    evaluate: dict[str, list[str]] = field(default_factory=dict)
    of: str | None = None
    time_of: str | None = None
    about: str = ""


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arms: Arms by name.
        seeds: Seeds of the reported runs.
        tune: Search per arm, ``None`` for none.
        questions: What the study asks, in words, with the pairs that answer: an arm and its
            baseline, whose difference is taken seed by seed. Either side may name one result of its
            arm, as ``ect | eval/ema_0.9/sigmas 80``; without, all results that most arms have are
            compared.
        first: Runs made once before all others, by name, such as a teacher; options of arms find
            them at ``{study}/<name>``.
        lengths: Options that hold a length in thousands of images and scale with it.
        title: What it is, in a few words.
    """

    arms: dict[str, Arm]
    seeds: list[int]
    tune: Tuning | None
    questions: dict[str, list[list[str]]]
    first: dict[str, Arm] = field(default_factory=dict)
    lengths: list[str] = field(default_factory=list)
    title: str = "A study"


def read_study(path: Path) -> Study:
    """Read a study's file.

    Args:
        path: YAML with ``config``, ``options``, ``evaluate`` (these for all arms), ``arms``,
            ``seeds`` and, as wanted, ``title``, ``first``, ``tune``, ``lengths`` and ``questions``.
            An arm may be ``of`` an earlier one, whose options it takes; with a ``share`` the
            options named by ``lengths`` are multiplied by it, with ``time_of`` by what makes its
            training time that of another arm. A study may be ``of`` another file, whose keys it
            takes: its own replace them, its ``options`` come on top of those of every arm and first
            run, and its ``share`` multiplies all lengths.

    Raises:
        InputError: If a key is unknown or missing, or does not fit the others.
    """
    content, top, share = _read(path)
    tune = None
    if content.get("tune") is not None:
        _check_keys(content["tune"], {field.name for field in fields(Tuning)}, f"{path}: tune")
        if not content["tune"]["values"] or not content["tune"]["seeds"]:
            raise InputError(f"{path}: tune needs one value and one seed at least.")
        tune = Tuning(**content["tune"] | {"chosen": content["tune"].get("chosen") or {}})
    lengths = content.get("lengths") or []
    known = set() if tune is None else set(tune.chosen)
    arms, first = (
        {
            name: replace(arm, options=merged(scaled(arm.options, lengths, share), top))
            for name, arm in _arms(content, part, tune is not None, known, path).items()
        }
        for part in ("arms", "first")
    )
    study = Study(
        arms,
        list(content["seeds"]),
        tune,
        content.get("questions") or {},
        first,
        lengths,
        content.get("title") or path.stem,
    )
    _check(study, path)
    return study


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """A study's keys, the options on top of all others, and the factor of all lengths."""
    content, allowed = read_mapping(path, "study"), {key.removesuffix("?") for key in FORM}
    _check_keys(content, allowed, str(path))
    check_form(content, FORM, str(path))
    of, given = content.pop("of", None), content.pop("share", None)
    share = 1.0 if given is None else float(given)
    if not share > 0 or (share != 1 and of is None):
        raise InputError(f"{path}: share must be positive, in a study `of` another; got {share:g}.")
    top: dict[str, Any] = {}
    if of is not None:
        base = path.parent / of
        other = read_mapping(base, "study")
        if other.keys() & {"of", "share"} or base.parent != path.parent:
            raise InputError(f"{path} is of {base}, which must lie beside it and stand alone.")
        _check_keys(other, allowed, str(base))
        check_form(other, FORM, str(base))
        top = content.pop("options", None) or {}
        content = other | content
    for key in ("arms", "seeds"):
        if not content.get(key):
            raise InputError(f"{path} lacks '{key}'.")
    try:
        json.dumps([content, top], sort_keys=True)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{path} may hold texts, numbers, lists and mappings by texts alone: {error}."
        ) from error
    return content, top, share


def merged(options: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Options with others on top, which come last, as the last of several counts in ``cm-fit``.

    Args:
        options: Options of ``cm-fit``.
        own: What replaces them, under either spelling of a key, with ``init_args`` or without.
    """
    replaced = {plain(str(key)) for key in own}
    kept = {key: value for key, value in options.items() if plain(str(key)) not in replaced}
    return kept | dict(own)


def scaled(options: dict[str, Any], lengths: list[str], share: float) -> dict[str, Any]:
    """Options with their lengths multiplied.

    Args:
        options: Options of an arm.
        lengths: Which of them hold a length; those that an arm does not have are left out.
        share: Factor > 0; lengths keep four digits.

    Raises:
        InputError: If a length is no number, or none is there to multiply.
    """
    if share == 1:
        return options
    found = _lengths(options, lengths)
    for key, value in found.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise InputError(f"The length {key} must be a number, got {value!r}.")
    if not found:
        raise InputError("A share needs one of the options that `lengths` names.")
    return options | {key: float(f"{share * value:.4g}") for key, value in found.items()}


def _lengths(options: Mapping[str, Any], lengths: Sequence[str]) -> dict[str, Any]:
    """The options that hold a length."""
    named = {plain(key) for key in lengths}
    return {key: value for key, value in options.items() if plain(str(key)) in named}


def _arms(
    content: dict[str, Any], part: str, tuned: bool, known: set[str], path: Path
) -> dict[str, Arm]:
    """Arms, or first runs, in the order of the file.

    Args:
        content: The study.
        part: ``"arms"`` or ``"first"``.
        tuned: Whether there is a search.
        known: Arms whose tuned value is known.
        path: The file.
    """
    arms: dict[str, Arm] = {}
    allowed = {key.removesuffix("?") for key in ARM}
    common, scores = content.get("options") or {}, content.get("evaluate") or {}
    if part == "first":
        allowed, common, scores, tuned = allowed - {"time_of", "tuned_as"}, {}, {}, False
    for name, given in (content.get(part) or {}).items():
        given, where = given or {}, f"{path}: {part}.{name}"
        _check_keys(given, allowed, where)
        check_form(given, ARM, str(path), f"{part}.{name}")
        base = arms.get(str(given.get("of")))
        if given.get("of") is not None and (base is None or base.time_of):
            raise InputError(f"{where} is of '{given['of']}', which is no arm before it.")
        config = given.get("config", content.get("config") if base is None else None)
        place = base.config if base is not None and config is None else path.parent / str(config)
        if not place.is_file():
            raise InputError(f"{where} has no config file ({config}).")
        options = merged(common if base is None else base.options, given.get("options") or {})
        share = 1.0 if given.get("share") is None else float(given["share"])
        if not share > 0:
            raise InputError(f"{where}: share must be positive, got {share:g}.")
        lengths = content.get("lengths") or []
        sized = bool(_lengths(options, lengths))
        if share != 1 and not sized:
            raise InputError(f"{where}: a share needs an option that `lengths` names.")
        if any(plain(str(key)) == "allow_modules" for key in options):
            raise InputError(f"{where}: allow_modules belongs to the command line of cm-study.")
        options = scaled(options, lengths, share)
        of, time_of = given.get("of"), given.get("time_of")
        if time_of is not None:
            other = arms.get(time_of)
            if base is None or other is None or other.time_of or share != 1:
                raise InputError(
                    f"{where}: time_of takes an earlier arm of a fixed length, and needs `of`, "
                    "another one, and no share."
                )
            if not sized:
                raise InputError(f"{where}: time_of needs an option that `lengths` names.")
        tuned_as = given.get("tuned_as", of if tuned and name not in known else None)
        own = scores | (given.get("evaluate") or {})
        evaluate = {key: [str(word) for word in words] for key, words in own.items()}
        arms[name] = Arm(place, options, tuned_as, evaluate, of, time_of, given.get("about") or "")
    return arms


def _check_keys(given: Any, allowed: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a mapping of {', '.join(sorted(allowed))}.")
    for key in given.keys() - allowed:
        raise InputError(f"{where} knows no '{key}', only {', '.join(sorted(allowed))}.")


def _check(study: Study, path: Path) -> None:
    names = [*study.arms, *study.first]
    runs = (study.arms | study.first).values()
    names += [name for run in runs for name in run.evaluate]
    for name in names:
        if not re.fullmatch(r"\w[\w.+-]*", name):
            raise InputError(f"{path}: '{name}' names a folder: take letters, digits, - and _.")
    for name in study.arms.keys() & study.first.keys():
        raise InputError(f"{path}: {name} is both an arm and a first run.")
    for name, arm in (study.arms | study.first).items():
        for other in re.findall(r"\{study\}/([\w.+-]+)", json.dumps(arm.options)):
            if other not in study.first:
                raise InputError(f"{path}: {name} needs the run {other}, which `first` lacks.")
    pairs = [pair for pairs in study.questions.values() for pair in pairs]
    for pair in pairs:
        if len(pair) != 2 or len({" | " in side for side in pair}) > 1:
            raise InputError(
                f"{path}: questions must hold pairs of an arm and its baseline, both or neither "
                f"with the name of a result; got {pair}."
            )
    named = [side.partition(" | ")[0] for pair in pairs for side in pair]
    named += [arm.tuned_as for arm in study.arms.values() if arm.tuned_as]
    named += [] if study.tune is None else list(study.tune.chosen)
    for name in named:
        if name not in study.arms:
            raise InputError(f"{path} names '{name}', but its arms are {', '.join(study.arms)}.")
    if len(set(study.seeds)) < len(study.seeds) or len(study.seeds) < 2:
        raise InputError(f"{path}: seeds must be two or more, each once, got {study.seeds}.")
    if study.tune is not None and set(study.tune.seeds) & set(study.seeds):
        both = sorted(set(study.tune.seeds) & set(study.seeds))
        raise InputError(f"{path}: tune.seeds and seeds share {both}: results would be chosen.")
