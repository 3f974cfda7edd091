"""Errors as a line or two: what was given, what is allowed, where; exit code 2."""

from __future__ import annotations

import argparse
import math
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from cm_lightning.documents import one_line
from cm_lightning.modules import CONFIG, allow_modules, denied, refused
from cm_lightning.types import InputError

__all__ = [
    "CommandParser",
    "Parser",
    "about_input",
    "about_machine",
    "fail",
    "finite",
    "lacks_memory",
    "name_modules",
    "readable_errors",
    "whole",
]


LONGEST = 1000
"""Characters of a message; values of the user's may be of any length."""


def fail(command: str, message: str, code: int = 2) -> NoReturn:
    """Print ``<command>: error: <message>`` and leave."""
    text = " ".join("".join(c if c.isprintable() else " " for c in message).split())
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} ... {text[-LONGEST // 2 :]}"
    sys.stderr.write(f"{command}: error: {text}\n")
    sys.exit(code)


@contextmanager
def readable_errors(command: str) -> Iterator[None]:
    """Turn errors into a message: about the user's input with exit code 2, any other with 1.

    Those that nobody foresaw keep their traceback, with a sentence below it. After Ctrl-C the exit
    code is 130, that of a command which the signal ends.
    """
    try:
        yield
    except BrokenPipeError:  # whoever reads the output, as head, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        fail(command, "interrupted. Files that were written before are kept.", 128 + signal.SIGINT)
    except Exception as error:
        message = about_input(error) or about_machine(error)
        if message is None:
            traceback.print_exc()
            message = (
                f"an unexpected {type(error).__name__}: {error}. It is a mistake of the program; "
                "the lines above say where. Files that were written before are kept."
            )
            fail(command, message, 1)
        fail(command, message)


def about_machine(error: Exception) -> str | None:
    """The sentence about a file or memory that the machine refused, ``None`` for other errors."""
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename} cannot be read or written: {error.strerror or error}."
    if isinstance(error, torch.OutOfMemoryError):
        found = re.search(r"[Tt]ried to allocate [\d.]+ \w+", str(error))
        size = f" ({found[0]})" if found else ""
        return (
            f"The device has not enough memory for this{size}: take a smaller batch (--batch, "
            "where there is one) or network."
        )
    if lacks_memory(error):
        found = re.search(r"tried to allocate \d+ bytes|Unable to allocate [^.\n]+", str(error))
        return f"There is not enough memory for this{f': {found[0]}' if found else ''}."
    if isinstance(error, ValueError) and "null byte" in str(error):
        return "The name of a file holds a null character, which no name can have."
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether a device, or the machine, had too little memory."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def about_input(error: BaseException) -> str | None:
    """The sentence about the user's input in an error or its causes, ``None`` if there is none.

    The parser tries every type a value could have and wraps all failures into one error; if one of
    them is a sentence of this package, it says it all.
    """
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, InputError):
            return str(cause)
        cause = cause.__cause__ or cause.__context__
    return None


def whole(most: int = 10**7, least: int = 1) -> Callable[[str], int]:
    """Type of an option that is a whole number from ``least`` to ``most``."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = most + 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(
                f"a whole number from {least} to {most:,} is needed, not '{text[:50]}'"
            )
        return value

    return read


def finite(text: str) -> float:
    """Type of an option that is a number, and neither NaN nor infinite."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"a finite number is needed, not '{text[:50]}'")
    return value


def name_modules(names: list[str]) -> None:
    """Allow packages by name, those of the current folder too, which are found after all others.

    Raises:
        InputError: If one is no name of a package.
    """
    allow_modules(*names)
    if names and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())


class CommandParser(argparse.ArgumentParser):
    """Parser of a command without a config; its errors are one sentence."""

    def add_allow_modules(self) -> None:
        """Add the option for networks and features of other packages."""
        self.add_argument(
            "--allow_modules",
            metavar="NAMES",
            help="packages besides this one whose classes the files may name",
        )

    def parse_args(self, *args: Any, **options: Any) -> Any:
        """Parse, and allow the packages that were named."""
        found = super().parse_args(*args, **options)
        names = getattr(found, "allow_modules", None)
        try:
            name_modules(names.split(",") if names else [])
        except InputError as error:
            self.error(str(error))
        return found

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        fail(self.prog.split()[0], message)


class Parser(LightningArgumentParser):
    """Parser whose errors are a sentence instead of the usage of a thousand options."""

    def explain(self) -> str | None:
        """What is wrong with the values given, if that is known."""
        return None

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        ours = None if ex is None else about_input(ex)
        if path := denied(message):
            ours = str(refused(path, "The config", CONFIG))
        fail("cm-fit", ours or self.explain() or shorten(message))


def shorten(message: str) -> str:
    """Drop from a parser's message what says nothing.

    Args:
        message: The parser's message.
    """
    found = re.match(r'(?:Parser key "([^"]+)": *)?(.*)', message.strip(), re.DOTALL)
    assert found is not None
    for line in message.split("Subclass types expect")[0].splitlines():
        tried = line.strip().removeprefix("- ")
        if line.strip().startswith("- ") and not tried.startswith("Expected a"):
            return (f"{found[1]}: " if found[1] else "") + one_line(tried)[:400] + "."
    reason = re.split(r"Subtypes:|Subclass types expect|Given value", found[2])[0]
    reason = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", reason.replace("typing.", ""))
    return (f"{found[1]}: " if found[1] else "") + one_line(reason)[:400] + "."
