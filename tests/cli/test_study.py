"""cm-study: runs, continues, tunes on other seeds, tabulates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from cm_lightning.cli.study import interval, option_words, summary
from cm_lightning.cli.study_file import Arm, Study, read_study
from tests.cli.conftest import DIGITS, ROOT, TINY

METRIC = "fd_digits66/ema_0.9/nfe1"


@pytest.fixture
def study(tmp_path):
    """A study of four seconds-long arms, and its text to change."""
    base = {
        "config": "both.yaml",
        "options": {"model.total_kimg": 0.064, "fid.every_kimg": None},
        "seeds": [1, 2],
        "tune": {
            "key": "model.optimizer.init_args.lr",
            "values": [1e-3, 1e-2],
            "seeds": [7],
            "metric": METRIC,
        },
        "arms": {
            "ect": None,
            "huber": {"options": {"model.distance": "PseudoHuber"}, "tuned_as": "ect"},
        },
        "compare": [["huber", "ect"]],
    }
    config = yaml.safe_load(Path(DIGITS).read_text())
    tiny = yaml.safe_load(Path(TINY).read_text())
    config["model"]["init_args"]["denoiser"]["init_args"]["backbone"]["init_args"] |= tiny["model"][
        "init_args"
    ]["denoiser"]["init_args"]["backbone"]["init_args"]
    for key in ("ema", "fid", "samples", "diagnostics", "checkpoints"):
        config[key] |= tiny[key]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(config))

    def write(**changes):
        path = tmp_path / "study.yaml"
        path.write_text(yaml.safe_dump({**base, **changes}, sort_keys=False))
        return path

    return write


def test_a_study_trains_tunes_continues_and_tabulates(study, program, tmp_path):
    out = tmp_path / "out"
    done = program("cm-study", study(), "--out", out, "--jobs", 2)
    assert done.code == 0, done.err
    outcome = json.loads((out / "study.json").read_text())
    lr = outcome["chosen"]["ect"]
    assert outcome["chosen"]["huber"] == lr
    tried = {
        value: json.loads((out / "ect" / value / "seed7/run.json").read_text())
        for value in ("0.001", "0.01")
    }
    best = min(tried, key=lambda value: tried[value]["results"]["last"][METRIC])
    assert float(best) == lr
    assert [run["seed"] for run in tried.values()] == [7, 7]

    # a run of the study is the run that cm-fit makes
    alone = tmp_path / "alone"
    words = ["--config", tmp_path / "both.yaml", "--run_dir", alone, "--seed_everything", 2]
    words += ["--model.total_kimg", 0.064, "--fid.every_kimg", "null"]
    words += ["--model.distance", "PseudoHuber", "--model.optimizer.init_args.lr", lr]
    assert program("cm-fit", *words).code == 0
    expected = json.loads((alone / "run.json").read_text())["results"]["last"][METRIC]
    assert outcome["results"]["huber"][METRIC][1] == expected

    pair = np.array([outcome["results"][arm][METRIC] for arm in ("ect", "huber")])
    mean, width = interval(pair[1] - pair[0])
    assert f"{mean:+.3f} ± {width:.3f}" in (out / "study.md").read_text()

    kept = (out / "ect" / str(lr) / "seed1/run.json").stat().st_mtime_ns
    shutil.rmtree(out / "huber" / str(lr) / "seed2")
    again = program("cm-study", tmp_path / "study.yaml", "--out", out)
    assert json.loads((out / "study.json").read_text()) == outcome
    assert (out / "ect" / str(lr) / "seed1/run.json").stat().st_mtime_ns == kept
    assert again.out.count("min to go") == 1
    assert f"[6/6] huber/{lr}/seed2" in again.out
    last = (out / "huber" / str(lr) / "seed2.log").read_text()
    assert last.count("Finished at") == 2


def test_tables_of_known_numbers(tmp_path):
    arms = {name: Arm(tmp_path, {}) for name in ("base", "better")}
    study = Study(arms, [1, 2, 3], None, [("better", "base")])
    results = {"base": {"fd": [4.0, 5.0, 6.0]}, "better": {"fd": [3.0, 3.0, 3.0]}}
    text = summary(study, {"results": results, "chosen": {}, "search": {}})
    assert "| base | 5.000 ± 2.484 |" in text
    assert "| better | 3.000 ± 0.000 |" in text
    assert "| better − base | -2.000 ± 2.484 (-40.0 %) |" in text


def test_interval_is_students():
    mean, width = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert mean == 3
    assert width == pytest.approx(2.776445 * np.sqrt(2.5 / 5), rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "seeds must be two or more"),
        ({"seeds": [1, 7]}, "tune.seeds and seeds share [7]"),
        ({"compare": [["huber", "sct"]]}, "names 'sct', but its arms are ect, huber"),
        ({"arms": {"a": {"colour": {}}}}, "knows no 'colour'"),
        ({"arms": {"a": {"config": "none.yaml"}}}, "arms.a has no config file (none.yaml)"),
        ({"tune": {"key": "x"}}, "tune lacks"),
        ({"arms": {"a": {"of": "b"}, "b": {}}}, "arms.a is of 'b', which is no arm before it"),
        ({"arms": {"a": {}, "b": {"of": "a", "share": 0}}}, "share must be positive, got 0"),
    ],
)
def test_mistakes_in_the_file(study, program, tmp_path, changes, message):
    done = program("cm-study", study(**changes), "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


def test_a_failing_run_stops_the_study_with_its_message(study, program, tmp_path):
    path = study(options={"model.total_kimg": -1})
    done = program("cm-study", path, "--out", tmp_path / "out")
    assert done.code == 2
    assert "total_kimg" in done.err
    assert "ect/0.001/seed7 failed" in done.err
    assert "the arms are ect, huber" in program("cm-study", path, "--only", "none").err
    assert "--jobs must be 1 or more" in program("cm-study", path, "--jobs", 0).err


def test_first_runs_shares_and_evaluations(study, program, tmp_path):
    """A teacher first; an arm of another with a share of its lengths; scores by cm-eval."""
    out = tmp_path / "out"
    short = {"model.total_kimg": 0.064, "fid.every_kimg": None}
    arms = {
        "tuned": {"options": {"model.init.path": "{study}/start"}, "evaluate": EVALUATE},
        "longer": {"of": "tuned", "share": 2, "evaluate": EVALUATE},
    }
    changes = {"first": {"start": {"options": short}}, "lengths": ["model.total_kimg"]}
    path = study(arms=arms, tune=None, compare=[["longer", "tuned"]], **changes)
    done = program("cm-study", path, "--out", out, "--jobs", 2)
    assert done.code == 0, done.err
    record = json.loads((out / "longer/seed1/run.json").read_text())
    assert record["results"]["kimg"] == 0.128
    assert record["origins"]["init"]["path"] == str(out / "start")
    found = json.loads((out / "study.json").read_text())["results"]["tuned"]
    scores = json.loads((out / "tuned/seed1/eval/eval.json").read_text())["results"]
    (key,) = [key for key in found if key.startswith("eval/")]
    assert key == "eval/ema_0.9/sigmas 80 2 0.5"
    assert found[key][0] == np.mean([row["fd"] for row in scores])
    assert f"| {key} |" in (out / "study.md").read_text()


EVALUATE = ["--n", "66", "--seeds", "0", "1", "--sigmas", "80", "2", "0.5"]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_options_of_published_studies_are_known(path, program):
    study = read_study(path)
    for name, arm in (study.first | study.arms).items():
        words = option_words(arm.options, Path("runs"))
        done = program("cm-fit", "--config", arm.config, *words, "--print_config")
        assert done.code == 0, (name, done.err)
