"""Details of runs that no other test would miss."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from cm_lightning.callbacks import (
    DiagnosticsCallback,
    FIDCallback,
    GuardCallback,
    fid,
    find_ema,
    samples,
)
from cm_lightning.callbacks import teacher as distance
from cm_lightning.cli.study_report import Answer
from cm_lightning.optim import GradientGuard
from cm_lightning.types import TrainingStopped
from tests.cli.test_fit import assert_same, load, rows
from tests.cli.test_guards import ONE_RETURN, bad_batches, nimgs
from tests.cli.test_regimes import train
from tests.cli.test_reliability import SAVES, full_disk

__all__ = ["bad_batches", "train"]


def test_evaluations_draw_in_eval_mode(fit, teacher, tmp_path, monkeypatch):
    seen = Counter()
    for module in (fid, samples, distance):

        def draw(denoiser, *words, module=module, real=module.draw_images, **options):
            mode = any(part.training for part in denoiser.modules())
            seen[module.__name__.rpartition(".")[2], mode] += 1
            return real(denoiser, *words, **options)

        monkeypatch.setattr(module, "draw_images", draw)
    done = fit(tmp_path / "run", "--model.init.path", teacher, "--diagnostics.teacher_steps", 2)
    assert done.code == 0, done.err
    assert set(seen) == {("fid", False), ("samples", False), ("teacher", False)}


def test_a_return_takes_everything_from_the_checkpoint(fit, tmp_path, request, monkeypatch):
    request.getfixturevalue("bad_batches")(1500, 2700)
    real, compared = GuardCallback._go_back, []

    def go_back(self, trainer, module, path):
        real(self, trainer, module, path)
        kept = load(path)
        assert_same(dict(module.state_dict()), dict(kept["state_dict"]), "weights")
        state = trainer.optimizers[0].state_dict()["state"]
        assert_same(state, kept["optimizer_states"][0]["state"], "optimizer")
        averages = kept["callbacks"]["EMACallback"]["averages"]
        assert_same(find_ema(trainer).averages, averages, "averages")
        compared.append(path)

    monkeypatch.setattr(GuardCallback, "_go_back", go_back)
    done = fit(tmp_path / "run", *ONE_RETURN)
    assert done.code == 0, done.err
    assert len(compared) == 1


def test_the_number_of_returns_is_kept():
    guard = GuardCallback(GradientGuard())
    guard.load_state_dict({"returned": 3})
    assert guard.state_dict() == {"returned": 3}


def test_a_streak_of_the_given_length_is_enough(tmp_path):
    guard = GuardCallback(GradientGuard(stop_after=20))
    strategy = SimpleNamespace(broadcast=lambda value: value)
    trainer = SimpleNamespace(default_root_dir=tmp_path, is_global_zero=True, strategy=strategy)
    module = SimpleNamespace(gradient_stats=SimpleNamespace(streak=torch.tensor(19)))
    guard.on_step(trainer, module, 19 * 64, 20 * 64)
    module.gradient_stats.streak += 1
    with pytest.raises(TrainingStopped, match="in 20 steps in a row"):
        guard.on_step(trainer, module, 39 * 64, 40 * 64)


def test_the_end_of_a_run_is_saved_whatever_its_last_step(fit, tmp_path, request):
    request.getfixturevalue("bad_batches")(576, 640)
    done = fit(tmp_path / "run")
    assert done.code == 0, done.err
    assert nimgs(tmp_path / "run")[-1] == 640


@pytest.mark.parametrize("regime", ["gc", "sct"])
def test_a_resumed_window_keeps_its_notes(request, tmp_path, regime):
    train = request.getfixturevalue("train")
    assert train(regime, tmp_path / "whole").code == 0
    assert train(regime, tmp_path / "halves", "--trainer.max_steps", 5).code == 0
    assert train(regime, tmp_path / "halves").code == 0
    assert rows(tmp_path / "whole") == rows(tmp_path / "halves")


def test_failures_in_a_row_are_counted(fit, tmp_path, monkeypatch):
    full_disk(monkeypatch, {2, 4})
    done = fit(tmp_path / "run", *SAVES, "--checkpoints.max_failures", 2)
    assert done.code == 0, done.err
    assert done.out.count("could not be written") == 2


def test_the_best_is_kept_when_later_ones_are_worse(fit, tmp_path, monkeypatch):
    def distance(self, trainer, *_):
        return 1 + abs(trainer.lightning_module.nimg - 256) / 1000

    monkeypatch.setattr(FIDCallback, "_distance", distance)
    words = ["--checkpoints.best", "fd_digits66/ema_0.9/nfe1", "--fid.every_kimg", 0.128]
    assert fit(tmp_path / "run", *words).code == 0
    best = load(tmp_path / "run" / "checkpoints" / "best.ckpt")
    assert best["cm_lightning"]["nimg"] == 256


def test_recent_windows_are_resumed():
    callback = DiagnosticsCallback()
    callback._sums, callback._recent = torch.zeros(6, 5).double(), [1.0, 2.0, 3.0]
    other = DiagnosticsCallback()
    other.load_state_dict(callback.state_dict())
    assert other._recent == [1.0, 2.0, 3.0]


def test_a_verdict_at_the_edge():
    """Differences of -1, -1.6 and -0.4: their mean is -1 and half the interval 1.49."""
    answer = Answer("a", "b", "", [0.0, 1.0, 2.0], [1.0, 2.6, 2.4])
    assert answer.verdict == "undecided"
