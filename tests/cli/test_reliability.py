"""Kills, signals, full disks, damaged files and second processes: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from cm_lightning.files import is_intact
from tests.cli.conftest import DIGITS, ROOT, TINY
from tests.cli.test_fit import assert_same, load, rows

SAVES = ["--checkpoints.every_kimg", "0.128", "--checkpoints.keep", "3"]


def final(run):
    return load(run / "checkpoints" / "nimg000000000640.ckpt")


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run that nothing happened to."""
    from cm_lightning.cli import fit

    run = tmp_path_factory.mktemp("straight") / "run"
    patch = pytest.MonkeyPatch()
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", str(run), *SAVES]
    patch.setattr(sys, "argv", ["cm-fit", *words])
    patch.setenv("CM_HOME", str(tmp_path_factory.mktemp("home")))
    fit.main()
    patch.undo()
    return run


def assert_equal_runs(run, straight):
    a, b = final(run), final(straight)
    for key in ("state_dict", "optimizer_states", "callbacks", "cm_lightning"):
        assert_same(a[key], b[key], key)
    assert rows(run) == rows(straight)


def start(run, tmp_path, *words):
    """cm-fit in a process of its own."""
    command = [sys.executable, "-m", "cm_lightning.cli.fit", "--config", DIGITS, "--config", TINY]
    environment = os.environ | {"CM_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*command, "--run_dir", str(run), *SAVES, *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process):
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_torn_checkpoint_falls_back_to_the_one_before(fit, straight, tmp_path):
    run = tmp_path / "run"
    assert fit(run, *SAVES).code == 0
    newest, before = sorted((run / "checkpoints").iterdir(), reverse=True)[:2]
    with zipfile.ZipFile(newest) as archive:
        part = max(archive.infolist(), key=lambda info: info.file_size)
    data = bytearray(newest.read_bytes())
    names = sum(struct.unpack("<HH", data[part.header_offset + 26 : part.header_offset + 30]))
    data[part.header_offset + 30 + names + part.file_size // 2] ^= 1  # one bit of its content
    newest.write_bytes(data)
    assert not is_intact(newest)
    done = fit(run, *SAVES)
    assert done.code == 0, done.err
    assert f"{newest} cannot be read, it is damaged: continuing from {before}" in done.out
    assert is_intact(newest)
    assert_equal_runs(run, straight)


def test_damaged_checkpoints_alone_are_no_fresh_start(fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run, *SAVES).code == 0
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:-100])
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    done = fit(run, *SAVES)
    assert done.code == 2
    assert "Every checkpoint of" in done.err
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    "name",
    [*(pytest.param(name, marks=pytest.mark.slow) for name in ("SIGINT", "SIGUSR1")), "SIGTERM"],
)
def test_a_signal_writes_a_checkpoint_and_the_run_continues(fit, straight, tmp_path, name):
    run = tmp_path / "run"
    process = start(run, tmp_path)
    wait_for(lambda: list((run / "checkpoints").glob("nimg*.ckpt")), process)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75, (out, err)
    assert f"Stopped by {name} at" in err
    assert "Traceback" not in err
    newest = sorted((run / "checkpoints").glob("nimg*.ckpt"))[-1]
    nimg = load(newest)["cm_lightning"]["nimg"]
    assert f"{name} at {nimg / 1000:g} kimg" in err
    (begun,) = json.loads((run / "run.json").read_text())["starts"]
    assert begun["seconds"] > 0  # the time of starts that were stopped counts too
    assert fit(run, *SAVES).code == 0
    assert_equal_runs(run, straight)


def test_a_second_process_is_refused(tmp_path, fit):
    run = tmp_path / "run"
    process = start(run, tmp_path, "--model.total_kimg", "500")
    wait_for(lambda: list((run / "checkpoints").glob("nimg*.ckpt")), process)
    try:
        done = fit(run, *SAVES, "--model.total_kimg", 500)
        assert done.code == 2
        assert "is in use: another process trains there" in done.err
        # so too if that process wrote a checkpoint after this one chose the one to continue from
        saved = run / "checkpoints"
        first = Path(shutil.copy(max(saved.glob("nimg*.ckpt")), tmp_path))
        wait_for(lambda: max(saved.glob("nimg*.ckpt")).name > first.name, process)
        done = fit(run, *SAVES, "--model.total_kimg", 500, "--resume", first)
        assert done.code == 2
        assert "is in use: another process trains there" in done.err
    finally:
        process.kill()
        process.communicate()


def full_disk(monkeypatch, failing):
    """Writing checkpoints number ``failing`` (from 1) leaves half a file and an error."""
    real, calls = torch.save, []

    def save(value, path, **options):
        if "nimg" not in str(path):
            return real(value, path, **options)
        calls.append(path)
        if len(calls) in failing:
            with open(path, "wb") as file:
                file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(value, path, **options)

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_is_survived_for_a_while(fit, straight, tmp_path, monkeypatch):
    run = tmp_path / "run"
    full_disk(monkeypatch, {2, 3})
    done = fit(run, *SAVES)
    assert done.code == 0, done.err
    assert done.out.count("could not be written") == 2
    assert "No space left on device; " in done.out
    assert "MiB are free there); training goes on. The last good one:" in done.out
    assert not list((run / "checkpoints").glob(".*"))
    assert_equal_runs(run, straight)


def test_a_full_disk_stops_the_run_after_some_failures(fit, straight, tmp_path, monkeypatch):
    run = tmp_path / "run"
    full_disk(monkeypatch, {2, 3})
    done = fit(run, *SAVES, "--checkpoints.max_failures", 2)
    assert done.code == 1
    assert "2 times in a row. Make room; the last good one:" in done.err
    (kept,) = (run / "checkpoints").iterdir()
    assert is_intact(kept)
    monkeypatch.undo()
    monkeypatch.setenv("CM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sys, "argv", sys.argv)
    done = fit(run, *SAVES, "--checkpoints.max_failures", 2)
    assert done.code == 0, done.err
    assert_equal_runs(run, straight)


def test_the_last_checkpoint_must_not_fail(fit, tmp_path, monkeypatch):
    full_disk(monkeypatch, {5})
    done = fit(tmp_path / "run", *SAVES)
    assert done.code == 1
    assert "at 0.64 kimg could not be written (" in done.err


@pytest.mark.slow
def test_kills_at_random_moments(straight, tmp_path):
    """SIGKILL: every restart continues, and the end is that of a run that was never killed."""
    import random

    rng, run, kills = random.Random(0), tmp_path / "run", 0
    while True:
        process = start(run, tmp_path)
        try:
            # later ones have longer, so that a slow machine comes to the end too
            code = process.wait(timeout=rng.uniform(4, 12) * (1 + kills / 10))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            assert kills < 40
            continue
        assert code == 0, process.communicate()[1]
        break
    assert_equal_runs(run, straight)
