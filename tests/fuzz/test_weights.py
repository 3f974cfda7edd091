"""Damaged checkpoints, weights, run directories, evaluations and statistics."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.fuzz.damage import HARM, MUTATIONS, Evil, files_below, harm, mutate_file, one_of
from tests.fuzz.harness import ROOT, ends_well, examples, refused, workplace


def slowly(*names: str) -> list:
    """Parameters of the slow part."""
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


SAMPLE = ["--n", 2, "--out", "out", "--npz"]
EVAL = ["--n", 66, "--seeds", 0, "--sigmas", 80, "--out", "out"]


def damage_one(place: Path, damage) -> None:
    """Damage bytes, or the values of a document."""
    if isinstance(damage, tuple):
        harm(place, damage)
    elif place.suffix in (".json", ".yaml"):
        mutate_file(place, damage)
    else:
        harm(place, ("flip", damage[0][0] / 10_000, damage[0][0] % 8))


def commands(source: str, run: Path) -> dict[str, list]:
    """Everything that reads weights."""
    fit = ["cm-fit", "--config", run / "config.yaml", "--check", "--run_dir", "none"]
    return {
        "sample": ["cm-sample", source, *SAMPLE],
        "inspect": ["cm-weights", "inspect", source],
        "export": ["cm-weights", "export", source, "--out", "out"],
        "phema": ["cm-weights", "phema", source, "--std", 0.07, "--out", "out"],
        "import": ["cm-weights", "import", source, "--out", "out"],
        "eval": ["cm-eval", source, "--config", run / "config.yaml", *EVAL],
        "init": [*fit, "--model.init.path", source],
        "guided": ["cm-sample", run, *SAMPLE, "--guidance", 1.5, "--worse", source],
    }


READERS = st.sampled_from(["sample", "inspect", "export", "eval", "init", "guided"])


@examples(20)
@given(st.integers(0, 99), st.one_of(HARM, MUTATIONS), READERS)
def test_damaged_folders_of_weights(weights, run, number, damage, reader):
    with workplace(weights) as folder:
        damage_one(one_of(files_below(folder / "weights"), number), damage)
        ends_well(folder, *commands("weights", run)[reader])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("num_blocks", 10**9, "num_blocks must be 100 at most"),
        ("num_blocks", 50, "is of another network: it lacks"),
        ("model_channels", 40_000, "is of another network"),
    ],
)
def test_a_network_much_larger_than_its_weights(weights, run, key, value, message):
    with workplace(weights) as folder:
        path = folder / "weights" / "config.json"
        config = json.loads(path.read_text())
        config["denoiser"]["init_args"]["backbone"]["init_args"][key] = value
        path.write_text(json.dumps(config))
        assert message in refused(folder, *commands("weights", run)["sample"])


RUN_FILES = ("config.yaml", "run.json", "metrics.csv", "eval/eval.json", "newest", "oldest")
RUN_READERS = ("sample", "inspect", "export", "phema", "own", "init", "compare", "eval")
RUN_READERS += ("resume", "continue")


@examples(30)
@given(st.sampled_from(RUN_FILES), st.one_of(HARM, MUTATIONS), st.sampled_from(RUN_READERS))
def test_damaged_runs(run, name, damage, reader):
    with workplace(run) as folder:
        here = folder / "run"
        checkpoints = sorted((here / "checkpoints").iterdir())
        place = {"newest": checkpoints[-1], "oldest": checkpoints[0]}.get(name, here / name)
        damage_one(place, damage)
        if reader == "continue" and place != checkpoints[-1]:
            checkpoints[-1].unlink()
        again = ["cm-fit", "--config", run / "config.yaml", "--run_dir", "run"]
        words = commands("run", run) | {
            "own": ["cm-eval", "run", "--n", 66, "--seeds", 0, 1, "--sigmas", 80],
            "compare": ["cm-compare", "run", run, "--out", "out"],
            "resume": again,
            "continue": again,
        }
        outputs = ("out", "run") if reader in ("own", "resume", "continue") else ("out",)
        ends_well(folder, *words[reader], outputs=outputs)


@examples(20)
@given(
    st.sampled_from(["edm", "openai", "diffusers"]),
    st.integers(0, 99),
    st.one_of(HARM, MUTATIONS),
    st.sampled_from(["sample", "inspect", "import", "init"]),
)
def test_damaged_published_files(published, run, kind, number, damage, reader):
    with workplace(published[kind]) as folder:
        source = published[kind].name
        damage_one(one_of(files_below(folder / source), number), damage)
        words = commands(source, run)[reader]
        more = ["--resolution", 16] if kind == "openai" and "cm-weights" in words else []
        ends_well(folder, *words, *more)


def change_tensors(folder: Path, change) -> None:
    path = folder / "weights" / "model.safetensors"
    tensors = load_file(path)
    change(tensors, max(tensors, key=lambda name: len(tensors[name])))
    save_file(tensors, path)


TENSORS = {
    "nan": lambda t, k: t[k].fill_(float("nan")),
    "shape": lambda t, k: t.update({k: t[k][:1].clone()}),
    "missing": lambda t, k: t.pop(k),
    "more": lambda t, k: t.update(more=torch.zeros(2)),
    "dtype": lambda t, k: t.update({k: t[k].to(torch.int16)}),
    "none": lambda t, k: t.clear(),
}


@pytest.mark.parametrize("reader", ["sample", *slowly("export", "init")])
@pytest.mark.parametrize("case", TENSORS)
def test_other_tensors(weights, run, case, reader):
    with workplace(weights) as folder:
        change_tensors(folder, TENSORS[case])
        done = ends_well(folder, *commands("weights", run)[reader])
        assert done.code == 2


CHECKPOINTS = {
    "evil": lambda c: c | {"cm_lightning": Evil()},
    "list": lambda c: [1],
    "no state": lambda c: c | {"state_dict": None},
    "no tensors": lambda c: c | {"state_dict": {"denoiser.x": 3}},
    "no callbacks": lambda c: c | {"callbacks": []},
    "averages": lambda c: c | {"callbacks": {"EMACallback": {"averages": [1]}}},
    "other averages": lambda c: c | {"callbacks": {"EMACallback": {"averages": {"ema_x": {}}}}},
    "foreign averages": lambda c: (
        c | {"callbacks": {"EMACallback": {"averages": {"ema_x": {"y": torch.zeros(2)}}}}}
    ),
    "nimg": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"nimg": "many"}},
    "negative": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"nimg": -5}},
    "zero": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"nimg": 0}},
    "regime": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"regime": "SCT"}},
    "data": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"data": 5}},
    "other data": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"data": "a" * 64}},
    "borrowed": lambda c: c | {"cm_lightning": c["cm_lightning"] | {"borrowed": {"t": "a" * 64}}},
    "nan": lambda c: c | {"state_dict": {k: v * float("nan") for k, v in c["state_dict"].items()}},
    "optimizer": lambda c: c | {"optimizer_states": [3]},
    "no optimizer": lambda c: c | {"optimizer_states": []},
    "loops": lambda c: c | {"loops": 3},
}


@pytest.mark.parametrize("reader", [*slowly("sample", "init"), "phema", "resume"])
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_other_checkpoints(run, case, reader):
    with workplace(run) as folder:
        (path, newest) = sorted((folder / "run" / "checkpoints").iterdir())
        newest.unlink()
        torch.save(CHECKPOINTS[case](torch.load(path, weights_only=True)), path)
        words = commands("run", run) | {
            "resume": ["cm-fit", "--config", run / "config.yaml", "--run_dir", "run"],
        }
        outputs = ("run", "out") if reader == "resume" else ("out",)
        ends_well(folder, *words[reader], outputs=outputs)


D = 64
STATISTICS = {
    "no sigma": {"mu": np.zeros(D)},
    "shape": {"mu": np.zeros(D), "sigma": np.zeros((D, 3))},
    "size": {"mu": np.zeros(3), "sigma": np.eye(3)},
    "nan": {"mu": np.full(D, np.nan), "sigma": np.eye(D)},
    "text": {"mu": np.full(D, "x"), "sigma": np.eye(D)},
    "objects": {"mu": np.array([Evil()] * D, dtype=object), "sigma": np.eye(D)},
    "complex": {"mu": np.zeros(D, complex), "sigma": np.eye(D)},
    "negative": {"mu": np.zeros(D), "sigma": -np.eye(D)},
    "lopsided": {"mu": np.zeros(D), "sigma": np.triu(np.ones((D, D)))},
    "other data": {"mu": np.zeros(D), "sigma": np.eye(D), "fingerprint": np.array("x")},
    "huge": {"mu": np.full(D, 1e300), "sigma": np.eye(D) * 1e308},
}


@pytest.mark.parametrize("command", ["eval", *slowly("fit")])
@pytest.mark.parametrize("case", STATISTICS)
@pytest.mark.parametrize("kind", ["npz", "pkl"])
def test_other_statistics(run, weights, case, command, kind):
    with workplace() as folder:
        if kind == "npz":
            np.savez(folder / "x.npz", **STATISTICS[case])
        else:
            (folder / "x.pkl").write_bytes(pickle.dumps({"fid": STATISTICS[case]}))
        config = {"fid": {"features": {"class_path": "DigitsFeatures"}, "reference": f"x.{kind}"}}
        (folder / "x.yaml").write_text(json.dumps(config))
        words = {
            "eval": ["cm-eval", weights, "--config", "x.yaml", *EVAL],
            "fit": [
                "cm-fit",
                "--config",
                run / "config.yaml",
                "--check",
                "--fid.reference",
                f"x.{kind}",
            ],
        }
        ends_well(folder, *words[command])


@examples(6)
@given(HARM)
def test_damaged_statistics(statistics, weights, damage):
    with workplace(statistics) as folder:
        harm(folder / "statistics.npz", damage)
        config = {
            "fid": {"features": {"class_path": "DigitsFeatures"}, "reference": "statistics.npz"}
        }
        (folder / "x.yaml").write_text(json.dumps(config))
        ends_well(folder, "cm-eval", weights, "--config", "x.yaml", *EVAL)


def test_folders_that_are_none(run, weights):
    with workplace(weights) as folder:
        (folder / "empty").mkdir()
        shutil.copyfile(ROOT / "README.md", folder / "x.pkl")
        (folder / "weights" / "config.json").unlink()
        for source in ("empty", "weights", "x.pkl", "nowhere", ".", "weights/model.safetensors"):
            for reader in ("sample", "inspect", "export", "phema", "import", "eval", "init"):
                refused(folder, *commands(source, run)[reader])
