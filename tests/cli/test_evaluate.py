"""cm-eval: the callback's value, resuming, sweeps, guidance, several devices, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from cm_lightning.cli import evaluate
from cm_lightning.cli.evaluate_results import Book, Cell
from cm_lightning.types import InputError
from tests.cli.conftest import ROOT, TINY, Done

METRIC = "fd_digits66/ema_0.9/nfe"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A short SCT run with snapshots, shared by the tests, which only read it."""
    from cm_lightning.cli import fit

    run = tmp_path_factory.mktemp("trained") / "run"
    words = ["--config", ROOT / "configs" / "sct_digits.yaml", "--config", TINY]
    words += ["--run_dir", run, "--ema.snapshots", "[0.5]"]
    patch = pytest.MonkeyPatch()
    patch.setenv("CM_HOME", str(run.parent / "home"))
    patch.setattr(sys, "argv", ["cm-fit", *map(str, words)])
    fit.main()
    yield run
    patch.undo()


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("CM_HOME", str(trained.parent / "home"))
    shutil.copytree(trained, tmp_path / "run")
    return tmp_path / "run"


def results(out: Path) -> list[dict]:
    return json.loads((out / "eval.json").read_text())["results"]


def test_equals_the_value_of_training_and_adds_seeds(run, program):
    done = program("cm-eval", run, "--n", 66, "--seeds", 0)
    assert done.code == 0, done.err
    last = json.loads((run / "run.json").read_text())["results"]["last"]
    rows = results(run / "eval")
    assert [row["nfe"] for row in rows] == [1, 2]
    for row in rows:
        assert row["fd"] == pytest.approx(last[f"{METRIC}{row['nfe']}"], rel=1e-6)
    before = json.loads((run / "eval" / "eval.json").read_text())
    assert program("cm-eval", run, "--n", 66, "--seeds", 0, 5).code == 0
    after = results(run / "eval")
    assert [row for row in after if row["seed"] == 0] == before["results"]
    one, two = (row["fd"] for row in after if row["nfe"] == 1)
    assert one != two
    text = (run / "eval" / "eval.md").read_text()
    assert f"{(one + two) / 2:.4g} ± {abs(one - two) / np.sqrt(2):.2g}" in text
    assert "66 samples per seed" in text


