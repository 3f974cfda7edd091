"""cm-fit from end to end: a run, its directory, exact resume, check, help."""

from __future__ import annotations

import csv
import json
import shutil
import sys

import lightning as L
import pytest
import torch
import yaml
from safetensors.torch import load_file

from cm_lightning.callbacks import run_record
from cm_lightning.cli import help
from cm_lightning.data import ImageDataModule
from cm_lightning.regimes import ECT
from tests.cli.conftest import ROOT

PROFILES = ["ema_0.9", "ema_halflife0.3k", "ema_std0.100"]


def rows(run_dir) -> list[dict]:
    """metrics.csv without what depends on the clock on the wall."""
    with (run_dir / "metrics.csv").open(newline="") as file:
        return [
            {
                key: value
                for key, value in row.items()
                if not key.startswith(("speed/", "memory/", "time/"))
            }
            for row in csv.DictReader(file)
        ]


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same(a, b, where="") -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}.{number}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


def test_a_run_and_its_directory(fit, tmp_path):
    run = tmp_path / "run"
    done = fit(run)
    assert done.code == 0, done.err
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "metrics.csv",
        "run.json",
        "samples",
        "weights",
    }
    assert [p.name for p in sorted((run / "checkpoints").iterdir())] == [
        "nimg000000000320.ckpt",
        "nimg000000000640.ckpt",
    ]
    assert "0.64 kimg" in done.out
    assert str(run / "metrics.csv") in done.out
    record = json.loads((run / "run.json").read_text())
    assert record["regime"] == "ECT"
    assert record["results"]["kimg"] == 0.64
    keys = {f"fd_digits66/{name}/nfe{k}" for name in PROFILES for k in (1, 2)}
    assert record["results"]["last"].keys() == keys
    logged = rows(run)
    assert [row["kimg"] for row in logged if row["loss"]] == ["0.192", "0.384", "0.576", "0.64"]
    assert all(float(row["loss"]) > 0 for row in logged if row["loss"])
    assert [row["kimg"] for row in logged if row["fd_digits66/ema_0.9/nfe1"]] == ["0.32", "0.64"]
    pictures = sorted(path.relative_to(run).as_posix() for path in run.rglob("*.png"))
    assert pictures == [
        f"samples/ema_0.9/nfe{k}/kimg000000.{kimg}.png" for k in (1, 2) for kimg in (32, 64)
    ]
    assert sorted(p.name for p in (run / "weights").iterdir()) == PROFILES
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["total_kimg"] == 0.64


def test_ten_steps_are_five_and_five_bit_for_bit(fit, tmp_path):
    """Weights, three averages, optimizer, sampler, dropout, accumulation, logs."""
    assert fit(tmp_path / "a").code == 0
    assert fit(tmp_path / "b", "--trainer.max_steps", 5).code == 0
    done = fit(tmp_path / "b")
    assert done.code == 0, done.err
    assert "Resuming from" in done.out
    assert "nimg000000000320.ckpt" in done.out
    for name in ("nimg000000000320.ckpt", "nimg000000000640.ckpt"):
        a, b = (load(tmp_path / run / "checkpoints" / name) for run in "ab")
        for part in ("state_dict", "optimizer_states", "callbacks", "cm_lightning"):
            assert_same(a[part], b[part], part)
    assert rows(tmp_path / "a") == rows(tmp_path / "b")
    for k in (1, 2):
        name = f"samples/ema_0.9/nfe{k}/kimg000000.64.png"
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    starts = json.loads((tmp_path / "b" / "run.json").read_text())["starts"]
    assert [start["kimg"] for start in starts] == [0.0, 0.32]


def test_a_resumed_run_drops_rows_after_its_checkpoint(fit, tmp_path):
    assert fit(tmp_path / "a").code == 0
    whole = rows(tmp_path / "a")
    (tmp_path / "a" / "checkpoints" / "nimg000000000640.ckpt").unlink()
    assert fit(tmp_path / "a").code == 0
    assert rows(tmp_path / "a") == whole


def test_accumulation_does_not_change_the_run(fit, tmp_path):
    off = ("--model.denoiser.backbone.dropout", 0, "--trainer.max_steps", 5)
    assert fit(tmp_path / "a", *off).code == 0
    assert fit(tmp_path / "b", *off, "--data.micro_batch", 64).code == 0
    a, b = (load(tmp_path / run / "checkpoints" / "nimg000000000320.ckpt") for run in "ab")
    for name, value in a["state_dict"].items():
        torch.testing.assert_close(value, b["state_dict"][name], rtol=1e-4, atol=1e-5)


