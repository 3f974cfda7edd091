"""Every config parses, builds, trains two steps, evaluates, resumes, with its network shrunk."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from cm_lightning.cli import data as data_cli
from cm_lightning.cli import fit, sample
from tests.data.test_readers import write_idx
from tests.toys import REGIMES

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
CLASSES = {"cifar10": 10, "imagenet64": 3}


def test_all_configs_are_collected():
    """Every regime has a config for digits; the published ones have all."""
    names = {f"{regime}_digits" for regime in REGIMES} | {"diffusion_edm2_digits"}
    published = ("cd", "ct", "diffusion", "ect", "gc", "ict", "sct")
    sets = ("fashion", "cifar10", "imagenet64")
    names |= {f"{regime}_{data}" for regime in published for data in sets}
    assert names <= {path.stem for path in CONFIGS}
    assert {path.stem.partition("_")[0] for path in CONFIGS} == set(REGIMES)


def make_data(path: Path, folder: Path) -> list[str]:
    """A tiny data set in the layout that the config's first lines convert; options that name it."""
    kind = path.stem.rsplit("_", 1)[-1]
    rng = np.random.default_rng(0)
    if kind == "fashion":
        images = rng.integers(0, 256, (20, 28, 28))
        write_idx(folder / "set", images=images, labels=np.arange(20) % 10)
        return [f"--data.source.root={folder / 'set'}"]
    if kind == "digits":
        return []
    source, store = folder / "source", folder / "store"
    words = ["convert", str(source), "--out", str(store)]
    if kind == "cifar10":
        source.mkdir()
        for batch in range(1, 3):
            rows = rng.integers(0, 256, (10, 3072), dtype=np.uint8)
            content = {"data": rows, "labels": list(range(10))}
            (source / f"data_batch_{batch}").write_bytes(pickle.dumps(content, protocol=2))
    else:
        for i in range(18):
            picture = rng.integers(0, 256, (70 + i, 90, 3), dtype=np.uint8)
            (source / f"n{i % 3}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(source / f"n{i % 3}" / f"{i}.JPEG")
        words += ["--transform", "center-crop-dhariwal", "--resolution", "64", "--channels", "3"]
    data_cli.main(words)
    return [f"--data.source.path={store}"]


def shrink(path: Path, config: dict, folder: Path) -> list[str]:
    """Options that make any config small."""
    kind = path.stem.rsplit("_", 1)[-1]
    backbone = "--model.denoiser.backbone"
    width = 64 if kind == "imagenet64" else 32
    words = [f"{backbone}.num_blocks=1", f"{backbone}.model_channels={width}"]
    words += ["--data.global_batch=8", "--model.total_kimg=0.016", "--trainer.accelerator=cpu"]
    words += ["--fid.n=6", "--samples.n=2", "--checkpoints.every_kimg=0.008"]
    words += [
        "--diagnostics.picture=false",
        "--diagnostics.teacher_rows=1",
        "--diagnostics.teacher_steps=2",
        "--trainer.precision=32-true",
    ]
    if kind in CLASSES:
        words += ["--fid.features=Timm", "--fid.features.size=32"]
    if kind == "imagenet64":
        words += [f"{backbone}.channel_mult=[1,1]", f"{backbone}.attn_resolutions=[32]"]
        words += ["--data.global_batch=2", "--model.total_kimg=0.004", "--fid.n=2"]
        words += ["--checkpoints.every_kimg=0.002", "--fid.profiles=[live]", "--samples.n=1"]
        words += [f"{backbone}.label_dim=3", "--data.num_workers=0"]
        if config["model"]["init_args"].get("references", {}).get("n"):
            words += ["--model.references.n=3"]
    if "LPIPS" in str(config["model"]["init_args"].get("distance")):
        words += ["--model.distance=PseudoHuber"]  # the weights of VGG16 are not here
    samplers = config["fid"].get("samplers", [])
    if any(sampler["class_path"] == "HeunSampler" for sampler in samplers):
        small = "[{class_path: HeunSampler, init_args: {steps: 2}}]"
        words += [f"--fid.samplers={small}", f"--samples.samplers={small}"]
    return words


def starting(path: Path, config: dict, words: list[str], folder: Path) -> list[str]:
    """Weights the config starts from or distils: a two-step run of the same network."""
    init = config["model"]["init_args"]
    named = [key for key in ("init", "teacher") if isinstance(init.get(key), dict)]
    if not named:
        return []
    run = folder / "start"
    small = "[{class_path: HeunSampler, init_args: {steps: 2}}]"
    model = {"class_path": "Diffusion", "init_args": {"denoiser": init["denoiser"]}}
    if isinstance(init["denoiser"], str):
        text = (path.parent / init["denoiser"]).read_text()
        model["init_args"]["denoiser"] = yaml.safe_load(text)
    if path.stem.startswith("cd"):  # a teacher has plain EDM preconditioning
        denoiser = model["init_args"]["denoiser"]
        denoiser["class_path"] = "EDMPrecond"
        denoiser["init_args"].pop("sigma_min", None)
    start = {key: value for key, value in config.items() if key != "model"} | {"model": model}
    (folder / "start.yaml").write_text(yaml.safe_dump(start))
    kept = [word for word in words if not word.startswith(("--model.dist", "--model.ref"))]
    kept += [f"--fid.samplers={small}", f"--samples.samplers={small}"]
    fit.main(["--config", str(folder / "start.yaml"), "--run_dir", str(run), *kept])
    return [f"--model.{key}.path={run}" for key in named]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_config_trains_two_steps_evaluates_and_samples(path, tmp_path, monkeypatch, capsys):
    config = yaml.safe_load(path.read_text())
    regime = config["model"]["class_path"].lower()
    assert (
        path.stem.startswith("ect" if path.stem == "gc_imagenet64" else regime) or regime == "ect"
    )
    run = tmp_path / "run"
    words = [*shrink(path, config, tmp_path), *make_data(path, tmp_path)]
    words += starting(path, config, words, tmp_path)
    words = ["--config", str(path), "--run_dir", str(run), *words]
    monkeypatch.setattr(sys, "argv", ["cm-fit", *words])
    fit.main()
    record = json.loads((run / "run.json").read_text())
    assert record["results"]["kimg"] in (0.016, 0.004)
    assert record["results"]["last"]
    assert all(np.isfinite(list(record["results"]["last"].values())))
    for checkpoint in (run / "checkpoints").iterdir():
        torch.load(checkpoint, weights_only=True)
    if path.stem.endswith("cifar10") or path.stem == "sct_imagenet64":
        # the first half and a restart end at the same weights
        finished = sorted((run / "checkpoints").iterdir())
        whole = torch.load(finished[-1], weights_only=True)["state_dict"]
        finished[-1].unlink()
        fit.main()
        again = torch.load(finished[-1], weights_only=True)["state_dict"]
        assert all(torch.equal(again[name], value) for name, value in whole.items())
        sample.main([str(run), "--n", "2", "--grid", "--out", str(tmp_path / "pictures")])
        assert (tmp_path / "pictures" / "grid.png").is_file()


def test_missing_data_and_weights_name_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs" / "sct_cifar10.yaml")
    monkeypatch.setattr(sys, "argv", ["cm-fit", "--config", config, "--trainer.accelerator=cpu"])
    with pytest.raises(SystemExit) as stop:
        fit.main()
    assert stop.value.code == 2
    assert "weights/edm_cifar10_vp" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
