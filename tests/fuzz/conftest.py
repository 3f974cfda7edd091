"""What is damaged: one good example of everything that the commands read, made once."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from cm_lightning.weights import build_denoiser, write_diffusers
from tests.data.test_readers import write_idx
from tests.fuzz.harness import ROOT, call
from tests.toys import REGIMES
from tests.weights.test_edm_pickle import CASES, install_foreign, persistent
from tests.weights.test_openai import FILES, state_of

collect_ignore_glob = [] if sys.platform == "linux" else ["test_*.py"]  # memory is read in /proc


@pytest.fixture(scope="session", autouse=True)
def _home(tmp_path_factory):
    """Caches, downloads and the network are out of reach for the whole session."""
    patch = pytest.MonkeyPatch()
    patch.setenv("CM_HOME", str(tmp_path_factory.mktemp("home")))
    patch.setenv("CM_OFFLINE", "1")
    patch.delenv("WANDB_API_KEY", raising=False)
    yield
    patch.undo()


@pytest.fixture(scope="session")
def resolved(tmp_path_factory) -> dict[str, dict]:
    """Complete configs of every regime, each key with its value, shrunk to a step."""
    found = {}
    for name in REGIMES:
        words = [
            "--config",
            ROOT / f"configs/{name}_digits.yaml",
            "--config",
            ROOT / "tests/tiny.yaml",
        ]
        done = call("cm-fit", *words, "--check", "--print_config")
        assert done.code == 0, done.err
        content = yaml.safe_load(done.out)
        found[name] = content
    return found


def make(*words: object) -> None:
    """Run a command that must succeed."""
    done = call(*map(str, words))
    assert done.code == 0, done.err


@pytest.fixture(scope="session")
def run(tmp_path_factory) -> Path:
    """A finished run with two PowerEMA profiles, a snapshot and an evaluation."""
    path = tmp_path_factory.mktemp("good") / "run"
    profiles = [{"class_path": "PowerEMA", "init_args": {"std": std}} for std in (0.05, 0.1)]
    words = ["--config", ROOT / "configs/ect_digits.yaml", "--config", ROOT / "tests/tiny.yaml"]
    words += ["--ema.profiles", json.dumps(profiles), "--ema.snapshots", "[0.5]"]
    make("cm-fit", *words, "--run_dir", path, "--checkpoints.keep", 2)
    make("cm-eval", path, "--n", 66, "--seeds", 0, 1, "--sigmas", 80)
    return path


@pytest.fixture(scope="session")
def weights(run) -> Path:
    """A folder of portable weights."""
    make("cm-weights", "export", run, "--out", run.parent / "weights")
    return run.parent / "weights"


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    """A store of images like those of the run."""
    root = tmp_path_factory.mktemp("images")
    write_idx(
        root / "idx", images=np.arange(40 * 64).reshape(40, 8, 8) % 256, labels=np.arange(40) % 10
    )
    make("cm-data", "convert", root / "idx", "--out", root / "store")
    return root / "store"


@pytest.fixture(scope="session")
def statistics(store) -> Path:
    """Reference statistics of it."""
    path = store.parent / "statistics.npz"
    make("cm-data", "stats", store, "--features", "DigitsFeatures", "--out", path)
    return path


@pytest.fixture(scope="session")
def published(tmp_path_factory) -> dict[str, Path]:
    """Weights in the form of other projects: an EDM pickle, OpenAI's .pt, a folder of diffusers."""
    root = tmp_path_factory.mktemp("published")
    patch = pytest.MonkeyPatch()
    foreign = install_foreign(patch)
    build, name, arguments = CASES["song"]
    described = foreign[1].EasyDict(img_resolution=16, img_channels=3, **arguments)
    stored = persistent(build(), foreign, name, described)
    (root / "edm.pkl").write_bytes(pickle.dumps({"ema": stored, "dataset_kwargs": {}}))
    patch.undo()
    golden = json.loads(FILES[0].read_text())
    torch.save(state_of(golden), root / "openai.pt")
    init = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 128}
    init |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": [], "dropout": 0.0}
    backbone = {"class_path": "cm_lightning.networks.ADMUNet", "init_args": init}
    config = {
        "class_path": "cm_lightning.networks.ConsistencyPrecond",
        "init_args": {"noise_scale": 1000.0, "backbone": backbone},
    }
    write_diffusers(root / "diffusers", config, build_denoiser(config, "test").state_dict())
    return {"edm": root / "edm.pkl", "openai": root / "openai.pt", "diffusers": root / "diffusers"}
