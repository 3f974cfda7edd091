"""The command-line programs, as in the tests of the command line."""

from tests.cli.conftest import fit, program, teacher

__all__ = ["fit", "program", "teacher"]
