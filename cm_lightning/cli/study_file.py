"""The file of a study: arms, seeds, search, evaluations."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from cm_lightning.documents import check_form, read_mapping
from cm_lightning.types import InputError

__all__ = ["Arm", "Study", "Tuning", "read_study", "scaled"]

FORM = {
    "of?": str,
    "share?": float,
    "title?": str,
    "config?": str,
    "options?": dict,
    "evaluate?": {...: list},
    "arms": {...: (dict, type(None))},
    "seeds": [int],
    "tune?": dict,
    "questions?": {...: [[str]]},
    "first?": {...: (dict, type(None))},
    "lengths?": [str],
}
"""Form of a study."""
ARM = {
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
    """

    config: Path
    options: dict[str, Any]
    tuned_as: str | None = None
    evaluate: dict[str, list[str]] = field(default_factory=dict)
    of: str | None = None
    time_of: str | None = None


@dataclass(frozen=True)
class Study:
    """A comparison.

    Args:
        arms: Arms by name.
        seeds: Seeds of the reported runs.
        tune: Search per arm, ``None`` for none.
        questions: What the study asks, in words, with the pairs that answer: an arm and its
            baseline, whose difference is taken seed by seed. Either side may name one result of its
            arm, as ``ect | eval/ema_0.9/sigmas 80``; without, all results that every arm has are
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
        names = {field.name for field in fields(Tuning)}
        _check_keys(content["tune"], names, names - {"chosen"}, f"{path}: tune")
        tuning = {"key": str, "values": list, "seeds": [int], "metric": str, "chosen?": dict}
        check_form(content["tune"], tuning, f"{path}: tune")
        if not content["tune"]["values"] or not content["tune"]["seeds"]:
            raise InputError(f"{path}: tune needs one value and one seed at least.")
        tune = Tuning(**content["tune"])
    arms = _arms(content, "arms", content.get("options") or {}, path)
    alone = {"arms": content.get("first") or {}, "evaluate": None}
    first = _arms(content | alone, "first", {}, path)
    lengths, title = content.get("lengths") or [], content.get("title") or path.stem
    arms, first = (
        {
            name: replace(arm, options=scaled(arm.options, lengths, share) | top)
            for name, arm in group.items()
        }
        for group in (arms, first)
    )
    questions = content.get("questions") or {}
    if any(len(pair) != 2 for pairs in questions.values() for pair in pairs):
        raise InputError(f"{path}: questions must hold pairs of an arm and its baseline.")
    study = Study(arms, list(content["seeds"]), tune, questions, first, lengths, title)
    _check(study, path)
    return study


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Any], float]:
    """A study's keys, the options on top of all others, and the factor of all lengths."""
    content = read_mapping(path, "study")
    allowed = {key.removesuffix("?") for key in FORM}
    base = path.parent / str(content.get("of"))
    needed = {"arms", "seeds"} if content.get("of") is None else set()
    _check_keys(content, allowed, needed, str(path))
    top: dict[str, Any] = {}
    share = content.get("share", 1)
    if content.get("of") is not None:
        other = read_mapping(base, "study")
        if "of" in other or base.parent != path.parent:
            raise InputError(f"{path} is of {base}, which must lie beside it and stand alone.")
        _check_keys(other, allowed, {"arms", "seeds"}, str(base))
        top = content.pop("options", None) or {}
        content = other | content
    elif share != 1:
        raise InputError(f"{path} has a share, which belongs to a study `of` another.")
    check_form(content | {"options": top}, FORM, str(path))
    check_form(content, FORM, str(base if top else path))
    if not float(share) > 0:
        raise InputError(f"{path}: share must be positive, got {share}.")
    return content, top, float(share)


def scaled(options: dict[str, Any], lengths: list[str], share: float) -> dict[str, Any]:
    """Options with their lengths multiplied.

    Args:
        options: Options of an arm.
        lengths: Which of them hold a length; those that an arm does not have are left out.
        share: Factor > 0; lengths keep four digits.
    """
    changed = {
        key: float(f"{share * options[key]:.4g}")
        for key in lengths
        if key in options and share != 1
    }
    return options | changed


def _arms(content: dict[str, Any], part: str, common: dict[str, Any], path: Path) -> dict[str, Arm]:
    arms: dict[str, Arm] = {}
    allowed = {key.removesuffix("?") for key in ARM}
    for name, given in content["arms"].items():
        given, where = given or {}, f"{path}: {part}.{name}"
        _check_keys(given, allowed, set(), where)
        check_form(given, ARM, str(path), f"{part}.{name}")
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
        options = scaled(options, content.get("lengths") or [], share)
        of, time_of = given.get("of"), given.get("time_of")
        if time_of is not None:
            other = arms.get(time_of)
            if base is None or base.time_of or other is None or other.time_of or share != 1:
                raise InputError(
                    f"{where}: time_of takes an earlier arm of a fixed length, and needs `of`, "
                    "another one, and no share."
                )
        chosen = (content.get("tune") or {}).get("chosen") or {}
        tuned = content.get("tune") and name not in chosen
        tuned_as = given.get("tuned_as", of if tuned else None)
        scores = (content.get("evaluate") or {}) | (given.get("evaluate") or {})
        evaluate = {key: [str(word) for word in words] for key, words in scores.items()}
        arms[name] = Arm(place, options, tuned_as, evaluate, of, time_of)
    return arms


def _check_keys(given: Any, allowed: set[str], needed: set[str], where: str) -> None:
    if not isinstance(given, dict):
        raise InputError(f"{where} must be a mapping of {', '.join(sorted(allowed))}.")
    for key in given.keys() - allowed:
        raise InputError(f"{where} knows no '{key}', only {', '.join(sorted(allowed))}.")
    for key in needed - given.keys():
        raise InputError(f"{where} lacks '{key}'.")


def _check(study: Study, path: Path) -> None:
    pairs = [pair for pairs in study.questions.values() for pair in pairs]
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
