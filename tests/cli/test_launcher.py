"""Programs started from a process that has imported what they need."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from cm_lightning.cli.launcher import IMPORTED, Launcher
from cm_lightning.types import InputError

PROGRAM = """
import atexit, json, os, sys, time

atexit.register(print, "bye")
print(json.dumps({
    "words": sys.argv[1:],
    "name": __spec__.name,
    "main": sys.modules["__main__"].__spec__.name,
    "input": sys.stdin.read(),
    "group": os.getpgid(0) - os.getpid(),
    "threads": os.environ.get("OMP_NUM_THREADS"),
    "torch": "torch" in sys.modules,
}))
if "wait" in sys.argv:
    time.sleep(60)
if __name__ == "__main__":
    sys.exit(sys.argv[1])
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("programs")
    (folder / "some_program.py").write_text(PROGRAM)
    return folder


@pytest.fixture(scope="module")
def launcher(place):
    environment = os.environ | {"PYTHONPATH": str(place), "OMP_NUM_THREADS": "3"}
    found = Launcher(environment)
    yield found
    found.close()
    assert found._process.returncode == 0


def wait_for_text(log):
    deadline = time.monotonic() + 60
    while not (log.is_file() and log.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_program_runs_as_with_python_m(launcher, tmp_path):
    log = tmp_path / "log"
    log.write_text("before\n")
    process = launcher.start(["some_program", "no: reason", "ü"], log)
    assert launcher.wait() == 1
    assert process > 0
    before, said, reason, bye = log.read_text().splitlines()
    assert (before, reason, bye) == ("before", "no: reason", "bye")
    assert json.loads(said) == {
        "words": ["no: reason", "ü"],
        "name": "some_program",
        "main": "some_program",
        "input": "",
        "group": 0,
        "threads": "3",
        "torch": True,
    }
    launcher.start(["no_program"], tmp_path / "second")
    assert launcher.wait() == 1
    assert "No module named no_program" in (tmp_path / "second").read_text()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_signals_end_the_program_and_not_its_launcher(name, launcher, tmp_path):
    number = getattr(signal, name)
    process = launcher.start(["some_program", "wait"], tmp_path / "log")
    os.kill(launcher._process.pid, number)
    wait_for_text(tmp_path / "log")
    os.kill(process, number)
    assert launcher.wait() in (-number, 1, 130)
    launcher.start(["some_program"], tmp_path / "next")
    assert launcher.wait() == 1  # no first word


def test_a_launcher_that_was_killed(place, tmp_path):
    found = Launcher(os.environ)
    found._process.kill()
    found._process.wait()
    with pytest.raises(InputError, match="call the study again"):
        found.start(["some_program"], tmp_path / "log")
    found.close()


def test_what_is_imported_can_be_forked():
    """One thread (but those of OpenBLAS, which forks well), no GPU, not the programs themselves."""
    code = f"""
import importlib, os, sys
import torch
torch._C._cuda_getDeviceCount = torch._C._cuda_init = lambda: sys.exit("a GPU was asked for")
for name in {IMPORTED!r}:
    importlib.import_module(name)
print(len(os.listdir("/proc/self/task")), torch.cuda.is_initialized())
print("cm_lightning.cli.fit" in sys.modules, "cm_lightning.cli.evaluate" in sys.modules)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "False", "False", "False"]
