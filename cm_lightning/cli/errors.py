"""Errors as a line or two: what was given, what is allowed, where; exit code 2."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser

from cm_lightning.cli.keys import find_path
from cm_lightning.cli.modules import refusal
from cm_lightning.types import InputError

__all__ = ["CommandParser", "Parser", "fail", "readable_errors"]


def fail(command: str, message: str, code: int = 2) -> NoReturn:
    """Print ``<command>: error: <message>`` and leave."""
    sys.stderr.write(f"{command}: error: {message}\n")
    sys.exit(code)


@contextmanager
def readable_errors(command: str) -> Iterator[None]:
    """Turn errors about the user's input into a message and exit code 2; others pass through."""
    try:
        yield
    except (ValueError, MisconfigurationException) as error:
        message = about_input(error)
        if message is None:
            raise
        fail(command, message)


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
    if "Subtypes:" in str(error):
        for line in str(error).splitlines():
            reason = line.strip().removeprefix("- ")
            if line.strip().startswith("- ") and not reason.startswith("Expected a"):
                return reason
    return None


class CommandParser(argparse.ArgumentParser):
    """Parser of a command without a config; its errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        fail(self.prog.split()[0], message)


class Parser(LightningArgumentParser):
    """Parser whose errors are a sentence instead of the usage of a thousand options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong and exit with code 2."""
        ours = None if ex is None else about_input(ex)
        if denied := re.search(r"Importing '([^']+)' is not allowed", message):
            ours = refusal(denied[1])
        fail("cm-fit", ours or shorten(message, sys.argv[1:]))


def shorten(message: str, argv: list[str]) -> str:
    """Put the full path of the key into a parser's message and drop what says nothing.

    Args:
        message: The parser's message.
        argv: Command line without the program.
    """
    message = message.strip()
    match = re.match(
        r'Parser key "(?P<key>[^"]+)":\s*Expected an? (?P<type>.+?)\.? Got value: (?P<value>.*)',
        message,
        re.DOTALL,
    )
    if match:
        value = match["value"].strip()
        kind = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", match["type"]).replace("typing.", "")
        return f"{find_path(argv, match['key'], value)} must be of type {kind}, got '{value}'."
    match = re.match(
        r'Parser key "(?P<key>[^"]+)":.*import path string: (?P<value>\S+)', message, re.DOTALL
    )
    if match:
        path = find_path(argv, match["key"], match["value"])
        return f"{path}: there is no class '{match['value']}'; see cm-fit --help."
    reasons = [line.strip() for line in message.splitlines() if line.strip()]
    return " ".join(reasons)[:400]
