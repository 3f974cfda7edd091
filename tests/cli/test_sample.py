"""cm-sample: what it writes, that seeds decide, and what it refuses."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cm_lightning.files import hash_tensors
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
    names = sorted(p.name for p in (tmp_path / "b").iterdir())
    assert names == ["grid.png", "samples.json", "samples.npz"]
    record = json.loads((tmp_path / "b" / "samples.json").read_text())
    assert record["labels"] == [3, 1, 3, 1, 3, 1]
    assert record["sampler"] == "MultistepSampler(sigmas=(80.0,))"
    assert (record["seed"], record["ema"], record["guidance"]) == (0, "ema_0.9", 1.0)
    state = load_weights(run_dir).denoiser.state_dict()
    assert record["weights_sha256"] == hash_tensors(state)
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


@pytest.fixture(scope="module")
def snapshots(tmp_path_factory):
    """A run that keeps its averages at half time, with a label-free case."""
    from cm_lightning.cli import fit as program
    from tests.cli.conftest import DIGITS, TINY

    run = tmp_path_factory.mktemp("runs") / "run"
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", str(run), "--fid.n", "66"]
    words += ["--model.denoiser.backbone.label_dropout", "0.1", "--ema.snapshots", "[0.5]"]
    program.main(words)
    return run


def test_guidance_by_a_snapshot_another_run_and_missing_labels(program, snapshots, tmp_path):
    assert (snapshots / "weights" / "ema_0.9@0.5" / "model.safetensors").is_file()
    images = {}
    for name, words in {
        "plain": [],
        "one": ["--guidance", 1, "--worse_ema", "ema_0.9@0.5"],
        "snapshot": ["--guidance", 2, "--worse_ema", "ema_0.9@0.5"],
        "folder": ["--guidance", 2, "--worse", snapshots / "weights" / "ema_0.9@0.5"],
        "free": ["--guidance", 2],
    }.items():
        out = tmp_path / name
        done = program("cm-sample", snapshots, "--n", 5, "--npz", "--out", out, *words)
        assert done.code == 0, done.err
        calls = 1 if name in ("plain", "one") else 2
        assert f"{calls} network calls each" in done.out
        images[name] = np.load(out / "samples.npz")["arr_0"]
    assert np.array_equal(images["plain"], images["one"])
    assert np.array_equal(images["snapshot"], images["folder"])
    assert not np.array_equal(images["plain"], images["snapshot"])
    assert not np.array_equal(images["free"], images["snapshot"])
    sweep = ["--guidance", 1, 2, "--worse_ema", "ema_0.9@0.5", "--out", tmp_path / "sweep"]
    assert program("cm-sample", snapshots, "--n", 5, "--npz", *sweep).code == 0
    for scale, name in ((1, "plain"), (2, "snapshot")):
        swept = np.load(tmp_path / "sweep" / f"guidance{scale}" / "samples.npz")["arr_0"]
        assert np.array_equal(swept, images[name])


def test_phases_and_edge_skipping(program, snapshots, tmp_path):
    images = {}
    for name, words in {
        "one": ["--phases", 1],
        "step": ["--sigmas", 80],
        "four": ["--phases", 4],
        "skip": ["--phases", 4, "--eta", 0.8],
        "edges": ["--phases", 0, 2.5, 80],
    }.items():
        out = tmp_path / name
        done = program("cm-sample", snapshots, "--n", 5, "--npz", "--out", out, *words)
        assert done.code == 0, done.err
        images[name] = np.load(out / "samples.npz")["arr_0"]
    assert np.array_equal(images["one"], images["step"])
    assert len({image.tobytes() for image in images.values()}) == 4


MISTAKES = {
    "eta": ({}, ["--phases", "4", "--eta", "1.5"], "eta must lie in (0, 1], got 1.5"),
    "eta alone": ({}, ["--eta", "0.5"], "--eta belongs to --phases"),
    "edges": ({}, ["--phases", "0", "3", "2"], "edges must increase"),
    "half a phase": ({}, ["--phases", "1.5"], "no number of phases"),
    "snapshot": ({}, ["--guidance", "2", "--worse_ema", "ema_0.9@0.3"], "ema_0.9@0.3"),
    "guidance": ({}, ["--guidance", "2"], "label_dropout"),
    "negative guidance": ({}, ["--guidance=-1", "--worse_ema", "live"], "0 or more"),
    "twice": ({}, ["--guidance", "2", "2", "--worse_ema", "live"], "twice"),
    "guide alone": ({}, ["--worse_ema", "live"], "belong to --guidance"),
    "nothing there": ({"source": "nowhere"}, [], "no run directory, checkpoint or weights"),
    "negative": ({}, ["--sigmas", "-1"], "must lie in 1e-12 to 1e+12, got -1"),
    "beyond fp32": ({}, ["--sigmas", "1e39"], "must lie in 1e-12 to 1e+12, got 1e+39"),
    "an edge beyond fp32": ({}, ["--phases", "0", "1e39"], "must increase and be 1e+12 at most"),
    "a million phases": ({}, ["--phases", "1000000"], "phases must be 1 to 100, got 1000000"),
    "rising": ({}, ["--sigmas", "0.8", "80"], "decrease"),
    "label": ({}, ["--labels", "10"], "0..9"),
    "number": ({}, ["--n", "0"], "a whole number from 1"),
    "seed": ({}, ["--seed", "-1"], "--seed"),
    "profile": ({}, ["--ema", "ema_0.5"], "no EMA profile 'ema_0.5'"),
    "both": ({}, ["--sigmas", "80", "--heun", "4"], "exclude"),
    "device": ({}, ["--device", "cuda:77"], "cuda:77"),
    "option": ({}, ["--sigma", "80"], "unrecognized arguments: --sigma"),
    "type": ({}, ["--n", "many"], "a whole number from 1"),
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


def test_images_that_are_not_finite_are_not_written(program, run_dir, tmp_path):  # noqa: F811
    weights = tmp_path / "weights"
    shutil.copytree(run_dir / "weights" / "ema_0.9", weights)
    tensors = load_file(weights / "model.safetensors")
    save_file({k: v * 1e30 for k, v in tensors.items()}, weights / "model.safetensors")
    done = program("cm-sample", weights, "--n", 3, "--grid", "--out", tmp_path / "out")
    assert done.code == 2
    assert f"3 of 3 images of {weights} are not finite" in done.err
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
