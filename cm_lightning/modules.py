"""Which classes a file may name: it is data, and naming a class must not run what it likes.

Configs, weights and studies come from others. Their ``class_path`` is a class of this package, in a
config of ``cm-fit`` also an optimizer of torch or a part of Lightning's trainer; anything else is
imported only if the user names its package. The rest of torch and Lightning is closed: both have
classes and functions that run code given as text.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from cm_lightning.types import InputError

__all__ = [
    "CONFIG",
    "allow_modules",
    "check_class",
    "check_class_paths",
    "denied",
    "only",
    "refused",
]

WEIGHTS = ("cm_lightning",)
"""Packages of classes in files of weights, data and evaluations."""

LIGHTNING = ("callbacks", "loggers", "strategies", "plugins", "profilers", "accelerators")
CONFIG = (
    "cm_lightning",
    "torch.optim",
    *(f"lightning.pytorch.{part}" for part in LIGHTNING),
    *(f"lightning.fabric.{part}" for part in ("strategies", "plugins", "accelerators")),
)
"""Those in a config of ``cm-fit``."""
CLOSED = (
    "lightning.pytorch.callbacks.lambda_function",
    *(
        f"cm_lightning.{part}"
        for part in ("bench", "cli", "documents", "files", "loggers", "modules")
    ),
)
"""Parts of them that call what they are given, or write where they are told."""
MAKERS = (
    "cm_lightning.regimes.base.radam",
    "cm_lightning.regimes.base.radam_cm",
    "cm_lightning.regimes.diffusion.adam",
)
"""The only functions that a file may name: the optimizers of the recipes."""

_allowed: list[str] = []


def allow_modules(*packages: str) -> None:
    """Let files name classes of these packages, besides this one's.

    Importing a package runs its code: name those that you trust. Each call replaces the one before.

    Args:
        packages: Names such as ``my_package`` or ``my_package.networks``.

    Raises:
        InputError: If one is no name of a package.
    """
    for name in packages:
        if not all(part.isidentifier() for part in name.split(".")):
            raise InputError(
                f"--allow_modules takes names of packages separated by commas, got '{name}'."
            )
    _allowed[:] = packages


def check_class(path: str, where: str, packages: tuple[str, ...] = WEIGHTS) -> None:
    """Check the dotted path of a class before anything of it is imported.

    Args:
        path: The path.
        where: The file it comes from, for messages.
        packages: Packages of its kind of file.

    Raises:
        InputError: If its package is not allowed, or not there.
    """
    own = _under(path, _allowed)
    if not own and (_under(path, CLOSED) or not _under(path, packages)):
        raise refused(path, where, packages)
    root = path.split(".")[0]
    if own and root not in sys.modules and importlib.util.find_spec(root) is None:
        raise InputError(
            f"{where} names the class '{path}', and {root} is neither installed nor in the current "
            "folder."
        )


def _under(path: str, names: Iterable[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def refused(path: str, where: str, packages: tuple[str, ...] = WEIGHTS) -> InputError:
    """Why a class is not taken."""
    root = path.split(".")[0]
    known = [name for name in packages if not name.startswith("lightning.")] + _allowed
    if packages == CONFIG:
        known.append(f"Lightning's {', '.join(LIGHTNING)}")
    text = f"{where} names the class '{path}': classes come from {', '.join(known)}"
    if root in ("cm_lightning", "torch", "lightning"):
        return InputError(
            f"{text} alone, as other parts of these, and functions, can run what a file holds."
        )
    return InputError(
        f"{text} alone, because importing a package runs its code. If you trust this one, add "
        f"--allow_modules {root} to the command line (in Python call "
        "cm_lightning.weights.allow_modules)."
    )


def check_class_paths(node: Any, where: str) -> None:
    """Check that a file names classes of this package, and of those allowed, alone.

    Args:
        node: Any part of its content.
        where: The file, for messages.

    Raises:
        InputError: If it names another one.
    """
    if isinstance(node, Mapping):
        path = node.get("class_path")
        if isinstance(path, str) and "." in path:
            check_class(path, where)
        for value in node.values():
            check_class_paths(value, where)
    elif isinstance(node, list):
        for value in node:
            check_class_paths(value, where)


@contextmanager
def only(packages: tuple[str, ...] = WEIGHTS) -> Iterator[None]:
    """Within the context, jsonargparse imports of these packages and those allowed alone.

    It reads texts as YAML and follows attributes of modules, which :func:`check_class_paths` does
    not see; it looks at where a thing is defined, too. Untyped arguments are never made into
    objects, and functions, which it would call with arguments of the file, are none of the classes
    that a file may name, but for :data:`MAKERS`. Its settings are global: they are put back.

    Args:
        packages: Packages of the kind of file that is read.
    """
    from jsonargparse import _actions, _common, _typehints, set_parsing_settings

    common: Any = _common  # pyproject.toml names the version that has all this
    parsers: tuple[Any, Any] = _actions, _typehints
    found_by, before = parsers[0].import_object, dict(common.parsing_settings)

    def import_class(name: str, check_path: bool = True) -> Any:
        found = found_by(name, check_path)
        place = f"{getattr(found, '__module__', '')}.{getattr(found, '__qualname__', '')}"
        made = inspect.isclass(found) or place in MAKERS or _under(place, _allowed)
        if check_path and not made:
            raise common.ImportDenied(f"Importing '{name}' is not allowed: it is no class.")
        return found

    try:
        for parser in parsers:
            parser.import_object = import_class
        set_parsing_settings(
            import_path_denylist=["*", *CLOSED],
            import_path_allowlist=[*packages, *_allowed],
            instantiate_subclass_spec_in_any=False,
        )
        yield
    finally:
        for parser in parsers:
            parser.import_object = found_by
        common.parsing_settings.update(before)


def denied(message: str) -> str | None:
    """Path of the class that jsonargparse refused to import, by its message."""
    found = re.search(r"Importing '([^']+)' is not allowed", message)
    return found[1] if found else None
