"""Types of arguments: whether a value fits one, and what it takes in words."""

from __future__ import annotations

import collections.abc
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["fits", "takes_null", "words"]

_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "null",
}


def takes_null(hint: Any) -> bool:
    """Whether a type includes ``None``, as far as it is known."""
    return hint in (None, Any, type(None)) or (_is_union(hint) and any(map(takes_null, _of(hint))))


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _of(hint: Any) -> tuple[Any, ...]:
    return get_args(hint)


def fits(value: Any, hint: Any, resolve: Callable[[str], type | None]) -> bool:
    """Whether a value of a YAML file may be of a type; unknown types take everything.

    Args:
        value: The value.
        hint: The type, ``None`` if it is not known.
        resolve: Class behind a name, ``None`` if there is none.
    """
    origin = get_origin(hint)
    if hint in (None, Any):
        return True
    if _is_union(hint):
        return any(fits(value, kind, resolve) for kind in _of(hint))
    if origin is Literal:
        return value in _of(hint)
    if hint is float:
        return not isinstance(value, bool) and _is_number(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in _PLAIN:
        return isinstance(value, hint)
    if origin in (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable):
        kinds = [kind for kind in _of(hint) if kind is not ...]
        if not isinstance(value, (list, tuple)):
            return False
        if origin is tuple and ... not in _of(hint):
            pairs = zip(value, kinds, strict=False)
            return len(value) == len(kinds) and all(fits(v, k, resolve) for v, k in pairs)
        return all(fits(entry, kinds[0], resolve) for entry in value) if kinds else True
    if origin is collections.abc.Callable:
        return isinstance(value, (str, Mapping))
    return _fits_class(value, hint, resolve) if isinstance(hint, type) else True


def _is_number(value: Any) -> bool:
    try:
        float(value)  # 1e-3 is a text in YAML and a number to everybody
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _fits_class(value: Any, hint: type, resolve: Callable[[str], type | None]) -> bool:
    if hint.__module__ == "builtins":
        return isinstance(value, hint)
    if isinstance(value, Mapping):
        if not isinstance(value.get("init_args", {}), Mapping):
            return False
        value = value.get("class_path", hint.__name__)
        if value == hint.__name__:
            return True
    if not isinstance(value, str):
        return False
    found = resolve(value)
    return found is not None and issubclass(found, hint)


def words(hint: Any) -> str:
    """What a type takes."""
    if hint in _PLAIN:
        return _PLAIN[hint]
    if hint is dict:
        return "keys and values"
    if _is_union(hint):
        return " or ".join(dict.fromkeys(words(kind) for kind in _of(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, _of(hint)))
    if get_origin(hint) in (list, set, tuple, collections.abc.Sequence):
        kinds: Sequence[Any] = [kind for kind in _of(hint) if kind is not ...]
        return "a list" + (f", each {words(kinds[0])}" if kinds else "")
    if isinstance(hint, type) and hint.__module__ != "builtins":
        article = "an" if hint.__name__[0] in "AEIO" else "a"
        return f"the name of {article} {hint.__name__} class, or its class_path and init_args"
    return "the name of a class" if get_origin(hint) is collections.abc.Callable else str(hint)