def test_a_finished_run_is_left_alone(fit, tmp_path):
    assert fit(tmp_path / "a").code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()}
    done = fit(tmp_path / "a")
    assert done.code == 0
    assert "is complete" in done.out
    assert {p: p.read_bytes() for p in (tmp_path / "a").rglob("*") if p.is_file()} == before


def test_never_refuses_an_existing_run(fit, tmp_path):
    assert fit(tmp_path / "a", "--trainer.max_steps", 1).code == 0
    done = fit(tmp_path / "a", "--resume", "never")
    assert done.code == 2
    assert "already holds a run" in done.err


def test_continue_from_a_named_checkpoint_elsewhere(fit, tmp_path):
    assert fit(tmp_path / "a").code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "nimg000000000320.ckpt"
    done = fit(tmp_path / "b", "--resume", checkpoint)
    assert done.code == 0, done.err
    a, b = (load(tmp_path / run / "checkpoints" / "nimg000000000640.ckpt") for run in "ab")
    assert_same(a["state_dict"], b["state_dict"])


def test_a_fork_takes_the_numbers_of_its_own_optimizer(fit, tmp_path):
    assert fit(tmp_path / "a").code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "nimg000000000320.ckpt"
    words = ["--model.optimizer.lr", "1e-12", "--model.optimizer.betas", "[0.5, 0.6]"]
    words += ["--model.optimizer.decoupled_weight_decay", "true"]
    done = fit(tmp_path / "b", "--resume", checkpoint, *words, "--model.total_kimg", 0.96)
    assert done.code == 0, done.err
    start, end = load(checkpoint), load(tmp_path / "b" / "checkpoints" / "nimg000000000960.ckpt")
    group = end["optimizer_states"][0]["param_groups"][0]
    assert (group["initial_lr"], tuple(group["betas"])) == (1e-12, (0.5, 0.6))
    assert group["decoupled_weight_decay"] is True
    assert start["optimizer_states"][0]["param_groups"][0]["initial_lr"] > 1e-4
    for name, value in start["state_dict"].items():
        torch.testing.assert_close(end["state_dict"][name], value, rtol=0, atol=1e-9)


def test_the_best_of_a_fork_are_its_own(fit, tmp_path):
    """It stands still, so that its distance is the one that its parent had."""
    words = ["--fid.profiles", "[live]"]
    assert fit(tmp_path / "a", *words).code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "nimg000000000320.ckpt"
    words += ["--model.optimizer.lr", 1e-30]
    assert fit(tmp_path / "b", *words, "--resume", checkpoint, "--trainer.max_steps", 8).code == 0
    assert fit(tmp_path / "b", *words).code == 0  # goes on from its own checkpoint
    key = "fd_digits66/live/nfe1"
    found = json.loads((tmp_path / "b" / "run.json").read_text())["results"]
    assert found["best"][key] == {"value": found["last"][key], "kimg": 0.64}


def test_a_fork_of_a_finished_run_needs_more_images(fit, tmp_path):
    assert fit(tmp_path / "a").code == 0
    checkpoint = tmp_path / "a" / "checkpoints" / "nimg000000000640.ckpt"
    done = fit(tmp_path / "b", "--resume", checkpoint)
    assert done.code == 2
    assert "is at 0.64 kimg, where model.total_kimg 0.64 ends already: raise it" in done.err
    assert not (tmp_path / "b").exists()


def test_a_fork_keeps_the_origin_of_its_weights(fit, tmp_path):
    for name in "xy":
        assert fit(tmp_path / name, "--seed_everything", ord(name)).code == 0
    init = ["--model.init.path", tmp_path / "x"]
    assert fit(tmp_path / "a", *init).code == 0
    fork = ["--resume", tmp_path / "a" / "checkpoints" / "nimg000000000320.ckpt"]
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    for name, words in (("b", []), ("c", init)):
        assert fit(tmp_path / name, *fork, *words, "--trainer.max_steps", 6).code == 0
        done = fit(tmp_path / name, *words)
        assert done.code == 0, done.err
        assert "Resuming" in done.out
        own = json.loads((tmp_path / name / "run.json").read_text())
        assert own["origins"]["init"]["sha256"] == record["origins"]["init"]["sha256"]
    done = fit(tmp_path / "d", *fork, "--model.init.path", tmp_path / "y")
    assert done.code == 2
    assert "would not be used: the run goes on from" in done.err


