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


@pytest.mark.parametrize(
    ("regime", "options"),
    [
        ("ect", []),
        ("gc", []),
        ("sct", ["--model.references.n=30"]),
        ("sct", [*GATHERED, "--data.micro_batch=64"]),
    ],
)
def test_two_processes_equal_one(tmp_path, regime, options):
    config = ROOT / "configs" / f"{regime}_digits.yaml"
    checkpoints, rows = [], []
    for devices in (1, 2):
        run = tmp_path / str(devices)
        words = [Path(sys.executable).parent / "cm-fit", "--config", config, "--config", TINY]
        words += ["--run_dir", run, "--trainer.devices", str(devices)]
        words += ["--model.denoiser.backbone.dropout", "0", "--model.total_kimg", "0.32", *options]
        done = subprocess.run(
            words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert f"{devices} device(s)" in done.stdout
        checkpoints.append(
            torch.load(run / "checkpoints" / "nimg000000000320.ckpt", weights_only=True)
        )
        with (run / "metrics.csv").open(newline="") as file:
            rows.append(list(csv.DictReader(file)))
    one, two = checkpoints
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(value, two["state_dict"][name], rtol=1e-6, atol=1e-6)
    averages = [c["callbacks"]["EMACallback"]["averages"]["ema_0.9"] for c in checkpoints]
    for name, value in averages[0].items():
        torch.testing.assert_close(value, averages[1][name], rtol=1e-6, atol=1e-6)
    for a, b in zip(*rows, strict=True):
        for key in ("kimg", "loss", "gradient/norm", "fd_digits66/ema_0.9/nfe2"):
            assert bool(a[key]) == bool(b[key])
            if a[key]:
                assert float(a[key]) == pytest.approx(float(b[key]), rel=1e-5)
