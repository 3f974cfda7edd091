"""The property: whatever a user gives, a command ends in one sentence and changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, settings

ROOT = Path(__file__).parents[2]
SECONDS = 60
MEMORY = 500 << 20
MACHINE = 6 << 30
"""Address space a command may take on top, so that a claim of terabytes fails at once."""


def examples(fast: int) -> Any:
    """Settings of a test with this many examples; CM_FUZZ multiplies them."""
    return settings(
        max_examples=round(fast * float(os.environ.get("CM_FUZZ", "1"))),
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=True,
    )


class Hang(BaseException):
    """A command took too long."""


class Done(NamedTuple):
    code: int
    out: str
    err: str


def _alarm(number: int, frame: Any) -> None:
    raise Hang(f"no end within {SECONDS} s")


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    text = Path("/proc/self/status").read_text()
    return int(re.search(rf"^{key}:\s*(\d+) kB", text, re.MULTILINE)[1]) << 10


@contextlib.contextmanager
def limits() -> Iterator[None]:
    """An end to hanging and to memory."""
    old = signal.signal(signal.SIGALRM, _alarm)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + MACHINE, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGALRM, old)


def call(name: str, *arguments: object) -> Done:
    """Run a command in this process, as from a shell."""
    from cm_lightning.cli import compare, data, evaluate, fit, sample, study, weights

    programs = {
        "cm-compare": compare,
        "cm-data": data,
        "cm-eval": evaluate,
        "cm-fit": fit,
        "cm-sample": sample,
        "cm-study": study,
        "cm-weights": weights,
    }
    argv, out, err, code = sys.argv, io.StringIO(), io.StringIO(), 0
    sys.argv = [name, *map(str, arguments)]
    try:
        with limits(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            programs[name].main()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        code = -1
        err.write(traceback.format_exc())
    finally:
        sys.argv = argv
    return Done(code, out.getvalue(), err.getvalue())


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder with its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "folder"
    return found


@contextlib.contextmanager
def workplace(*sources: Path) -> Iterator[Path]:
    """A new folder with copies of files and folders, the current one while it lasts."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name) / "here"  # so that .. is a place of its own, too
        folder.mkdir()
        for source in sources:
            if source.is_dir():
                shutil.copytree(source, folder / source.name)
            else:
                shutil.copyfile(source, folder / source.name)
        os.chdir(folder)
        try:
            yield folder
        finally:
            os.chdir(here)


def ends_well(
    folder: Path, name: str, *arguments: object, outputs: tuple[str, ...] | None = ("out",)
) -> Done:
    """Run a command in a workplace and check the property.

    Args:
        folder: The workplace.
        name: The command.
        arguments: Its arguments.
        outputs: What may change in it when the command succeeds; ``None``: anything may be added.
    """
    before = snapshot(folder)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = memory("VmRSS")
    done = call(name, *arguments)
    peak = memory("VmHWM") - start
    what = f"{name} {' '.join(map(repr, map(str, arguments)))}"
    verdict(what, done, peak, before, folder, outputs)
    return done


def verdict(
    key: str,
    done: Done,
    peak: int,
    before: dict[str, str],
    folder: Path,
    outputs: tuple[str, ...] | None,
) -> None:
    """Whether a command, given as it was written, ended well."""
    name, after = key.split()[0], snapshot(folder)
    what = f"{key}\n{done.err[-6000:]}"
    assert done.code in (0, 1, 2), what
    if done.code:
        lines = done.err.splitlines()
        assert len(lines) == 1, what
        assert re.fullmatch(rf"{name}: error: \S.*", lines[0]), what
        assert len(lines[0]) < 1200, what
        assert "error: an unexpected" not in lines[0], what
    elif outputs is None:
        after = {path: after.get(path, "") for path in before}
    else:
        for tree in (before, after):
            for path in [p for p in tree if p.split("/")[0] in outputs]:
                del tree[path]
    assert "Traceback" not in done.err + done.out, what
    changed = {k for k in before.keys() | after.keys() if before.get(k) != after.get(k)}
    if "the rest is kept" in done.err:  # cm-data convert continues there
        changed = {path for path in changed if not path.startswith(".out.partial")}
    assert not changed, f"{sorted(changed)} changed by {what}"
    assert not (folder / "canary").exists(), what
    assert peak < MEMORY, f"{peak >> 20} MB for {what}"


def refused(folder: Path, name: str, *arguments: object) -> str:
    """As :func:`ends_well` for what cannot be accepted; returns the sentence."""
    done = ends_well(folder, name, *arguments)
    assert done.code in (1, 2), done.out
    return done.err
