"""The best checkpoint is that of the lowest distance."""

from __future__ import annotations

import lightning as L
import torch

from cm_lightning.callbacks import CheckpointCallback, EMACallback
from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.evaluation import read_metrics
from cm_lightning.regimes import ECT
from tests.toys import TinyDenoiser

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


class Stop(L.Callback):
    """Ends the run within a step, as ``trainer.max_time`` may."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop |= batch_idx == 5


def test_a_run_stopped_within_a_step_ends_after_it_with_a_checkpoint(tmp_path):
    module = ECT(TinyDenoiser(), total_kimg=1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        default_root_dir=tmp_path,
        callbacks=[Stop(), EMACallback(), CheckpointCallback()],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ImageDataModule(Digits(), 32, micro_batch=8, conditional=False))
    assert module.nimg == 64  # the sixth of four micro-batches a step
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["nimg000000000064.ckpt"]