def test_a_run_goes_on_elsewhere_by_its_name(fit, tmp_path):
    """Where its own directory refuses another length, and says so."""
    assert fit(tmp_path / "a").code == 0
    longer = ["--model.total_kimg", 0.96]
    done = fit(tmp_path / "a", *longer)
    assert done.code == 2
    assert f"with --resume {tmp_path / 'a'} the run goes on there" in done.err
    done = fit(tmp_path / "b", *longer, "--resume", tmp_path / "a")
    assert done.code == 0, done.err
    assert "at 0.64 kimg" in done.out
    assert "Finished at 0.96 kimg" in done.out


def test_a_run_that_ends_before_its_first_row_has_weights(fit, tmp_path):
    done = fit(tmp_path / "a", "--trainer.max_steps", 1, "--fid.every_kimg", "null")
    assert done.code == 0, done.err
    assert "Ended at 0.064 of 0.64 kimg" in done.out
    assert not (tmp_path / "a/metrics.csv").exists()
    weights = tmp_path / "a/weights/ema_0.9"
    modes = {path.stat().st_mode for path in weights.iterdir()}
    assert len(modes) == 1  # readable for those who may read the rest


def test_an_unknown_class_is_named_wherever_its_file_lies(program, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    (tmp_path / "there/x.yaml").write_text("model: {class_path: EKT}")
    (tmp_path / "ect.yaml").write_text((ROOT / "configs/ect_digits.yaml").read_text())
    monkeypatch.chdir(tmp_path)
    for files in (["there/x.yaml"], ["ect.yaml", "there/x.yaml"]):
        words = [word for file in files for word in ("--config", file)]
        done = program("cm-fit", *words, "--check")
        assert done.code == 2
        assert "model: there is no class 'EKT' (in there/x.yaml)" in done.err


def test_a_run_that_lightning_ends_has_a_checkpoint(fit, tmp_path):
    words = ["--checkpoints.every_kimg", 9]
    assert fit(tmp_path / "straight", *words).code == 0
    assert fit(tmp_path / "a", *words, "--trainer.max_steps", 3).code == 0
    names = [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()]
    assert names == ["nimg000000000192.ckpt"]
    done = fit(tmp_path / "a", *words)
    assert "at 0.192 kimg" in done.out
    last = [tmp_path / run / "checkpoints" / "nimg000000000640.ckpt" for run in ("a", "straight")]
    a, b = (load(path) for path in last)
    assert_same(a["state_dict"], b["state_dict"])


def test_check_of_a_run_of_one_step_writes_nothing(fit, tmp_path):
    done = fit(tmp_path / "a", "--check", "--model.total_kimg", 0.064)
    assert done.code == 0, done.err
    assert not (tmp_path / "a").exists()


def test_a_resumed_run_without_distances_reports_none(fit, tmp_path):
    assert fit(tmp_path / "a", "--trainer.max_steps", 6).code == 0
    words = ["--fid.profiles", "[]", "--diagnostics.edges", "[1]"]
    done = fit(tmp_path / "a", *words)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "a" / "run.json").read_text())["results"]
    assert results["last"] == {}


def test_the_saved_config_repeats_the_run(fit, program, tmp_path):
    assert fit(tmp_path / "a").code == 0
    done = program(
        "cm-fit", "--config", tmp_path / "a" / "config.yaml", "--run_dir", tmp_path / "b"
    )
    assert done.code == 0, done.err
    assert rows(tmp_path / "a") == rows(tmp_path / "b")


