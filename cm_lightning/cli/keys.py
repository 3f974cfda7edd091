"""Check of the keys a user gave, with their full path and the nearest valid one.

The parser underneath would name only the last part of an unknown key, accept abbreviations inside
a class, and suggest nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args, get_type_hints

from cm_lightning.cli.hints import fits, takes_null, words
from cm_lightning.documents import complaint, one_line, read_mapping, read_value
from cm_lightning.modules import CONFIG, check_class
from cm_lightning.types import InputError

__all__ = ["check_keys", "given_keys", "misfit", "plain"]

_WRAPPERS = ("class_path", "init_args", "dict_kwargs")
COMMAND_LINE = "the command line"
_LARGEST = 2**53
"""Whole numbers from here on are no counts of anything."""


def plain(key: str) -> str:
    """A key without the ``init_args`` that it may be written with."""
    return key.replace(".init_args", "")


def given_keys(argv: list[str]) -> Iterator[tuple[str, Any, str]]:
    """Every key given by the config files and the options of a command line.

    Args:
        argv: Command line without the program.

    Yields:
        Key with dots, its value (mappings are walked), and where it was given.

    Raises:
        InputError: If a config file is missing or not a YAML mapping.
    """
    for number, word in enumerate(argv):
        if not word.startswith("--") and word != "-c":
            continue
        key, equals, value = word.removeprefix("--").partition("=")
        following = argv[number + 1] if number + 1 < len(argv) else ""
        given = value if equals else following
        if key in ("-c", "config"):
            yield from ((k, v, given) for k, v in _walk(read_mapping(given, "config file"), ""))
        else:
            key = key.rstrip("+")
            absent = not equals and (not following or following.startswith("--"))
            yield key, None if absent else given, COMMAND_LINE
            if not absent and given.startswith(("{", "[")):
                yield from ((k, v, COMMAND_LINE) for k, v in _walk(read_value(given, key), key))


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _walk(value, path)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _walk(value, f"{prefix}.{number}")


def check_keys(argv: list[str], groups: Mapping[str, type], scalars: Mapping[str, Any]) -> None:
    """Refuse keys that nothing accepts.

    Args:
        argv: Command line without the program.
        groups: Class behind each top-level key that has parts.
        scalars: Type of each top-level key without parts.

    Raises:
        InputError: If a key is unknown; it names the key's path, its origin and the nearest key.
            If an option stands before a config file that gives its key again.
    """
    given = list(given_keys(argv))
    _check_order(given)
    classes = {where: _classes(given, where) for _, _, where in given}
    for key, value, where in given:
        parts = key.split(".")
        if plain(key) in ("model.seed", "data.seed"):
            raise InputError(f"{plain(key)} cannot be set (in {where}): it is seed_everything.")
        if parts[0] not in groups:
            if parts[0] not in scalars:
                _refuse(key, parts[0], "", [*scalars, *groups], where)
            hint = scalars[parts[0]]
            null = _is_null(value, where) and not takes_null(hint)
            if hint is not None and (len(parts) > 1 or null or _is_wild(value, hint)):
                shown = "null" if value is None else _shown(value)
                raise InputError(f"{parts[0]} must be {words(hint)}, got {shown} (in {where}).")
            continue
        if parts[-1] == "help":
            continue
        if len(parts) == 1 and where != COMMAND_LINE and not isinstance(value, (Mapping, str)):
            accepted = ", ".join(_arguments(groups[key]) or ("class_path", "init_args"))
            raise InputError(
                f"{key} must be keys and values ({accepted}), got {value} (in {where})."
            )
        hint = _check_path(key, parts, groups[parts[0]], classes[where], where)
        if _is_wild(value, hint):
            raise InputError(
                f"{key} is {_shown(value)} (in {where}): numbers must be finite, whole ones below "
                "2^53."
            )
        if _is_null(value, where) and not takes_null(hint):
            wanted = "" if hint is None else f": it must be {words(hint)}"
            raise InputError(f"{key} must not be null (in {where}){wanted}.")


def _check_order(given: list[tuple[str, Any, str]]) -> None:
    """Refuse options whose value a later config file would replace."""
    before: set[str] = set()
    for key, value, where in given:
        if where == COMMAND_LINE:
            before.add(plain(key))
            continue
        # a name, of a class or a file, replaces all that stands below it
        below = f"{plain(key)}." if isinstance(value, str) else plain(key)
        for option in before:
            if option == plain(key) or (below.endswith(".") and option.startswith(below)):
                raise InputError(
                    f"--{option} stands before --config {where}, which sets it again: later words "
                    "win, so put options after --config."
                )


def _is_wild(value: Any, hint: Any) -> bool:
    """Whether a number, in words too, is NaN, infinite or too large to count with."""
    if isinstance(value, str):
        found = re.fullmatch(r"[-+]?\.?(nan|inf|infinity)", value.strip().lower())
        return found is not None and "number" in words(hint)
    return isinstance(value, (int, float)) and not (
        abs(value) < (_LARGEST if isinstance(value, int) else math.inf)
    )


def _shown(value: Any) -> str:
    """A value in a message; Python refuses to write out numbers of thousands of digits."""
    big = isinstance(value, int) and value.bit_length() > 1000
    return "a number of hundreds of digits" if big else f"{value}"


def _is_null(value: Any, where: str) -> bool:
    if where == COMMAND_LINE and isinstance(value, str):
        return value.strip().lower() in ("null", "~")
    return value is None and where != COMMAND_LINE


def misfit(argv: list[str], groups: Mapping[str, type], scalars: Mapping[str, Any]) -> str | None:
    """The first value that its key cannot take, in a sentence; ``None`` if all may fit.

    Args:
        argv: Command line without the program.
        groups: Class behind each top-level key that has parts.
        scalars: Type of each top-level key without parts.
    """
    given = list(given_keys(argv))
    for key, value, where in given:
        try:
            hint = _hint(key, given, where, groups, scalars)
        except InputError:
            continue
        if where == COMMAND_LINE and isinstance(value, str) and not fits(value, hint, _resolve):
            value = read_value(value, key)
        parts = key.split(".")
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
            continue  # a part of a config in a file of its own
        if not fits(value, hint, _resolve) and not (value is None and where == COMMAND_LINE):
            shown = one_line(repr(value))
            shown = shown if len(shown) < 100 else f"{shown[:100]} ..."
            path = ".".join(part for part in parts if part != "init_args")
            name = value.get("class_path") if isinstance(value, Mapping) else value
            if isinstance(name, str) and words(hint).startswith("the name") and not _resolve(name):
                return f"{path}: there is no class '{name}' (in {where}); see cm-fit --help."
            return f"{path} must be {words(hint)}, got {shown} (in {where})."
    return None


def _hint(
    key: str,
    given: list[tuple[str, Any, str]],
    where: str,
    groups: Mapping[str, type],
    scalars: Mapping[str, Any],
) -> Any:
    parts = key.split(".")
    if parts[0] in scalars or parts[0] not in groups or parts[-1] == "help":
        return scalars.get(key)
    return _check_path(key, parts, groups[parts[0]], _classes(given, where), where)


def _classes(given: list[tuple[str, Any, str]], where: str) -> dict[str, str]:
    """Class named for every key; in a file its own, as a later one may replace a list."""
    named: dict[str, dict[str, str]] = {}
    for key, value, origin in given:
        if isinstance(value, str):
            path = plain(key).removesuffix(".class_path")
            named.setdefault(origin, {})[path] = value
    last = {path: value for words in named.values() for path, value in words.items()}
    return last | named.get(where, {})


def _check_path(
    key: str, parts: list[str], cls: type | None, classes: Mapping[str, str], where: str
) -> Any:
    """Check every part of a key; returns the type of its value, ``None`` if that is not known."""
    path, hint = parts[0], cls
    for part in parts[1:]:
        if part in _WRAPPERS or part.isdigit():
            path = f"{path}.{part}"
            hint = {"class_path": str, "init_args": dict, "dict_kwargs": dict}.get(part)
            continue
        named = classes.get(plain(path))
        cls = _resolve(named) if named else cls
        if cls is None or inspect.isabstract(cls):
            return None  # the parser will say which class is missing
        accepted = _arguments(cls)
        if accepted is None:
            return None
        if part not in accepted:
            _refuse(key, part, f"{path}.", list(accepted), where, cls)
        path = f"{path}.{part}"
        hint, cls = accepted[part]
    return hint


def _arguments(cls: type) -> dict[str, tuple[Any, type | None]] | None:
    """Arguments of a class with their types and the class of those that have parts of their own."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    try:
        made = cls if dataclasses.is_dataclass(cls) else cls.__init__  # type: ignore[misc]
        hints = get_type_hints(made)
    except (NameError, TypeError):
        hints = {}
    found: dict[str, tuple[Any, type | None]] = {}
    for name in parameters:
        hint = hints.get(name)
        kinds = [h for h in (hint, *get_args(hint)) if isinstance(h, type)]
        found[name] = hint, next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    return found


