"""Non-finite gradients, spikes, kept checkpoints, and places that cannot be written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from cm_lightning.evaluation import read_metrics
from cm_lightning.regimes import ECT
from tests.cli.conftest import ROOT, TINY
from tests.cli.test_fit import assert_same, load
from tests.cli.test_reliability import SAVES

LONG = ["--model.total_kimg", 6.4, "--checkpoints.every_kimg", 0.64, "--fid.every_kimg", 99]


@pytest.fixture
def bad_batches(monkeypatch):
    """``bad_batches(a, b)``: the loss is NaN for batches from position a up to b, in images."""
    real = ECT.loss

    def poison(a: int, b: int) -> None:
        def loss(self, batch, draw):
            output = real(self, batch, draw)
            if a <= draw.nimg + draw.skipped < b:
                output = output._replace(loss=output.loss * float("nan"))
            return output

        monkeypatch.setattr(ECT, "loss", loss)

    return poison


def nimgs(run) -> list[int]:
    return sorted(int(p.stem.removeprefix("nimg")) for p in (run / "checkpoints").glob("nimg*"))


def test_a_nan_batch_is_counted_and_survived(fit, tmp_path, bad_batches):
    bad_batches(128, 192)
    run = tmp_path / "run"
    assert fit(run, *SAVES).code == 0
    rows = read_metrics(run / "metrics.csv")
    last = [row for row in rows if "gradient/nonfinite" in row][-1]
    assert last["gradient/nonfinite"] == 1
    assert sum(row.get("loss/nonfinite", 0) for row in rows) == 64
    final = load(run / "checkpoints" / "nimg000000000640.ckpt")
    assert final["cm_lightning"]["nonfinite_steps"] == 1
    assert all(value.isfinite().all() for value in final["state_dict"].values())


def test_no_checkpoint_is_written_during_a_streak(fit, tmp_path, bad_batches):
    bad_batches(192, 320)  # the steps that end at 256 and 320
    run = tmp_path / "run"
    assert fit(run, *SAVES, "--checkpoints.keep", 9).code == 0
    assert nimgs(run) == [128, 384, 512, 640]


def test_a_streak_stops_the_run_and_names_the_last_good_checkpoint(fit, tmp_path, bad_batches):
    bad_batches(1500, 10**9)
    run = tmp_path / "run"
    done = fit(run, *LONG, "--model.gradients.stop_after", 20)
    assert done.code == 1
    good = run / "checkpoints" / "nimg000000001280.ckpt"
    assert nimgs(run)[-1] == 1280
    assert "not finite in 36 steps in a row (up to 3.84 kimg). Try a lower" in done.err
    assert f"the last good checkpoint: {good}." in done.err


ONE_RETURN = [*LONG, "--model.gradients.stop_after", 3, "--model.gradients.returns", 1]


def test_a_return_skips_the_batches(fit, tmp_path, bad_batches):
    bad_batches(1500, 2700)  # the streak is seen at 2560, the last checkpoint is at 1280
    run = tmp_path / "run"
    done = fit(run, *ONE_RETURN)
    assert done.code == 0, done.err
    assert "back to" in done.out
    assert "return 1 of 1; the 1.28 kimg since are skipped" in done.out
    final = load(run / "checkpoints" / "nimg000000006400.ckpt")
    assert final["cm_lightning"]["skipped"] == 1280
    rows = read_metrics(run / "metrics.csv")
    kimg = [row["kimg"] for row in rows]
    assert kimg == sorted(kimg)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [35, 70])  # the return is after 40
def test_a_run_stopped_before_or_after_a_return_ends_as_any_other(
    fit, tmp_path, bad_batches, steps
):
    bad_batches(1500, 2700)
    assert fit(tmp_path / "whole", *ONE_RETURN).code == 0
    assert fit(tmp_path / "halves", *ONE_RETURN, "--trainer.max_steps", steps).code == 0
    assert fit(tmp_path / "halves", *ONE_RETURN).code == 0
    whole, halves = (
        load(tmp_path / name / "checkpoints" / "nimg000000006400.ckpt")
        for name in ("whole", "halves")
    )
    for key in ("state_dict", "optimizer_states", "callbacks", "cm_lightning"):
        assert_same(whole[key], halves[key], key)


def test_returns_are_limited(fit, tmp_path, bad_batches):
    bad_batches(1500, 10**9)
    options = ["--model.gradients.stop_after", 20, "--model.gradients.returns", 2]
    done = fit(tmp_path / "run", *LONG, *options)
    assert done.code == 1
    assert done.out.count("back to") == 2
    assert "the last good checkpoint" in done.err


def test_a_spike_is_told(fit, tmp_path, monkeypatch):
    real = ECT.loss

    def loss(self, batch, draw):
        output = real(self, batch, draw)
        factor = 50.0 if draw.nimg >= 500 else 1.0
        return output._replace(distance=output.distance * factor)

    monkeypatch.setattr(ECT, "loss", loss)
    every = ["--diagnostics.every_kimg", 0.064]
    done = fit(tmp_path / "run", *every)
    assert done.out.count("Spike: the mean distance") == 2  # steps 9 and 10 start at 512 and 576
    assert "Spike" not in fit(tmp_path / "other", *every, "--diagnostics.spike", "null").out
    assert "must be greater than 1" in fit(tmp_path / "x", "--diagnostics.spike", 1).err


def test_checkpoints_are_kept_for_good(fit, tmp_path):
    run = tmp_path / "run"
    words = ["--checkpoints.every_kimg", 0.064, "--checkpoints.keep", 2]
    assert fit(run, *words, "--checkpoints.keep_every_kimg", 0.25).code == 0
    assert nimgs(run) == [256, 512, 576, 640]
    assert (
        "keep_every_kimg must be positive"
        in fit(tmp_path / "x", "--checkpoints.keep_every_kimg", 0).err
    )


def test_a_run_stopped_after_its_last_step_is_finished_later(fit, tmp_path):
    run, snapshots = tmp_path / "run", ["--ema.snapshots", "[0.5]"]
    assert fit(run, *snapshots).code == 0
    record = json.loads((run / "run.json").read_text())
    weights = {p.name: p.read_bytes() for p in (run / "weights").rglob("*.safetensors")}
    checkpoint = (run / "checkpoints" / "nimg000000000640.ckpt").read_bytes()
    shutil.rmtree(run / "weights" / "ema_0.9")
    results = record.pop("results")
    (run / "run.json").write_text(json.dumps(record))
    shutil.rmtree(run / "weights" / "ema_0.9@0.5")
    done = fit(run, *snapshots)
    assert done.code == 0, done.err
    assert "Finished at 0.64 kimg" in done.out
    assert {p.name: p.read_bytes() for p in (run / "weights").rglob("*.safetensors")} == weights
    assert json.loads((run / "run.json").read_text())["results"] == results
    assert (run / "checkpoints" / "nimg000000000640.ckpt").read_bytes() == checkpoint
    assert "is complete" in fit(run, *snapshots).out
    kimg = json.loads((run / "weights" / "ema_0.9@0.5" / "config.json").read_text())["kimg"]
    assert kimg == 0.32


def test_a_torn_row_of_the_metrics_is_dropped(fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run, *SAVES, "--trainer.max_steps", 4).code == 0
    whole = (run / "metrics.csv").read_text()
    with (run / "metrics.csv").open("a") as file:
        file.write("0.25")
    assert fit(run, *SAVES).code == 0
    text = (run / "metrics.csv").read_text()
    assert text.startswith(whole.splitlines()[0])
    assert [row["kimg"] for row in read_metrics(run / "metrics.csv")].count(0.25) == 0


@pytest.mark.parametrize("size", [pytest.param(0.5, marks=pytest.mark.slow), 1.5])
def test_files_that_cannot_grow(fit, tmp_path, size):
    """The system limits the size of files: logs and grids are left out, checkpoints are told."""
    run = tmp_path / "run"
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({round(size * 1e5)},) * 2);"
        "from cm_lightning.cli import fit; fit.main()"
    )
    words = ["--config", ROOT / "configs" / "ect_digits.yaml", "--config", TINY, *SAVES]
    assert fit(tmp_path / "before", "--trainer.max_steps", 1).code == 0  # makes the store
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words), "--run_dir", str(run)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1, (done.stdout, done.stderr)
    assert "could not be written" in done.stdout
    assert "3 times in a row. Make room; the last good one: none" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((run / "checkpoints").glob("*"))


def test_a_place_that_is_read_only(fit, tmp_path):
    done = fit("/proc/cm_lightning/run")
    assert done.code == 2
    assert "--run_dir /proc/cm_lightning/run cannot be written" in done.err


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--trainer.default_root_dir", "/tmp/x"], "default_root_dir"),
        (
            [
                "--trainer.callbacks+",
                "OnExceptionCheckpoint",
                "--trainer.callbacks.dirpath",
                "/etc",
            ],
            "dirpath is /etc",
        ),
        (
            ["--trainer.profiler", "SimpleProfiler", "--trainer.profiler.dirpath", "../x"],
            "dirpath is ../x",
        ),
    ],
)
def test_nothing_is_written_outside_the_run_directory(fit, tmp_path, words, name):
    done = fit(tmp_path / "run", *words)
    assert done.code == 2
    assert name in done.err
    assert not (tmp_path / "run").exists()


def test_a_place_inside_the_run_directory_is_fine(fit, tmp_path):
    run = tmp_path / "run"
    words = ["--trainer.profiler", "SimpleProfiler", "--trainer.profiler.dirpath", run / "profile"]
    done = fit(run, *words, "--trainer.max_steps", 1)
    assert done.code == 0, done.err


def test_data_removed_in_mid_run_is_still_there_for_it(fit, tmp_path, monkeypatch):
    """The open file lives on until the run ends; the next start makes it again from its source."""
    home = tmp_path / "home"
    monkeypatch.setenv("CM_HOME", str(home))
    straight = tmp_path / "straight"
    assert fit(straight).code == 0
    real, removed = ECT.loss, []

    def loss(self, batch, draw):
        if draw.nimg == 192 and not removed:
            removed.extend(home.rglob("images.npy"))
            for path in removed:
                path.unlink()
        return real(self, batch, draw)

    monkeypatch.setattr(ECT, "loss", loss)
    run = tmp_path / "run"
    assert fit(run).code == 0
    assert removed
    a, b = (load(r / "checkpoints" / "nimg000000000640.ckpt") for r in (straight, run))
    assert_same(a["state_dict"], b["state_dict"], "state_dict")
    done = fit(tmp_path / "next")
    assert done.code == 2
    assert "images.npy" in done.err
