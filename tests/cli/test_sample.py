"""cm-sample: what it writes, that seeds decide, and what it refuses."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from cm_lightning.weights import from_pretrained, load_weights
from tests.cli.test_errors import content, run_dir  # noqa: F401  (fixture)


def pixels(path) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(path))


def test_png_files_grid_and_npz(program, run_dir, tmp_path):  # noqa: F811
    done = program("cm-sample", run_dir, "--sigmas", 80, 0.821, "--n", 6, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert len(list((tmp_path / "a").glob("*.png"))) == 6
    assert pixels(tmp_path / "a" / "000005.png").shape == (8, 8)
    both = ("--grid", "--npz", "--out", tmp_path / "b", "--labels", 3, 1)
    assert program("cm-sample", run_dir, "--n", 6, *both).code == 0
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["grid.png", "samples.npz"]
    arrays = np.load(tmp_path / "b" / "samples.npz")
    assert arrays["arr_0"].shape == (6, 8, 8, 3)
    assert arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].tolist() == [3, 1, 3, 1, 3, 1]


def test_the_seed_decides_and_the_batch_does_not(program, run_dir, tmp_path):  # noqa: F811
    images = {}
    for name, options in {
        "whole": ("--batch", 40),
        "small": ("--batch", 7),
        "fewer": ("--batch", 64, "--n", 9),
        "other": ("--seed", 1),
    }.items():
        words = ("--sigmas", 80, 0.821, "--n", 40, "--npz", "--out", tmp_path / name)
        assert program("cm-sample", run_dir, *words, *options).code == 0
        images[name] = np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int)
    # a batch of another size may round differently in the last bit of a float
    assert np.abs(images["whole"] - images["small"]).max() <= 1
    assert (images["whole"] == images["small"]).mean() > 0.999
    assert np.abs(images["whole"][:9] - images["fewer"]).max() <= 1
    assert (images["whole"] != images["other"]).mean() > 0.5


def test_a_run_its_checkpoint_and_its_weights_agree(program, fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run).code == 0
    sources = {
        "run": (run,),
        "checkpoint": (run / "checkpoints" / "nimg000000000640.ckpt",),
        "weights": (run / "weights" / "ema_std0.100",),
    }
    images = {}
    for name, source in sources.items():
        extra = () if name == "weights" else ("--ema", "ema_std0.100")
        words = ("--n", 5, "--npz", "--out", tmp_path / name)
        done = program("cm-sample", *source, *extra, *words)
        assert done.code == 0, done.err
        images[name] = np.load(tmp_path / name / "samples.npz")["arr_0"]
    assert np.array_equal(images["run"], images["checkpoint"])
    assert np.array_equal(images["run"], images["weights"])
    checkpoint = torch.load(sources["checkpoint"][0], weights_only=True)
    averages = checkpoint["callbacks"]["EMACallback"]["averages"]
    loaded = from_pretrained(run).state_dict()
    for name, value in averages["ema_0.9"].items():
        assert torch.equal(loaded[name], value)
    live = load_weights(run, "live").denoiser.state_dict()
    for name, value in live.items():
        assert torch.equal(checkpoint["state_dict"][f"denoiser.{name}"], value)


MISTAKES = {
    "nothing there": ({"source": "nowhere"}, [], "no run directory, checkpoint or weights"),
    "negative": ({}, ["--sigmas", "-1"], "positive and finite, got -1"),
    "rising": ({}, ["--sigmas", "0.8", "80"], "decrease"),
    "label": ({}, ["--labels", "10"], "0..9"),
    "number": ({}, ["--n", "0"], "1 or more"),
    "seed": ({}, ["--seed", "-1"], "--seed"),
    "profile": ({}, ["--ema", "ema_0.5"], "no EMA profile 'ema_0.5'"),
    "both": ({}, ["--sigmas", "80", "--heun", "4"], "exclude"),
    "device": ({}, ["--device", "cuda:77"], "cuda:77"),
    "option": ({}, ["--sigma", "80"], "unrecognized arguments: --sigma"),
    "type": ({}, ["--n", "many"], "invalid int value"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(program, run_dir, tmp_path, case):  # noqa: F811
    source, arguments, words = MISTAKES[case]
    where = source.get("source", run_dir)
    done = program("cm-sample", where, "--out", tmp_path / "out", *arguments)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(program, run_dir, tmp_path):  # noqa: F811
    words = ("cm-sample", run_dir, "--n", 2, "--out", tmp_path / "out")
    assert program(*words).code == 0
    before = content(tmp_path / "out")
    done = program(*words, "--seed", 5)
    assert done.code == 2
    assert "exists already" in done.err
    assert content(tmp_path / "out") == before


def test_weights_cannot_name_foreign_classes(program, tmp_path):
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"")
    config = {"format": 1, "denoiser": {"class_path": "os.system", "init_args": {"command": "id"}}}
    (folder / "config.json").write_text(json.dumps(config))
    done = program("cm-sample", folder, "--out", tmp_path / "out")
    assert done.code == 2
    assert "os.system" in done.err
