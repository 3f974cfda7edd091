"""Mistakes end in one sentence and exit code 2, before anything is written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.cli.conftest import DIGITS, ROOT, TINY
from tests.data.test_readers import write_idx

BACKBONE = "--model.denoiser.backbone"
SIGMAS = "[{class_path: MultistepSampler, init_args: {sigmas: %s}}]"

MISTAKES = {
    "unknown nested key": (
        ["--model.discretization.kimg_per_stag", 3],
        "did you mean 'model.discretization.kimg_per_stage'",
    ),
    "unknown model key": (["--model.total_king", 3], "did you mean 'model.total_kimg'"),
    "abbreviation": (["--model.learning_rate.ramp", 3], "'model.learning_rate.ramp_kimg'"),
    "unknown trainer key": (["--trainer.max_step", 3], "'trainer.max_steps'"),
    "unknown group": (["--modle.total_kimg", 3], "did you mean 'model'"),
    "wrong type": (
        ["--model.discretization.q", "two"],
        "model.discretization.q must be a number, got 'two'",
    ),
    "unknown class": (["--model.distance", "L3"], "there is no class 'L3'"),
    "range": (["--model.discretization.q", 0.5], "q must be greater than 1 and finite, got 0.5"),
    "negative length": (["--model.total_kimg", -1], "total_kimg must be 0.001 (one image) or more"),
    "missing config": (["--config", "nofile.yaml"], "no config file nofile.yaml"),
    "missing folder": (["--data.source", "IDX", "--data.source.root", "/nowhere"], "no folder"),
    "resolution": (["--data.resolution", 12], "the network takes (1, 8, 8)"),
    "network size": ([BACKBONE + ".img_resolution", 7, BACKBONE + ".channel_mult", "[1,1]"], "7"),
    "classes": ([BACKBONE + ".label_dim", 3], "10 classes"),
    "unconditional network": ([BACKBONE + ".label_dim", 0], "built for 0"),
    "negative sigma": (["--fid.samplers", SIGMAS % [-1]], "must lie in 1e-12 to 1e+12, got -1"),
    "rising sigmas": (["--fid.samplers", SIGMAS % [1, 2]], "decrease, got 1 followed by 2"),
    "endless": (["--model.total_kimg", "1e999"], "total_kimg"),
    "optimizer": (["--model.optimizer.lr", -1], "model.optimizer refuses its arguments"),
    "workers": (["--data.num_workers", 2**31], "data.num_workers must be"),
    "seed": (["--seed_everything", -1], "seed_everything"),
    "batch": (["--data.global_batch", 0], "data.global_batch"),
    "micro batch": (["--data.micro_batch", 48], "use 32 or 64"),
    "accumulation": (["--trainer.accumulate_grad_batches", 3], "data.micro_batch"),
    "profile": (["--fid.profiles", "[ema_0.5]"], "ema_0.5"),
    "ema": (["--ema.profiles", "[{class_path: ConstantEMA, init_args: {rate: 2}}]"], "[0, 1)"),
    "checkpoint": (["--resume", "nofile.ckpt"], "there is no nofile.ckpt"),
    "no such device": (["--trainer.accelerator", "abacus"], "abacus"),
    "logger": (["--trainer.logger", "true"], "trainer.logger adds loggers"),
    "precision": (["--trainer.precision", "64-true"], "trainer.precision must be one of"),
    "reference": (["--fid.reference", "nofile.npz"], "nofile.npz"),
    "seed of a part": (["--model.seed=3"], "model.seed cannot be set (in the command line)"),
    "epochs": (["--trainer.max_epochs", 3], "trainer.max_epochs cannot be set"),
    "batches": (["--trainer.limit_train_batches", 3], "trainer.limit_train_batches cannot be set"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(fit, tmp_path, case, monkeypatch):
    arguments, words = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    done = fit(tmp_path / "run", *arguments)
    assert done.code == 2
    message = done.err.strip().splitlines()[-1]
    assert message.startswith("cm-fit: error: ")
    assert words in message
    assert "Traceback" not in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("owner", ["fid", "samples"])
def test_sampling_starts_where_the_model_is_trained(program, tmp_path, owner):
    words = ["--config", ROOT / "configs" / "ict_digits.yaml", "--config", TINY]
    words += ["--model.discretization.sigma_max", 20]
    other = "samples" if owner == "fid" else "fid"
    words += [f"--{other}.samplers", SIGMAS % [20]]
    done = program("cm-fit", *words, "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert f"{owner}.samplers start at the noise level 80, and" in done.err
    assert not (tmp_path / "run").exists()


def test_smallest_levels_of_grid_and_network_agree(program, tmp_path):
    words = ["--config", ROOT / "configs" / "ct_digits.yaml", "--config", TINY]
    words += ["--model.denoiser", "ConsistencyPrecond", "--model.discretization.sigma_min", 0.01]
    done = program("cm-fit", *words, "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert "ends at sigma_min 0.01, where model.denoiser with sigma_min 0.002 is not" in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "option",
    [
        "--model.total_kimg=1",
        "--model.init_args.total_kimg=1",
        "--model=CT",
        "--model.distance.c=0.1",  # the file names a distance
    ],
)
def test_an_option_that_a_later_config_would_replace(program, tmp_path, option):
    done = program("cm-fit", option, "--config", DIGITS, "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert f"stands before --config {DIGITS}, which sets it again" in done.err
    assert not (tmp_path / "run").exists()


def test_options_before_the_config_that_it_does_not_set(program, tmp_path):
    words = ["--config", TINY, "--trainer.max_steps", 1]
    done = program("cm-fit", "--run_dir", tmp_path / "run", "--config", DIGITS, *words)
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "run.json").is_file()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: [", "not valid YAML"),
        ("- 1", "not a config"),
        (
            "model: {class_path: ECT, init_args: {totl_kimg: 3}}",
            "'model.init_args.totl_kimg' of ECT",
        ),
        ("data: {source: Digits, batch: 3}", "'data.batch' of ImageDataModule"),
        ("data: {source: Digits, seed: 3}", "data.seed cannot be set"),
    ],
)
def test_mistakes_in_files(fit, tmp_path, text, words):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    done = fit(tmp_path / "run", "--config", path)
    assert done.code == 2
    assert words in done.err
    assert str(path) in done.err
    assert not (tmp_path / "run").exists()


def test_damaged_data(fit, tmp_path):
    write_idx(tmp_path / "set")
    path = tmp_path / "set" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    source = ("--data.source", "IDX", "--data.source.root", tmp_path / "set")
    done = fit(tmp_path / "run", *source)
    assert done.code == 2
    assert "truncated" in done.err
    write_idx(tmp_path / "set", images=np.full((20, 6, 6), np.nan), code=0x0D)
    done = fit(tmp_path / "run", *source)
    assert done.code == 2
    assert "NaN" in done.err
    write_idx(tmp_path / "set", images=np.zeros((0, 6, 6)), labels=np.zeros(0))
    done = fit(tmp_path / "run", *source)
    assert done.code == 2
    assert "no images" in done.err
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A short finished run, made once."""
    import sys

    from cm_lightning.cli import fit

    path = tmp_path_factory.mktemp("runs") / "run"
    patch = pytest.MonkeyPatch()
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", str(path)]
    patch.setattr(sys, "argv", ["cm-fit", *words, "--trainer.max_steps", "5"])
    patch.setenv("CM_HOME", str(tmp_path_factory.mktemp("home")))
    fit.main()
    patch.undo()
    return path


