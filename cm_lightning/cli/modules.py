"""Which packages a config may take classes from: it is data and must not run what it likes."""

from __future__ import annotations

import os
import sys

from jsonargparse import set_parsing_settings

from cm_lightning import documents
from cm_lightning.types import InputError

__all__ = ["MODULES", "allow_modules", "check_module", "name_modules", "refusal"]

MODULES = ("cm_lightning", "torch", "lightning", "torchmetrics")
"""Packages that are always allowed."""

_allowed: list[str] = list(MODULES)


def allow_modules(argv: list[str]) -> None:
    """Let the parser import these packages alone, and those that ``--allow_modules`` names.

    The option counts on the command line alone: a config cannot allow itself anything.

    Args:
        argv: Command line without the program.

    Raises:
        InputError: If the option names something that is no package.
    """
    found: list[str] = []
    for number, word in enumerate(argv):
        key, equals, value = word.partition("=")
        if key == "--allow_modules":
            value = value if equals else "".join(argv[number + 1 : number + 2])
            found += value.split(",")
    name_modules(found)
    _allowed[:] = [*MODULES, *found]
    set_parsing_settings(import_path_denylist=["*"], import_path_allowlist=list(_allowed))


def name_modules(names: list[str]) -> None:
    """Allow packages by name, those of the current folder too, which are found after all others.

    Raises:
        InputError: If one is no name of a package.
    """
    documents.allow_modules(*names)
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


def check_module(path: str) -> None:
    """Check the dotted path of a class before anything of it is imported.

    Raises:
        InputError: If its package is not allowed.
    """
    if not any(path == name or path.startswith(f"{name}.") for name in _allowed):
        raise InputError(refusal(path))


def refusal(path: str) -> str:
    """Why a class is not taken."""
    root = path.split(".")[0]
    return (
        f"The config names '{path}': classes come from {', '.join(_allowed)} alone, because "
        "importing a package runs its code. If you trust this one, add --allow_modules "
        f"{root} to the command line."
    )