def test_check_writes_nothing_and_says_what_is_needed(fit, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    done = fit(tmp_path / "run", "--check")
    assert done.code == 0, done.err
    assert list(tmp_path.iterdir()) == []
    for word in ("parameters", "memory", "kimg", "steps", "fd_digits", "Nothing was written"):
        assert word in done.out


def test_help_fits_a_screen_and_names_the_regimes(program):
    done = program("cm-fit", "--help")
    assert done.code == 0
    assert len(done.out.splitlines()) < 75
    assert max(map(len, done.out.splitlines())) <= 100
    for word in ("--config", "--resume", "--check", "--print_config", "ECT", "Diffusion"):
        assert word in done.out


def test_the_start_says_what_will_make_it_slow(fit, tmp_path, monkeypatch):
    monkeypatch.setattr(run_record, "slow_because", lambda *given: [f"{given[1]} on {given[0]}"])
    done = fit(tmp_path / "run", "--trainer.max_steps", 1, "--trainer.precision", "bf16-mixed")
    assert done.code == 0, done.err
    assert "  slow      bf16-mixed on cpu\n" in done.out


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"]])
def test_help_comes_before_the_imports(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cm-fit", *words])
    monkeypatch.setitem(sys.modules, "cm_lightning.cli.fit", None)
    help.main()
    assert capsys.readouterr().out == help.fit_help() + "\n"


def test_printed_config_is_complete(program):
    from tests.cli.conftest import DIGITS

    done = program("cm-fit", "--config", DIGITS, "--print_config")
    assert done.code == 0
    config = yaml.safe_load(done.out)
    assert config["model"]["init_args"]["discretization"]["init_args"]["k"] == 8.0
    assert config["fid"]["samplers"][1]["init_args"]["sigmas"] == [80.0, 0.821]
    assert "Unable to serialize" not in done.err


def test_an_evaluation_stops_when_its_time_is_over(fit, tmp_path):
    run = tmp_path / "run"
    done = fit(run, "--fid.max_minutes", "1e-6")
    assert done.code == 0, done.err
    assert "took longer than fid.max_minutes 1e-06: left out" in done.out + done.err
    measured = [key for key in rows(run)[-1] if "/nfe" in key]
    assert len(measured) == 1  # the first is always measured
    refused = fit(tmp_path / "other", "--fid.max_minutes", "0")
    assert refused.code == 2
    assert "fid.max_minutes must be positive or null, got 0" in refused.err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: Tried to allocate 2.00 GiB."),
        MemoryError("Tried to allocate 2.00 GiB"),
    ],
    ids=["device", "machine", "python"],
)
def test_out_of_memory_says_what_to_change(fit, tmp_path, monkeypatch, error):
    def full(*arguments):
        raise error

    monkeypatch.setattr(ECT, "loss", full)
    done = fit(tmp_path / "run")
    assert done.code == 1
    assert "Traceback" not in done.err
    for words in (
        "micro-batches of 32 images",
        "--data.micro_batch 16",
        "--trainer.precision bf16-mixed",
        "--performance.checkpointing true",
        "Tried to allocate 2.00 GiB",
    ):
        assert words in done.err
    assert "references" not in done.err
    assert fit(tmp_path / "run", "--check").code == 1
    monkeypatch.setattr(ImageDataModule, "reference_bytes", 1 << 30)
    assert "--model.references.n N" in fit(tmp_path / "run").err
    done = fit(tmp_path / "other", "--data.micro_batch", 1, "--performance.checkpointing", "true")
    assert "checkpointing" not in done.err
    assert "--data.micro_batch" not in done.err


def test_the_start_says_what_memory_it_takes(fit, tmp_path):
    out = {}
    for on in ("false", "true"):
        done = fit(tmp_path / on, "--performance.checkpointing", on, "--model.total_kimg", 0.064)
        assert done.code == 0
        (line,) = [line for line in done.out.splitlines() if "  memory    about" in line]
        out[on] = line
        assert "activations of 32 images" in line
    assert out["true"] != out["false"]