def content(path: Path) -> dict:
    return {p: p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.discretization.q", 4], "model.init_args.discretization.init_args.q: 2.0 -> 4.0"),
        (["--seed_everything", 1], "seed_everything: 0 -> 1"),
        (["--model.total_kimg", 3], "total_kimg: 0.64 -> 3.0"),
        (["--data.flip", "false"], "data.flip: True -> False"),
        (["--ema.snapshots", "[0.5]"], "ema.snapshots: [] -> [0.5]"),
        (["--ema.profiles", "[ConstantEMA]"], "ema.profiles."),
    ],
)
def test_a_directory_of_another_config_is_left_alone(fit, run_dir, arguments, words):
    before = content(run_dir)
    done = fit(run_dir, *arguments)
    assert done.code == 2
    assert "different config" in done.err
    assert words in done.err
    assert content(run_dir) == before


def test_an_older_checkpoint_does_not_overwrite_newer_ones(fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run).code == 0
    before = content(run)
    done = fit(run, "--resume", run / "checkpoints" / "nimg000000000320.ckpt")
    assert done.code == 2
    assert "nimg000000000640.ckpt" in done.err
    assert content(run) == before


def test_wandb_writes_nothing_before_the_checks(fit, tmp_path):
    words = ("--wandb.project", "test", "--data.resolution", 12)
    assert fit(tmp_path / "run", *words).code == 2
    assert not (tmp_path / "run").exists()


