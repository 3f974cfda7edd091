"""YAML and JSON files of users: read whole or refused in one sentence, and objects made of them."""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Mapping
from inspect import isabstract
from pathlib import Path
from typing import Any

import yaml

from cm_lightning.modules import check_class_paths, denied, only, refused
from cm_lightning.types import InputError

__all__ = [
    "build",
    "check_form",
    "complaint",
    "one_line",
    "printable",
    "read_mapping",
    "read_value",
]

_LARGEST = 64 << 20
"""Bytes of a document."""
_SIXTIES = re.compile(r"(\d+:){32}")
"""Numbers of base 60, which YAML has, take a time that grows as the square of their length."""
_ENTRIES, _DEPTH = 2_000_000, 64
"""Values and levels of a document: anchors can make a short file endless."""


def printable(text: str) -> str:
    """A text without what a terminal would obey instead of showing it; lines stay lines."""
    return "".join(c for c in text if c.isprintable() or c == "\n")


def one_line(text: object) -> str:
    """A message on one line, without its full stop."""
    return " ".join(str(text).split()).rstrip(".")


def complaint(error: BaseException) -> str:
    """Kind, place and message of an error that nobody foresaw, on one line."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" in {Path(frames[-1].filename).name}, line {frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}{place}: {one_line(error)[:400]}".removesuffix(": ")


class _DoubledError(Exception):
    """A key is given twice."""


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice, where YAML's loader would take the last one."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise _DoubledError(f"gives the key '{key.value}' twice (line {line})")
                seen.add(key.value)
        return node


def read_mapping(path: str | Path, what: str = "file") -> dict[str, Any]:
    """Read a file of keys and values, ``.json`` as JSON and others as YAML.

    Args:
        path: The file.
        what: What it is to the user, for messages.

    Raises:
        InputError: If it is missing, unreadable, no YAML or JSON, too large, or not a mapping.
    """
    path = Path(path)
    kind = "JSON" if path.suffix == ".json" else "YAML"
    try:
        if path.stat().st_size > _LARGEST:
            raise InputError(f"The {what} {path} is larger than {_LARGEST >> 20} MiB.")
        if not path.is_file():
            raise InputError(f"The {what} {path} cannot be read: it is a folder or a device.")
        text = path.read_text(encoding="utf-8")
        if kind == "YAML" and _SIXTIES.search(text):
            raise InputError(f"The {what} {path} holds a number of base 60 without end.")
    except FileNotFoundError as error:
        raise InputError(f"There is no {what} {path}.") from error
    except (OSError, ValueError) as error:  # no UTF-8, or a name no file can have
        raise InputError(f"The {what} {path} cannot be read: {one_line(error)}.") from error
    try:
        content = json.loads(text) if kind == "JSON" else yaml.load(text, _Loader)  # noqa: S506
    except _DoubledError as error:
        raise InputError(f"The {what} {path} {error}.") from error
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f" (line {line + 1})"
        raise InputError(f"The {what} {path} is not valid YAML{where}.") from error
    except Exception as error:  # values that look like dates or numbers and are none; deep nesting
        reason = one_line(error) or type(error).__name__
        raise InputError(f"The {what} {path} is not valid {kind}: {reason}.") from error
    _check_size(content, f"The {what} {path}")
    if not isinstance(content, dict):
        found = _NAMES.get(type(content), f"a {type(content).__name__}")
        raise InputError(f"{path} is not a {what}: it must hold keys and values, not {found}.")
    for key in content:
        if not isinstance(key, str):
            raise InputError(f"The {what} {path} has the key {key!r}; keys are texts.")
    return content


def read_value(text: str, where: str) -> Any:
    """The value of an option that may be YAML; what is none is a text.

    Raises:
        InputError: If anchors make it endless, or it is nested too deeply.
    """
    try:
        content = yaml.safe_load(text)
    except RecursionError as error:
        raise InputError(f"{where} is nested too deeply.") from error
    except Exception:  # dates and numbers that are none, too
        return text
    _check_size(content, where)
    return content


def _check_size(content: Any, where: str) -> None:
    todo, seen = [(content, 0)], 0
    while todo:
        node, depth = todo.pop()
        seen += 1
        if depth > _DEPTH or seen > _ENTRIES:
            raise InputError(
                f"{where} holds more than {_ENTRIES:,} values or {_DEPTH} levels, or an anchor "
                "that contains itself."
            )
        if isinstance(node, (dict, list, set, tuple)):
            inner = node.values() if isinstance(node, dict) else node
            todo.extend((value, depth + 1) for value in inner)


def check_form(value: Any, form: Any, where: str, key: str = "") -> None:
    """Check the types inside a document.

    Args:
        value: What was read.
        form: A type (``float`` takes every number but NaN and infinity), a tuple of types, a list
            of one form for every entry, or a mapping: forms by key, optional and nullable with
            ``?`` at the end, ``...`` for all other keys.
        where: Where it comes from, for messages.
        key: Path of the value inside it.

    Raises:
        InputError: If something is missing or of another type; it names the key.
    """
    if isinstance(form, dict):
        _check_type(value, dict, where, key)
        named = {name.removesuffix("?") for name in form if name is not ...}
        for name, inner in form.items():
            if name is ...:
                for other in value.keys() - named:
                    if not isinstance(other, str):
                        raise InputError(f"{where}: the key {other!r} of '{key}' must be a text.")
                    check_form(value[other], inner, where, f"{key}.{other}".strip("."))
                continue
            plain = name.removesuffix("?")
            if value.get(plain) is None and name.endswith("?"):
                continue
            path = f"{key}.{plain}".strip(".")
            if plain not in value:
                raise InputError(f"{where} lacks '{path}'.")
            check_form(value[plain], inner, where, path)
    elif isinstance(form, list):
        _check_type(value, list, where, key)
        for number, entry in enumerate(value):
            check_form(entry, form[0], where, f"{key}.{number}")
    else:
        _check_type(value, form, where, key)


def _check_type(value: Any, form: Any, where: str, key: str) -> None:
    allowed = _tuple(form)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and float in allowed and abs(value) < 1e300:
        return
    if isinstance(value, bool) and bool not in allowed:
        allowed = ()
    if not isinstance(value, tuple(kind for kind in allowed if kind is not float)):
        wanted = " or ".join(_NAMES.get(kind, kind.__name__) for kind in _tuple(form))
        what = f"'{key}' of {where}" if key else where
        raise InputError(f"{what} must be {wanted}, got {one_line(repr(value))[:60]}.")


def _tuple(form: Any) -> tuple[type, ...]:
    return form if isinstance(form, tuple) else (form,)


_NAMES = {
    type(None): "null",
    list: "a list",
    str: "a text",
    dict: "keys and values",
    float: "a finite number",
    int: "a whole number",
    bool: "true or false",
}


def build(types: Mapping[str, Any], content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Make objects as a config describes them.

    Args:
        types: Type of every key; a class given as ``type`` is made of its arguments.
        content: Their descriptions, a key may be left out.
        where: Where they come from, for messages.

    Raises:
        InputError: If it names a class of another package, if a description does not fit its type,
            or if its class refuses its arguments.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    check_class_paths(content, where)
    parser = ArgumentParser(exit_on_error=False)
    for key, kind in types.items():
        if isinstance(kind, type) and kind is not str and not isabstract(kind):
            parser.add_class_arguments(kind, key)
        else:
            parser.add_argument(f"--{key}", type=kind)
    for key in types.keys() & content.keys():
        if content[key] is None:
            raise InputError(f"{where}: {key} must not be null.")
    try:
        with only():
            built = parser.instantiate(parser.parse_object(dict(content)))
    except InputError:
        raise
    except ArgumentError as error:
        if path := denied(str(error)):
            raise refused(path, where) from error
        reason = one_line(str(error).split("Subclass types expect")[0])[:400]
        raise InputError(f"{where} does not fit: {reason}.") from error
    except Exception as error:  # the classes' own complaints
        raise InputError(f"{where} describes what cannot be made: {complaint(error)}.") from error
    return {key: built.get(key) for key in types}
