"""Weights & Biases: what it gets, and what it must not disturb."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
import time

import pytest
import torch

from cm_lightning.dashboard import panel
from cm_lightning.evaluation import read_metrics
from cm_lightning.loggers import KimgWandbLogger, has_wandb_key
from cm_lightning.regimes import ECT
from tests.cli.conftest import ROOT, TINY
from tests.cli.test_fit import rows


def run_json(run):
    return json.loads((run / "run.json").read_text())


def wandb_settings():
    """W&B's settings as a program that starts now would find them."""
    import wandb

    wandb.teardown()
    return wandb.setup().settings


def updates(records, kind):
    """Items that the records of one kind set."""
    return [i for r in records if r.HasField(kind) for i in getattr(r, kind).update]


@pytest.mark.parametrize("key", ["", "offline", "online"])
def test_wandb_without_a_key_goes_offline_and_never_asks(fit, tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    if key:
        monkeypatch.setenv("WANDB_MODE", key)
    else:
        monkeypatch.delenv("WANDB_MODE", raising=False)
    done = fit(tmp_path / "run", "--wandb.project", "test", "--trainer.max_steps", 5)
    assert done.code == 0, done.err
    assert ("no API key" in done.out + done.err) == (key != "offline")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["wandb_id"]


def wandb_records(path):
    """Records of an offline run: a LevelDB log of protocol buffers."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, parts, found = path.read_bytes(), 7, b"", []
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        size, kind = int.from_bytes(content[place + 4 : place + 6], "little"), content[place + 6]
        parts += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            found.append(Record.FromString(parts))
            parts = b""
    return found


def test_wandb_gets_sections_on_an_axis_in_kimg(program, tmp_path, monkeypatch):
    """Every number of metrics.csv, grids and pictures arrive, under few first words."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = tmp_path / "run"
    words = ["--config", ROOT / "configs" / "gc_digits.yaml", "--config", TINY, "--run_dir", run]
    words += ["--wandb.project", "test", "--diagnostics.picture", "true"]
    assert program("cm-fit", *words).code == 0
    sys.modules["wandb"].teardown()  # at the end of a process: the file may end later than the run
    (path,) = run.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(path)
    metrics = {m.glob_name or m.name: m.step_metric for m in (r.metric for r in records)}
    assert metrics["*"] == "kimg"
    logged, sections = {}, set()
    for record in records:
        row = {"/".join(i.nested_key) or i.key: i.value_json for i in record.history.item}
        logged |= row
        assert not row or "kimg" in row
        sections |= {key.partition("/")[0] for key in row if not key.startswith("_")}
    families = {name for name in sections if name.startswith("by_level_")}
    assert {"by_level_loss", "by_level_transport_cost", "by_level_generated"} <= families
    others = {"kimg", "training", "schedule", "machine", "samples", "diagnostics", "fd_digits66"}
    assert sections - families == others
    numbers = rows(run)[-1]
    for key in (key for key in numbers if key not in ("kimg", "step") and numbers[key]):
        assert float(logged[panel(key)]) == pytest.approx(float(numbers[key]), rel=1e-6), key
    for picture in ("samples/ema_0.9/nfe1", "samples/ema_0.9/nfe2", "diagnostics/over_training"):
        assert logged[f"{picture}/_type"] == '"image-file"'
    config = {item.key: json.loads(item.value_json) for item in updates(records, "config")}
    assert config["model"]["class_path"].endswith("GC")
    assert config["model"]["init_args"]["optimizer"]["init_args"]["lr"] > 0
    assert config["run"]["data_fingerprint"] == run_json(run)["data_fingerprint"]
    assert config["run"]["versions"]["torch"]
    summary = {
        "/".join(item.nested_key) or item.key: json.loads(item.value_json)
        for item in updates(records, "summary")
    }
    best = run_json(run)["results"]["best"]
    assert len(best) > 2
    for key, found in best.items():
        assert summary[f"best/{key}"] == pytest.approx(found["value"])
    assert [r.exit.exit_code for r in records if r.HasField("exit")] == [0]


def test_every_family_has_a_section():
    assert panel("ess/0.1-0.5") == "by_level_ess/0.1-0.5"
    assert panel("loss_by_sigma/above_10") == "by_level_loss/above_10"
    assert panel("loss") == "training/loss"
    assert panel("loss/nonfinite") == "training/loss_nonfinite"
    assert panel("time/fid10k_seconds") == "machine/fid10k_seconds"
    assert panel("fid10k/ema_0.9999/nfe1") == "fid10k/ema_0.9999/nfe1"


def test_a_wandb_server_that_hangs_is_given_up(fit, tmp_path, monkeypatch):
    key = "5ecre7" * 6 + "abcd"
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen(50)
    held = []

    def accept():
        while True:
            try:
                held.append(listener.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
    monkeypatch.setenv("WANDB_API_KEY", key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    run = tmp_path / "run"
    start = time.monotonic()
    done = fit(run, "--wandb.project", "x", "--wandb.timeout", 2, "--trainer.max_steps", 5)
    assert done.code == 0, done.err
    assert held
    assert time.monotonic() - start < 90
    assert f"logging offline, `wandb sync --yes {run}/wandb/offline-run-*` sends" in done.out
    assert list((run / "wandb").glob("offline-run-*"))
    for path in run.rglob("*"):
        assert not path.is_file() or key.encode() not in path.read_bytes(), path
    listener.close()


@pytest.mark.parametrize(
    ("machine", "server", "found"),
    [
        ("api.wandb.ai", None, True),
        ("api.forge.coreweave.com", None, True),
        ("api.wandb.ai", "https://api.forge.coreweave.com", True),
        ("example.org", None, False),
        ("example.org", "https://example.org:8080", True),
        ("api.wandb.ai", "https://example.org", False),
    ],
)
def test_keys_of_wandb_in_the_netrc_file(machine, server, found, tmp_path, monkeypatch):
    file = tmp_path / "netrc"
    file.write_text(f"machine {machine}\n login user\n password {'a' * 40}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    if server is not None:
        monkeypatch.setenv("WANDB_BASE_URL", server)
    assert has_wandb_key(wandb_settings()) == found


def test_a_wandb_server_that_hangs_at_the_end_is_left(fit, tmp_path, monkeypatch):
    left = []
    monkeypatch.setattr(os, "_exit", lambda code: left.append(code))
    monkeypatch.setenv("WANDB_MODE", "offline")
    real = KimgWandbLogger.finish

    def finish(self, code):
        closing, self._experiment.finish = self._experiment.finish, lambda code: time.sleep(5)
        result = real(self, code)
        closing()
        return result

    monkeypatch.setattr(KimgWandbLogger, "finish", finish)
    words = ["--wandb.project", "x", "--wandb.timeout", 0.2, "--trainer.max_steps", 1]
    done = fit(tmp_path / "run", *words)
    assert left == [0]
    assert "did not answer within 0.2 s; `wandb sync" in done.out


def test_offline_rows_are_logged_once_over_restarts(fit, tmp_path, monkeypatch):
    """Also where the second start ends before the place that the first one reached."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    seen = []
    real = KimgWandbLogger._log

    def log(self, row, step):
        if step >= self.first_step:
            seen.append((step, tuple(sorted(row))))
        real(self, row, step)

    monkeypatch.setattr(KimgWandbLogger, "_log", log)
    words = ["--wandb.project", "x", "--checkpoints.every_kimg", 0.32]
    run = tmp_path / "run"
    for place in (9, 6):  # logged up to there, saved at 5
        loss = ECT.loss
        with monkeypatch.context() as patch:
            patch.setattr(ECT, "loss", failing(loss, place))
            assert fit(run, *words).code == 1
    done = fit(run, *words)
    assert done.code == 0, done.err
    assert "Resuming" in done.out
    assert len(seen) == len(set(seen))
    rows = read_metrics(run / "metrics.csv")
    assert {step for step, _ in seen} == {round(row["kimg"] / 0.064) for row in rows}


def failing(loss, place):
    """A loss that stops the program in the step of this number."""

    def fails(self, batch, draw):
        if draw.nimg >= 64 * place:
            raise RuntimeError("stopped here")
        return loss(self, batch, draw)

    return fails


@pytest.mark.parametrize("by", ["error", "signal"])
def test_a_run_that_does_not_end_is_marked(fit, tmp_path, monkeypatch, by):
    monkeypatch.setenv("WANDB_MODE", "offline")

    def loss(self, batch, draw, real=ECT.loss):
        if draw.nimg == 192 and by == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
        elif draw.nimg == 192:
            raise torch.OutOfMemoryError("too small")
        return real(self, batch, draw)

    monkeypatch.setattr(ECT, "loss", loss)
    done = fit(tmp_path / "run", "--wandb.project", "x")
    assert done.code == (75 if by == "signal" else 1)
    sys.modules["wandb"].teardown()
    (path,) = tmp_path.glob("run/wandb/offline-run-*/*.wandb")
    codes = [r.exit.exit_code for r in wandb_records(path) if r.HasField("exit")]
    assert codes == [done.code]


def test_offline_and_servers_of_the_settings_file_are_known(fit, tmp_path, monkeypatch):
    """As `wandb offline` and `wandb login --host` write it."""
    for name in ("WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    file = tmp_path / "netrc"
    file.write_text(f"machine example.org\n login user\n password {'a' * 40}\n")
    file.chmod(0o600)
    monkeypatch.setenv("NETRC", str(file))
    text = "[default]\nmode = offline\nbase_url = https://example.org\n"
    (tmp_path / "settings").write_text(text)
    settings = wandb_settings()
    assert settings.mode == "offline"
    assert has_wandb_key(settings)
    run = tmp_path / "run"
    words = ["--wandb.project", "x", "--checkpoints.every_kimg", 0.32]
    with monkeypatch.context() as patch:
        patch.setattr(ECT, "loss", failing(ECT.loss, 9))
        assert fit(run, *words).code == 1
    first = []
    real = KimgWandbLogger._log
    monkeypatch.setattr(
        KimgWandbLogger, "_log", lambda self, *a: (first.append(self.first_step), real(self, *a))
    )
    assert fit(run, *words).code == 0
    assert set(first) == {10}


def test_a_run_that_is_stopped_while_wandb_connects_goes_on(fit, tmp_path, monkeypatch):
    def connect(*arguments):
        (run / "wandb").mkdir()
        raise RuntimeError("stopped here")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("cm_lightning.cli.fit.wandb_logger", connect)
        assert fit(run, "--wandb.project", "x", "--trainer.max_steps", 1).code == 2
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = fit(run, "--wandb.project", "x", "--trainer.max_steps", 1)
    assert done.code == 0, done.err
    assert "wandb_id" not in run_json(run)


def test_a_project_name_with_a_slash_is_refused(fit, tmp_path):
    done = fit(tmp_path / "run", "--wandb.project", "team/digits")
    assert done.code == 2
    assert "wandb.project cannot contain /, got team/digits" in done.err
    assert not (tmp_path / "run").exists()