def test_a_directory_that_is_no_run(fit, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("precious")
    done = fit(tmp_path / "run")
    assert done.code == 2
    assert "not a run" in done.err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


def test_checkpoints_that_do_not_fit(fit, run_dir, tmp_path):
    good = next((run_dir / "checkpoints").iterdir())
    done = fit(tmp_path / "run", "--resume", good, BACKBONE + ".num_blocks", 2)
    assert done.code == 2
    assert "another network" in done.err
    bad = tmp_path / "torn.ckpt"
    bad.write_bytes(good.read_bytes()[:1000])
    assert "damaged" in fit(tmp_path / "run", "--resume", bad).err
    foreign = tmp_path / "foreign.ckpt"
    torch.save({"state_dict": {}}, foreign)
    assert "not written by cm_lightning" in fit(tmp_path / "run", "--resume", foreign).err
    write_idx(tmp_path / "set", images=np.zeros((20, 8, 8)), labels=np.arange(20) % 10)
    source = ("--data.source", "IDX", "--data.source.root", tmp_path / "set")
    done = fit(tmp_path / "run", "--resume", good, *source)
    assert done.code == 2
    assert "fingerprint" in done.err
    assert not (tmp_path / "run").exists()


def test_a_pickle_that_would_run_code_is_not_run(fit, program, tmp_path):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return (Path.touch, (canary,))

    path = tmp_path / "evil.ckpt"
    torch.save({"cm_lightning": Evil()}, path)
    done = fit(tmp_path / "run", "--resume", path)
    assert done.code == 2
    assert "not plain data" in done.err
    assert not canary.exists()


def test_checkpoints_are_plain_data(run_dir):
    for path in (run_dir / "checkpoints").iterdir():
        checkpoint = torch.load(path, weights_only=True)
        json.dumps(checkpoint["cm_lightning"])


def test_a_part_in_a_file_of_its_own_is_not_blamed(program, tmp_path):
    config = yaml.safe_load(Path(DIGITS).read_text())
    part = config["model"]["init_args"]["denoiser"]
    (tmp_path / "part.yaml").write_text(yaml.safe_dump(part))
    config["model"]["init_args"]["denoiser"] = "part.yaml"
    (tmp_path / "whole.yaml").write_text(yaml.safe_dump(config))
    for key, value in (("total_kimg", "abc"), ("distance", "Huber")):
        words = ["--config", tmp_path / "whole.yaml", f"--model.{key}", value, "--check"]
        done = program("cm-fit", *words)
        assert done.code == 2
        assert f"model.{key}" in done.err
        assert "part.yaml" not in done.err


def test_weights_given_as_a_run_to_resume(fit, run_dir, tmp_path):
    weights = next((run_dir / "weights").iterdir())
    done = fit(tmp_path / "run", "--resume", weights)
    assert f"{weights} holds weights and no run: start from them with --model.init" in done.err
    done = fit(tmp_path / "run", "--resume", weights / "model.safetensors")
    assert "is no checkpoint of a run" in done.err
