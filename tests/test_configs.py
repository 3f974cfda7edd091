"""Every config parses, builds, trains two steps and evaluates, with its network shrunk."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cm_lightning.cli import fit
from tests.data.test_readers import write_idx

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def test_all_configs_are_collected():
    regimes = ("cd", "ct", "diffusion", "ect", "gc", "ict", "sct")
    names = {f"{regime}_{data}" for regime in regimes for data in ("digits", "fashion")}
    assert {path.stem for path in CONFIGS} == names | {"diffusion_edm2_digits"}


def shrink(path: Path, config: dict, tmp_path: Path) -> list[str]:
    """Options that make any config small; a source that is not here becomes one made here."""
    backbone = "--model.denoiser.backbone"
    words = [f"{backbone}.num_blocks=1", f"{backbone}.model_channels=32"]
    words += ["--data.global_batch=8", "--model.total_kimg=0.016", "--trainer.accelerator=cpu"]
    words += ["--fid.n=6", "--samples.n=2", "--checkpoints.every_kimg=0.008"]
    source = config["data"]["source"]
    if source != "Digits":
        size = 28
        images = np.random.default_rng(0).integers(0, 256, (20, size, size))
        write_idx(tmp_path / "set", images=images, labels=np.arange(20) % 10)
        words += [f"--data.source.root={tmp_path / 'set'}"]
    samplers = config["fid"].get("samplers", [])
    if any(sampler["class_path"] == "HeunSampler" for sampler in samplers):
        small = "[{class_path: HeunSampler, init_args: {steps: 2}}]"
        words += [f"--fid.samplers={small}", f"--samples.samplers={small}"]
    if "teacher" in config["model"]["init_args"]:
        words += [f"--model.teacher.path={teacher(path, words, tmp_path)}"]
    return words


def teacher(path: Path, words: list[str], tmp_path: Path) -> Path:
    """The run that a config's teacher comes from, as short as the config's own."""
    run = tmp_path / "teacher"
    config = path.with_name(path.name.replace("cd_", "diffusion_"))
    small = "[{class_path: HeunSampler, init_args: {steps: 2}}]"
    words = [*words, f"--fid.samplers={small}", f"--samples.samplers={small}"]
    fit.main(["--config", str(config), "--run_dir", str(run), *words])
    return run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_two_steps_and_evaluates(path, tmp_path, monkeypatch):
    config = yaml.safe_load(path.read_text())
    assert path.stem.startswith(config["model"]["class_path"].lower())
    run = tmp_path / "run"
    words = ["--config", str(path), "--run_dir", str(run), *shrink(path, config, tmp_path)]
    monkeypatch.setattr(sys, "argv", ["cm-fit", *words])
    fit.main()
    record = json.loads((run / "run.json").read_text())
    assert record["results"]["kimg"] == 0.016
    assert record["results"]["last"]
    assert all(np.isfinite(list(record["results"]["last"].values())))
    for checkpoint in (run / "checkpoints").iterdir():
        torch.load(checkpoint, weights_only=True)
