"""The progress line shows what was logged, and waits for no step."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from cm_lightning.callbacks import DiagnosticsCallback, KimgProgress


class Pending:
    """The loss of a step that a GPU has not taken yet."""

    def __float__(self):
        raise AssertionError("the step was waited for")


@pytest.mark.parametrize("terminal", [False, True])
def test_the_loss_is_that_of_the_last_window(terminal, capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    progress, diagnostics = KimgProgress(log_seconds=0), DiagnosticsCallback()
    monkeypatch.setattr(progress, "_REFRESH_SECONDS", 0)
    trainer = SimpleNamespace(callbacks=[progress, diagnostics])
    module = SimpleNamespace(nimg=0, total_nimg=4000, total_kimg=4.0, stage=2)

    def line():
        capsys.readouterr()
        module.nimg += 1000
        progress.on_train_batch_end(trainer, module, {"loss": Pending()}, None, 0)
        if terminal:
            progress._bar.refresh()
        return capsys.readouterr().err

    progress.on_train_start(trainer, module)
    before = line()
    assert "1.0/4 kimg" in before
    assert before.rstrip().endswith("left, stage 2")
    diagnostics.loss = 0.12345
    assert line().rstrip().endswith("left, loss 0.1235, stage 2")
    trainer.callbacks = [progress]
    assert line().rstrip().endswith("left, stage 2")
    progress.on_train_end(trainer, module)
