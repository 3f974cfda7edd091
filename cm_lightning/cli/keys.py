"""Check of the keys a user gave, with their full path and the nearest valid one.

The parser underneath would name only the last part of an unknown key, accept abbreviations inside
a class, and suggest nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml

from cm_lightning.cli.modules import check_module
from cm_lightning.types import InputError

__all__ = ["check_keys", "find_path", "given_keys"]

_WRAPPERS = ("class_path", "init_args", "dict_kwargs")


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
            yield from ((k, v, given) for k, v in _walk(_read(given), ""))
        else:
            absent = not equals and (not following or following.startswith("--"))
            yield key.rstrip("+"), None if absent else given, "the command line"


def _read(path: str) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no config file {path}.") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The config file {path} cannot be read: {error}.") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" (line {line + 1})"
        raise InputError(f"{path} is not valid YAML{where}.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path} is not a config: its content must be keys and values.")
    return content


def _walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{prefix}.{key}" if prefix else str(key)
            yield path, value
            yield from _walk(value, path)
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from _walk(value, f"{prefix}.{number}")


def check_keys(argv: list[str], groups: Mapping[str, type], scalars: list[str]) -> None:
    """Refuse keys that nothing accepts.

    Args:
        argv: Command line without the program.
        groups: Class behind each top-level key that has parts.
        scalars: Top-level keys without parts.

    Raises:
        InputError: If a key is unknown; it names the key's path, its origin and the nearest key.
    """
    given = list(given_keys(argv))
    named: dict[str, dict[str, str]] = {}  # by origin: a later file may replace a whole list
    for key, value, where in given:
        if isinstance(value, str):
            path = key.replace(".init_args", "").removesuffix(".class_path")
            named.setdefault(where, {})[path] = value
    last = {path: value for words in named.values() for path, value in words.items()}
    for key, _, where in given:
        parts = key.split(".")
        if parts[0] not in groups:
            if parts[0] not in scalars:
                _refuse(key, parts[0], "", [*scalars, *groups], where)
            continue
        if parts[-1] == "help":
            continue
        _check_path(key, parts, groups[parts[0]], last | named.get(where, {}), where)


def _check_path(
    key: str, parts: list[str], cls: type | None, classes: Mapping[str, str], where: str
) -> None:
    path = parts[0]
    for part in parts[1:]:
        if part in _WRAPPERS or part.isdigit():
            path = f"{path}.{part}"
            continue
        named = classes.get(path.replace(".init_args", ""))
        cls = _resolve(named) if named else cls
        if cls is None or inspect.isabstract(cls):
            return  # the parser will say which class is missing
        accepted = _arguments(cls)
        if accepted is None:
            return
        if part not in accepted:
            _refuse(key, part, f"{path}.", list(accepted), where, cls)
        path, cls = f"{path}.{part}", accepted[part]


def _arguments(cls: type) -> dict[str, type | None] | None:
    """Arguments of a class with the class of those that have parts of their own."""
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return None
    try:
        hints = get_type_hints(
            cls if dataclasses.is_dataclass(cls) else vars(cls).get("__init__", cls)
        )
    except (NameError, TypeError):
        hints = {}
    found: dict[str, type | None] = {}
    for name in parameters:
        hint = hints.get(name)
        kinds = [h for h in (hint, *get_args(hint)) if isinstance(h, type)]
        found[name] = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
    return found


def _resolve(name: str) -> type | None:
    """Class of a dotted path or of a short name known to the package."""
    if "/" in name or name.endswith((".yaml", ".yml", ".json")):
        return None  # a file with the config of a part
    if "." in name:
        check_module(name)
        module, _, attribute = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ImportError:
            return None
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
        hint = f"did you mean '{prefix.replace('.init_args', '')}{near[0]}'?"
    else:
        hint = f"it accepts {', '.join(sorted(accepted))}."
    owner = "" if cls is None else f" of {cls.__name__}"
    raise InputError(f"Unknown key '{key}'{owner} (in {where}): {hint}")


def find_path(argv: list[str], last: str, value: str) -> str:
    """Full path of the key whose last part and value the parser complained about.

    Args:
        argv: Command line without the program.
        last: Last part of the key.
        value: Its value as text.

    Returns:
        The full path, or ``last`` if it is not unique.
    """
    try:
        found = {
            key
            for key, given, _ in given_keys(argv)
            if key.split(".")[-1] == last and str(given) == value
        }
    except InputError:
        return last
    return found.pop().replace(".init_args", "") if len(found) == 1 else last
