"""Two processes on one CPU equal one process: data, noise, averages, Frechet distance."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.conftest import ROOT, TINY

# with in-batch references one micro-batch, so that those of a step are the global batch
GATHERED = ["--model.references.source=batch", "--model.references.gather=true"]


def train(tmp_path, regime, devices, options, kimg="0.32"):
    """Checkpoint and log rows of a run."""
    run = tmp_path / str(devices)
    config = ROOT / "configs" / f"{regime}_digits.yaml"
    words = [Path(sys.executable).parent / "cm-fit", "--config", config, "--config", TINY]
    words += ["--run_dir", run, "--trainer.devices", str(devices), "--model.total_kimg", kimg]
    done = subprocess.run(
        [*words, *options],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert f"{devices} device(s)" in done.stdout
    name = f"nimg{round(1000 * float(kimg)):012d}.ckpt"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return torch.load(run / "checkpoints" / name, weights_only=True), rows


def assert_same_runs(one, two):
    (first, rows), (second, others) = one, two
    for name, value in first["state_dict"].items():
        torch.testing.assert_close(value, second["state_dict"][name], rtol=1e-6, atol=1e-6)
    averages = [c["callbacks"]["EMACallback"]["averages"]["ema_0.9"] for c in (first, second)]
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name], rtol=1e-6, atol=1e-6)
    assert len(rows) == len(others)
    for a, b in zip(rows, others, strict=True):
        for key in (
            "kimg",
            "loss",
            "gradient/norm",
            *(k for k in a if k.startswith(("fd_", "transport_cost", "generated"))),
        ):
            assert bool(a[key]) == bool(b[key])
            if a[key]:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        pytest.param("ect", [], marks=pytest.mark.slow),
        pytest.param("gc", ["--model.coupling.dropout=true"], marks=pytest.mark.slow),
        pytest.param("sct", ["--model.references.n=30"], marks=pytest.mark.slow),
        ("sct", [*GATHERED, "--data.micro_batch=64"]),
    ],
)
def test_two_processes_equal_one(tmp_path, regime, options):
    """Dropout is on: its masks belong to the images."""
    assert_same_runs(*(train(tmp_path, regime, devices, options) for devices in (1, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", ["0", "0.2"])
@pytest.mark.parametrize("regime", ["diffusion", "cd", "ct", "ict", "ect", "gc", "sct"])
def test_twenty_steps_of_two_processes_equal_those_of_one(tmp_path, teacher, regime, dropout):
    options = [f"--model.denoiser.backbone.dropout={dropout}", "--checkpoints.every_kimg=9"]
    if regime == "cd":
        options.append(f"--model.teacher.path={teacher}")
    assert_same_runs(*(train(tmp_path, regime, n, options, "1.28") for n in (1, 2)))