def _resolve(name: str) -> type | None:
    """Class of a dotted path or of a short name known to the package."""
    if name.endswith((".yaml", ".yml", ".json")) or not re.fullmatch(r"\w+(\.\w+)*", name):
        return None  # a file with the config of a part, or the part itself as text
    if "." in name:
        check_class(name, "The config", CONFIG)
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError as error:
            if f"{module}.".startswith(f"{error.name}."):
                return None  # the parser says that there is no such class
            raise InputError(f"{module} cannot be imported: {one_line(error)}.") from error
        except Exception as error:  # of the user's own code
            raise InputError(f"{module} cannot be imported: {complaint(error)}.") from error
    else:
        parts = ("regimes", "networks", "objective", "data", "sampling", "ema", "evaluation")
        modules = [importlib.import_module(f"cm_lightning.{part}") for part in parts]
        found = next((getattr(m, name) for m in modules if hasattr(m, name)), None)
    return found if isinstance(found, type) else None


def _refuse(
    key: str, part: str, prefix: str, accepted: list[str], where: str, cls: type | None = None
) -> None:
    near = difflib.get_close_matches(part, accepted, n=1, cutoff=0.5)
    if near:
        hint = f"did you mean '{plain(prefix)}{near[0]}'?"
    else:
        hint = f"it accepts {', '.join(sorted(accepted))}."
    owner = "" if cls is None else f" of {cls.__name__}"
    raise InputError(f"Unknown key '{key}'{owner} (in {where}): {hint}")
