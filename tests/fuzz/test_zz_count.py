"""How many malformed inputs there are, many more of them, and commands as processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harness import ROOT, snapshot, workplace

HERE = Path(__file__).parent


@pytest.mark.slow
def test_there_are_at_least_200_malformed_inputs():
    """Cases of the fast part; those that are generated try many inputs each."""
    words = ["--collect-only", "-q", "-m", "not slow", "-p", "no:xdist", str(HERE)]
    command = [sys.executable, "-m", "pytest", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("::") >= 200


@pytest.mark.slow
def test_many_more():
    """The same tests with eight times as many examples."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", str(HERE)]
    done = subprocess.run(command, env=os.environ | {"CM_FUZZ": "8"}, cwd=ROOT, check=False)
    assert done.returncode == 0


PROCESSES = {
    "fit": ["cli.fit", "--config", "x.yaml", "--check"],
    "a class": ["cli.fit", "--config", "good.yaml", "--check", "--model.optimizer.lr", "-1"],
    "sample": ["cli.sample", "weights", "--n", "2", "--out", "out", "--labels", "99"],
    "sample worse": ["cli.sample", "weights", "--out", "out", "--guidance", "2", "--worse", "x"],
    "eval": ["cli.evaluate", "weights", "--config", "good.yaml", "--n", "1", "--out", "out"],
    "data": ["cli.data", "stats", "store", "--features", "Nothing", "--out", "out"],
    "weights": ["cli.weights", "export", "weights", "--ema", "none", "--out", "out"],
    "compare": ["cli.compare", "weights", "--out", "out"],
    "study": ["cli.study", "x.yaml", "--out", "out"],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PROCESSES)
def test_a_process_of_its_own_says_one_line(case, run, weights, store):
    """Warnings that a test process would hide are no part of a message."""
    module, *words = PROCESSES[case]
    with workplace(weights, store, run / "config.yaml") as folder:
        (folder / "config.yaml").rename(folder / "good.yaml")
        (folder / "x.yaml").write_text("model: {class_path: ECT, init_args: {total_kimg: []}}")
        before = snapshot(folder)
        command = [sys.executable, "-m", f"cm_lightning.{module}", *words]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert "error: " in done.stderr
        assert snapshot(folder) == before