@pytest.mark.slow
def test_a_compiled_run_resumes_samples_and_exports_as_any_other(
    fit, program, tmp_path, monkeypatch
):
    real, compiled = torch.nn.Module.compile, []

    def compile_graphs(module, options=None):
        compiled.append(module)
        real(module, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_graphs)
    speed = ("--performance.compile", "true", "--performance.checkpointing", "true")
    assert fit(tmp_path / "a").code == 0
    assert not compiled
    assert fit(tmp_path / "b", *speed).code == 0
    assert len(compiled) == 1
    newest = tmp_path / "b" / "checkpoints" / "nimg000000000640.ckpt"
    first = load(newest)
    newest.unlink()
    assert fit(tmp_path / "b", *speed).code == 0  # resumes at half
    again, plain = load(newest), load(tmp_path / "a" / "checkpoints" / newest.name)
    assert list(first["state_dict"]) == list(plain["state_dict"])
    for name, value in first["state_dict"].items():
        assert torch.equal(again["state_dict"][name], value), name
        torch.testing.assert_close(value, plain["state_dict"][name], rtol=1e-3, atol=1e-5)
    newest.unlink()
    assert fit(tmp_path / "b").code == 0  # speed is no part of what a run is
    for profile in PROFILES:
        names = [
            sorted(load_file(tmp_path / run / "weights" / profile / "model.safetensors"))
            for run in "ab"
        ]
        assert names[0] == names[1]
    done = program("cm-sample", tmp_path / "b", "--n", 4, "--sigmas", 80, "--out", tmp_path / "s")
    assert done.code == 0


def test_cudnn_tries_its_algorithms_unless_runs_are_to_be_repeated(tmp_path, fit, monkeypatch):
    seen = []
    monkeypatch.setattr(L.Trainer, "fit", lambda trainer, *_, **__: seen.append(flag()))
    monkeypatch.setattr("cm_lightning.cli.fit_run.export", lambda cli: None)

    def flag():
        return torch.backends.cudnn.benchmark

    before, strict = flag(), torch.are_deterministic_algorithms_enabled()
    try:
        for words in ([], ["--trainer.deterministic", "true"], ["--trainer.benchmark", "false"]):
            assert fit(tmp_path / "run", *words).code == 0
    finally:
        torch.backends.cudnn.benchmark = before
        torch.use_deterministic_algorithms(strict)
    assert seen == [True, False, False]


def test_loggers_and_callbacks_of_lightning_from_the_command_line(fit, tmp_path):
    run = tmp_path / "run"
    words = ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", run]
    words += ["--trainer.callbacks", "LearningRateMonitor", "--model.total_kimg", 3.84]
    words += ["--fid.every_kimg", "null", "--samples.every_kimg", "null"]
    done = fit(run, *words)
    assert done.code == 0, done.err
    assert "lr-RAdam" in load_rows(run / "metrics.csv")[-1]
    (other,) = run.glob("lightning_logs/version_0/metrics.csv")
    assert any(row["loss"] for row in load_rows(other))
    assert "data_fingerprint" in (other.parent / "hparams.yaml").read_text()
    away = fit(tmp_path / "other", *words)
    assert away.code == 2
    assert "outside the run directory" in away.err


def load_rows(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_goes_on_without_the_weights_it_started_from(fit, tmp_path):
    first, run, moved = tmp_path / "first", tmp_path / "run", tmp_path / "moved"
    assert fit(first, "--model.total_kimg", 0.064).code == 0
    weights = first / "weights" / "ema_0.9"
    words = ["--model.init.path", weights]
    assert fit(run, *words, "--trainer.max_steps", 5).code == 0
    shutil.copytree(run, moved)
    assert fit(run, *words).code == 0
    weights.rename(first / "elsewhere")
    done = fit(moved, *words)
    assert done.code == 0, done.err
    assert f"model.init.path {weights} is gone" in done.out
    assert "SHA" not in done.err
    ends = [load(where / "checkpoints" / "nimg000000000640.ckpt") for where in (run, moved)]
    assert_same(ends[0]["state_dict"], ends[1]["state_dict"])
    origins = [json.loads((where / "run.json").read_text())["origins"] for where in (run, moved)]
    assert origins[0] == origins[1]
    again = fit(tmp_path / "new", *words)
    assert again.code == 2
    assert str(weights) in again.err


def test_the_time_of_a_run_is_not_that_of_one_that_goes_on_elsewhere(fit, tmp_path):
    first = tmp_path / "first"
    limit = ["--trainer.max_time", "00:00:10:00"]
    assert fit(first, *limit, "--trainer.max_steps", 5).code == 0
    path = first / "checkpoints" / "nimg000000000320.ckpt"
    checkpoint = load(path)
    checkpoint["callbacks"]["Timer"]["time_elapsed"]["train"] = 1e6
    torch.save(checkpoint, path)
    done = fit(tmp_path / "second", "--resume", first, *limit)
    assert done.code == 0, done.err
    assert "Finished at 0.64 kimg" in done.out