def test_other_features_by_their_class(run, program):
    """A run that names features which are not here is compared over others all the same."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["fid"]["features"] = {"class_path": "Inception", "init_args": {"weights": "none.pth"}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    words = ["cm-eval", run, "--n", 66, "--seeds", 0, "--sigmas", 80]
    assert program(*words).code == 2
    done = program(*words, "--features", "DigitsFeatures")
    assert done.code == 0, done.err
    last = json.loads((run / "run.json").read_text())["results"]["last"]
    assert results(run / "eval")[0]["fd"] == pytest.approx(last[f"{METRIC}1"], rel=1e-6)
    wrong = program(*words, "--features", "Nonsense")
    assert wrong.code == 2
    assert "--features Nonsense" in wrong.err
    elsewhere = program(*words, "--features", "os.path.X")
    assert elsewhere.code == 2
    assert "classes come from cm_lightning alone" in elsewhere.err


def test_a_recipe_without_features_means_inception(run, program):
    """As in cm-fit; its weights are not here."""
    (run / "recipe.yaml").write_text("data: {source: Digits}\nfid: {n: 66}\n")
    words = ["--config", run / "recipe.yaml", "--n", 66, "--seeds", 0, "--sigmas", 80]
    done = program("cm-eval", run, *words, "--out", run / "usual")
    assert done.code == 2
    assert "CM_INCEPTION_WEIGHTS" in done.err


def test_a_killed_evaluation_continues(run, program, monkeypatch):
    words = ["cm-eval", run, "--n", 66, "--seeds", 0, 1, "--sigmas", 80, "--out"]
    assert program(*words, run / "whole").code == 0
    real, count = evaluate.scores, []

    def dies(*arguments, **options):
        count.append(1)
        if len(count) == 2:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    monkeypatch.setattr(evaluate, "scores", dies)
    stopped = program(*words, run / "parts")
    assert stopped.code == 130
    assert stopped.err.startswith("cm-eval: error: interrupted. Files")
    monkeypatch.setattr(evaluate, "scores", real)
    assert len(results(run / "parts")) == 1
    assert program(*words, run / "parts").code == 0
    for a, b in zip(results(run / "whole"), results(run / "parts"), strict=True):
        assert (a["fd"], a["seed"]) == (b["fd"], b["seed"])


def test_phases_eta_guidance_and_diffusion_samplers(run, program):
    words = ["cm-eval", run, "--n", 66, "--seeds", 0]
    assert program(*words, "--phases", 4, "--eta", 1, 0.8, "--euler", 3, "--heun", 2).code == 0
    guided = [*words, "--sigmas", 80, "--guidance", 1, 1.5, "--worse_ema", "ema_0.9@0.5"]
    assert program(*guided).code == 0
    rows = {(row["sampling"], row["guidance"]): row for row in results(run / "eval")}
    assert len(rows) == 6
    assert rows["phases 0 0.1698 2.515 17.53 80, eta 0.8", 1.0]["nfe"] == 4
    assert rows["euler, 3 calls", 1.0]["nfe"] == rows["heun, 3 calls", 1.0]["nfe"] == 3
    plain, strong = rows["sigmas 80", 1.0], rows["sigmas 80", 1.5]
    assert (plain["nfe"], strong["nfe"]) == (1, 2)
    assert plain["worse"] is None
    assert len(strong["worse"]) == 64
    assert plain["fd"] != strong["fd"]
    words += ["--sigmas", 80, "--guidance", 1.5, "--worse", run / "weights" / "ema_0.9@0.5"]
    done = program(*words, "--out", run / "eval")
    assert done.code == 0, done.err
    table = (run / "eval" / "eval.md").read_text()
    assert "| 1.5 by ema_0.9@0.5 |" in table
    snapshot = ["cm-eval", run, "--n", 66, "--seeds", 0, "--sigmas", 80, "--ema", "ema_0.9@0.5"]
    assert program(*snapshot).code == 0  # of another moment, in the same folder


def test_a_sweep_of_the_middle_level_draws_its_curve(run, program):
    done = program("cm-eval", run, "--n", 66, "--seeds", 0, "--mid", 0.2, 3.2, 3)
    assert done.code == 0, done.err
    assert [row["sampling"] for row in results(run / "eval")] == [
        "sigmas 80 0.2",
        "sigmas 80 0.8",
        "sigmas 80 3.2",
    ]
    assert (run / "eval" / "mid.png").read_bytes().startswith(b"\x89PNG")


def test_samples_are_those_of_cm_sample(run, program, tmp_path):
    words = ["--n", 66, "--sigmas", 80]
    assert program("cm-eval", run, *words, "--seeds", 3, "--npz").code == 0
    kept = np.load(run / "eval" / "ema_0.9-sigmas-80.npz")
    labels = [str(label) for label in kept["arr_1"]]
    words += ["--seed", 3, "--npz", "--out", tmp_path / "drawn", "--labels", *labels]
    assert program("cm-sample", run, *words).code == 0
    drawn = np.load(tmp_path / "drawn" / "samples.npz")
    assert np.abs(kept["arr_0"].astype(int) - drawn["arr_0"]).max() <= 1
    (run / "eval" / "ema_0.9-sigmas-80.npz").unlink()
    assert program("cm-eval", run, "--n", 66, "--sigmas", 80, "--seeds", 3, "--npz").code == 0
    assert (run / "eval" / "ema_0.9-sigmas-80.npz").is_file()  # the distance was there already


def test_weights_without_a_run_need_a_config(run, program, tmp_path):
    weights = run / "weights" / "ema_0.9"
    done = program("cm-eval", weights, "--n", 66)
    assert done.code == 2
    assert "give --config" in done.err
    words = ["--n", 66, "--seeds", 0, "--sigmas", 80, "--out", tmp_path / "out"]
    assert program("cm-eval", weights, "--config", run / "config.yaml", *words).code == 0
    assert program("cm-eval", run, *words[:-1], run / "eval").code == 0
    assert results(tmp_path / "out")[0]["fd"] == results(run / "eval")[0]["fd"]


def test_weights_that_say_nothing_of_themselves(run, program, tmp_path):
    """All but the network is optional in config.json; a format of the future is refused."""
    weights = tmp_path / "weights"
    shutil.copytree(run / "weights" / "ema_0.9", weights)
    file = weights / "config.json"
    whole = json.loads(file.read_text())
    file.write_text(json.dumps({"denoiser": whole["denoiser"], "kimg": None}))
    done = program("cm-sample", weights, "--n", 2, "--out", tmp_path / "a")
    assert done.code == 0, done.err
    assert "2 images (unknown, unknown, 1 network calls each)" in done.out
    words = ["--config", run / "config.yaml", "--n", 66, "--seeds", 0, "--sigmas", 80]
    done = program("cm-eval", weights, *words, "--out", tmp_path / "b")
    assert done.code == 0, done.err
    assert program("cm-weights", "export", weights, "--out", tmp_path / "c").code == 0
    file.write_text(json.dumps(whole | {"format": 2}))
    done = program("cm-sample", weights, "--n", 2, "--out", tmp_path / "d")
    assert done.code == 2
    assert "has another format than 1" in done.err


def test_statistics_from_a_file(run, program, tmp_path):
    from cm_lightning.cli.evaluate_samples import read_against
    from cm_lightning.evaluation import reference_statistics

    config = yaml.safe_load((run / "config.yaml").read_text())
    against = read_against(config, "test")
    against.data.prepare_data()
    against.data.setup()
    found = reference_statistics(
        against.data.store.images, "", against.extractor, cache=None, device="cpu"
    )
    np.savez(tmp_path / "stats.npz", mu=found.mu, sigma=found.sigma)
    (tmp_path / "eval.yaml").write_text(
        yaml.safe_dump(
            {"fid": {"features": "DigitsFeatures", "reference": str(tmp_path / "stats.npz")}}
        )
    )
    words = ["--n", 66, "--seeds", 0, "--sigmas", 80]
    done = program(
        "cm-eval", run, "--config", tmp_path / "eval.yaml", *words, "--out", tmp_path / "a"
    )
    assert done.code == 0, done.err
    assert program("cm-eval", run, *words, "--out", tmp_path / "b").code == 0
    a, b = results(tmp_path / "a")[0], results(tmp_path / "b")[0]
    # labels go 0, 1, 2, ... without data; pictures of a barely trained model show none of it
    assert a["fd"] == pytest.approx(b["fd"], rel=1e-9)
    done = program(
        "cm-eval",
        run,
        "--config",
        tmp_path / "eval.yaml",
        *words,
        "--scores",
        "kid",
        "--out",
        tmp_path / "c",
    )
    assert "only their statistics" in done.err


def test_two_processes_equal_one(run, tmp_path):
    outs = []
    for devices in (1, 2):
        out = tmp_path / str(devices)
        words = [
            sys.executable,
            "-m",
            "cm_lightning.cli.evaluate",
            run,
            "--n",
            "67",
            "--seeds",
            "0",
        ]
        words += ["--accelerator", "cpu", "--devices", str(devices), "--out", out, "--npz"]
        done = subprocess.run(
            words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Written to") == 1
        outs.append(out)
    for a, b in zip(*map(results, outs), strict=True):
        assert a["fd"] == pytest.approx(b["fd"], rel=1e-6)
    name = "ema_0.9-sigmas-80.npz"
    one, two = (np.load(out / name)["arr_0"].astype(int) for out in outs)
    assert len(one) == 67
    assert np.abs(one - two).max() <= 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--n", "1"], "at least 2 samples"),
        (["--n", "0"], "--n: a whole number from 1 to 10,000,000 is needed, not '0'"),
        (["--seeds", "0", "0"], "once each"),
        (["--sigmas", "80", "90"], "must decrease"),
        (["--sigmas", "80", "--sigmas", "80"], "asked for twice"),
        (["--mid", "3", "1", "4"], "0 < LOW < HIGH"),
        (["--mid", "3", "x", "4"], "two levels and a number"),
        (["--mid", "1", "3", "4", "--scores", "prc"], "--mid draws Frechet distances"),
        (["--phases", "4", "--eta", "1.5"], "(0, 1]"),
        (["--phases", "0", "3", "2"], "increase"),
        (["--eta", "0.5"], "--eta belongs to --phases"),
        (["--ema", "ema_9"], "no EMA profile 'ema_9'"),
        (["--worse_ema", "ema_0.9@0.5"], "belong to --guidance"),
        (["--guidance", "2", "--worse_ema", "ema_0.9@0.25"], "no EMA profile 'ema_0.9@0.25'"),
        (["--guidance", "2"], "label_dropout"),
        (["--scores", "fid"], "'fid' is unknown"),
        (["--scores", "kid"], "subsets of 1000"),
        (["--config", "none.yaml"], "no config none.yaml"),
    ],
)
def test_mistakes(run, program, words, message):
    done: Done = program("cm-eval", run, "--n", "66", *words)
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (run / "eval" / "eval.json").exists()


def test_results_of_something_else_are_not_mixed(run, program):
    assert program("cm-eval", run, "--n", 66, "--seeds", 0, "--sigmas", 80).code == 0
    done = program("cm-eval", run, "--n", 67, "--seeds", 0, "--sigmas", 80)
    assert done.code == 2
    assert "measured with another n (66, now 67): choose another --out" in done.err


def test_weights_of_one_table(tmp_path):
    """Other averages of the same moment may join; the same average of another run may not."""
    identity = {
        "source": "run",
        "weights": {"ema_0.9": "a"},
        "regime": "ECT",
        "kimg": 1.0,
        "n": 8,
        "features": "digits",
        "features_sha256": "f",
        "reference": "set",
        "data_fingerprint": "d",
    }

    def book(**changes) -> Book:
        return Book(tmp_path, identity | changes)

    cell = Cell("ema_0.9", 1.0, None, None, "sigmas 80", None, 0)
    book().add(cell, 1, {"fd": 1.0}, 0.1, torch.device("cpu"))
    assert book(source="elsewhere").found(cell)["fd"] == 1
    joined = book(weights={"live": "b"})
    assert joined.identity["weights"] == {"ema_0.9": "a", "live": "b"}
    assert book(weights={"ema_0.9@0.5": "c"}, kimg=0.5).found(cell)["fd"] == 1
    for changes, words in (
        ({"weights": {"ema_0.9": "b"}}, "another weights"),
        ({"weights": {"live": "b"}, "kimg": 2.0}, r"another kimg \(1.0, now 2.0\)"),
        ({"regime": "SCT"}, "another regime"),
        ({"features_sha256": "g"}, "another features_sha256"),
        ({"reference": "file"}, "another reference"),
        ({"data_fingerprint": "e"}, "another data_fingerprint"),
    ):
        with pytest.raises(InputError, match=words):
            book(**changes)


def test_exported_weights_know_their_run(run, program, tmp_path):
    done = program("cm-weights", "export", run, "--ema", "live", "--out", tmp_path / "out")
    assert done.code == 0, done.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    record = json.loads((run / "run.json").read_text())
    assert config["data_fingerprint"] == record["data_fingerprint"]
    assert (config["regime"], config["ema"]) == ("SCT", "live")
    assert config["kimg"] == record["results"]["kimg"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| data, SHA-256 | {record['data_fingerprint']} |" in card
    assert f"| length of training | {config['kimg']:g} thousand images |" in card


def test_classes_of_other_packages_are_refused(run, program):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["fid"]["features"] = {"class_path": "subprocess.Popen", "init_args": {"args": "ls"}}
    (run / "evil.yaml").write_text(yaml.safe_dump(config))
    done = program("cm-eval", run, "--config", run / "evil.yaml", "--n", 66)
    assert done.code == 2
    assert "names the class 'subprocess.Popen'" in done.err


def test_guiding_weights_are_named_apart(tmp_path):
    model = SimpleNamespace(worse=object())
    named = {
        ("runs/a/checkpoints/nimg000000020000.ckpt", None): "a/nimg000000020000.ckpt",
        ("runs/b/checkpoints/nimg000000020000.ckpt", None): "b/nimg000000020000.ckpt",
        ("runs/b", "ema_0.9"): "runs/b ema_0.9",
        ("runs/b/weights/ema_0.9", None): "b/ema_0.9",
        ("runs/b/weights/ema_0.99", None): "b/ema_0.99",
        ("runs/b", "ema_0.99"): "runs/b ema_0.99",
        (None, "ema_0.9@0.5"): "ema_0.9@0.5",
    }
    for (worse, ema), name in named.items():
        options = SimpleNamespace(worse=worse, worse_ema=ema)
        assert evaluate.guiding(model, options) == name


def test_data_of_another_shape_are_refused(run, program, tmp_path):
    text = "data: {source: Digits, resolution: 16}\nfid: {features: DigitsFeatures, n: 66}\n"
    (tmp_path / "other.yaml").write_text(text)
    words = ["--config", tmp_path / "other.yaml", "--n", 66, "--seeds", 0, "--sigmas", 80]
    done = program("cm-eval", run, *words, "--out", tmp_path / "out")
    assert done.code == 2
    assert "(1, 8, 8)" in done.err
    assert "(1, 16, 16)" in done.err
    assert not (tmp_path / "out").exists()
