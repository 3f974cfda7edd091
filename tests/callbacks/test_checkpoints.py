"""The best checkpoint is that of the lowest distance."""

from __future__ import annotations

import torch

from cm_lightning.evaluation import read_metrics

METRIC = "fd_digits66/ema_0.9/nfe1"


def test_best_checkpoint_is_that_of_the_lowest_distance(fit, program, tmp_path):
    run = tmp_path / "run"
    words = ["--checkpoints.best", METRIC, "--fid.every_kimg", 0.128, "--checkpoints.keep", 1]
    assert fit(run, *words).code == 0
    rows = [row for row in read_metrics(run / "metrics.csv") if METRIC in row]
    assert len(rows) >= 4
    lowest = min(rows, key=lambda row: row[METRIC])
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["cm_lightning"]["nimg"] == round(1000 * lowest["kimg"])
    newest = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert newest == ["best.ckpt", "nimg000000000640.ckpt"]
    again = fit(run, *words)
    assert "is complete" in again.out  # best.ckpt is none to resume from
    out = tmp_path / "out"
    assert program("cm-sample", run / "checkpoints" / "best.ckpt", "--n", 2, "--out", out).code == 0


def test_an_unknown_distance_is_refused(fit, tmp_path):
    done = fit(tmp_path / "run", "--checkpoints.best", "fid50k")
    assert done.code == 2
    assert f"checkpoints.best names 'fid50k', and the distances measured are {METRIC}" in done.err
    assert not (tmp_path / "run").exists()
