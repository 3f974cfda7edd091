"""Programs of the package, started from a process that has imported what they need.

Importing torch and Lightning takes seconds, and a study starts hundreds of programs. A launcher
imports once and forks itself for each of them; as it starts no threads and asks for no GPU, what it
forks is a process like any other, with devices, signals and an exit code of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from cm_lightning.types import InputError

__all__ = ["Launcher"]

IMPORTED = (
    "cm_lightning.callbacks",
    "cm_lightning.cli.evaluate_samples",
    "cm_lightning.cli.fit_check",
    "cm_lightning.cli.fit_run",
    "cm_lightning.regimes",
)
"""What ``cm-fit`` and ``cm-eval`` import, but for themselves: they run as ``__main__``."""

STOPPING = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Signals that end a program; its launcher lives on to tell how it ended."""


class Launcher:
    """Runs programs of the package one after the other, each in a process of its own.

    Args:
        environment: Environment of the programs.

    Raises:
        InputError: If it cannot begin.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-P", "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            process_group=0,  # Ctrl-C reaches programs through the study alone
        )
        self._read()

    def start(self, words: list[str], log: Path) -> int:
        """Start a program, to be waited for before the next one; returns its process id.

        Args:
            words: Name of the module, then the words of its command line.
            log: File to which its output and errors are appended.

        Raises:
            InputError: If no process can be started.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # told by what cannot be read then
            self._process.stdin.write(json.dumps([str(log), *words]) + "\n")
            self._process.stdin.flush()
        return self._read()

    def wait(self) -> int:
        """Exit code of the program once it has ended, minus the signal that ended it."""
        return self._read()

    def close(self) -> None:
        """Let the launcher end."""
        self._process.communicate()

    def _read(self) -> int:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise InputError("The process that starts the runs has ended; call the study again.")
        return int(line)


def main() -> None:
    """Fork for every line of the input, and run what it names."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    from cm_lightning.callbacks.run_record import git_state, versions

    for name in IMPORTED:
        importlib.import_module(name)
    for known in (git_state, versions):  # of what was imported, whatever lies there later
        known()
    print(0, flush=True)
    for line in sys.stdin:
        log, module, *words = json.loads(line)
        process = os.fork()
        if process == 0:
            _become(module, words, log)
            return
        print(process, flush=True)
        _, status = os.waitpid(process, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(module: str, words: list[str], log: str) -> None:
    """Run a module as ``python -m`` does."""
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # errors come last
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
