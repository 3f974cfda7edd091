"""cm-study: runs, continues, tunes on other seeds, tabulates."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from cm_lightning.cli.study import make_run, training_minutes
from cm_lightning.cli.study_file import Tuning, read_study
from cm_lightning.cli.study_report import interval, read_outcome
from cm_lightning.cli.study_runs import Run, Runner, option_words
from cm_lightning.evaluation import read_metrics
from tests.cli.conftest import DIGITS, ROOT, TINY
from tests.data.test_readers import write_idx

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
        "questions": {"Is Huber better?": [["huber", "ect"]]},
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
    lr = outcome["arms"]["ect"]["tuned"]
    assert outcome["arms"]["huber"]["tuned"] == lr
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
    text = (out / "study.md").read_text()
    assert f"{mean:+.3f} ± {width:.3f}" in text
    assert "### Is Huber better?" in text

    kept = (out / "ect" / str(lr) / "seed1/run.json").stat().st_mtime_ns
    shutil.rmtree(out / "huber" / str(lr) / "seed2")
    again = program("cm-study", tmp_path / "study.yaml", "--out", out)
    assert json.loads((out / "study.json").read_text()) == outcome
    assert (out / "ect" / str(lr) / "seed1/run.json").stat().st_mtime_ns == kept
    assert again.out.count("min to go") == 1
    assert f"[6/6] huber/{lr}/seed2" in again.out
    last = (out / "huber" / str(lr) / "seed2.log").read_text()
    assert last.count("Finished at") == 2

    # a finished run of other options is not taken for one of this study
    other = {"ect": None, "huber": {"options": {"model.distance": "L1"}, "tuned_as": "ect"}}
    changed = program("cm-study", study(arms=other), "--out", out)
    assert changed.code == 2
    assert f"huber/{lr}/seed1 was made with other options" in changed.err


def test_runs_of_a_study_have_names_in_wandb(study, program, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    options = {"model.total_kimg": 0.064, "fid.every_kimg": None, "wandb.project": "x"}
    changes = {"arms": {"ect": None}, "tune": None, "questions": {}}
    path = study(options=options, **changes)
    assert program("cm-study", path, "--out", tmp_path / "out").code == 0
    config = yaml.safe_load((tmp_path / "out/ect/seed1/config.yaml").read_text())["wandb"]
    expected = {"name": "ect/seed1", "group": "out", "tags": ["ect"]}
    assert {key: config[key] for key in expected} == expected
    # where the numbers go does not change them: another team is no other study
    path = study(options=options | {"wandb.entity": "team"}, **changes)
    done = program("cm-study", path, "--out", tmp_path / "out")
    assert done.code == 0, done.err


def test_own_options_come_last_under_either_spelling(study):
    arms = {
        "a": {"options": {"model.optimizer": {"class_path": "torch.optim.Adam"}, "fid.n": 9}},
        "b": {"of": "a", "options": {"model.total_kimg": 6}, "share": 0.5},
        "c": {"options": {"model.optimizer.lr": 2}},
    }
    common = {"model.init_args.total_kimg": 4, "model.optimizer.init_args.lr": 1, "fid.n": 8}
    lengths = ["model.init_args.total_kimg"]
    found = read_study(study(arms=arms, options=common, lengths=lengths, questions={})).arms
    first = list(found["a"].options.items())
    assert first == [*list(common.items())[:2], *arms["a"]["options"].items()]
    assert found["b"].options["model.total_kimg"] == 3
    assert "model.init_args.total_kimg" not in found["b"].options
    tune = Tuning("model.optimizer.lr", [3], [9], "fd")
    for name, arm in found.items():
        words = option_words(make_run(name, arm, 1, tune, 3).options, Path("out"))
        assert words[-1] == "--model.optimizer.lr=3"
        assert sum(".lr=" in word for word in words) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1]}, "seeds must be two or more"),
        ({"seeds": [1, 7]}, "tune.seeds and seeds share [7]"),
        ({"questions": {"?": [["huber", "sct"]]}}, "names 'sct', but its arms are ect, huber"),
        ({"questions": {"?": [["huber"]]}}, "questions must hold pairs"),
        ({"arms": {"a": {}, "b": {"of": "a", "time_of": "c"}}}, "b: time_of takes an earlier arm"),
        ({"arms": {"a": {}, "b": {"time_of": "a"}}}, "b: time_of takes an earlier arm"),
        ({"arms": {"a": {"colour": {}}}}, "knows no 'colour'"),
        ({"arms": {"a": {"config": "none.yaml"}}}, "arms.a has no config file (none.yaml)"),
        ({"tune": {"key": "x"}}, "lacks 'tune."),
        ({"arms": {"a": {"of": "b"}, "b": {}}}, "arms.a is of 'b', which is no arm before it"),
        ({"arms": {"a": {}, "b": {"of": "a", "share": 0}}}, "share must be positive, got 0"),
        ({"arms": {"a": {}, "b": {"of": "a", "share": 2}}}, "needs an option that `lengths` names"),
        ({"first": {"a": {"time_of": "b"}}}, "first.a knows no 'time_of'"),
        ({"first": {"ect": {}}}, "ect is both an arm and a first run"),
        ({"arms": {"../a": {}}}, "'../a' names a folder"),
        ({"arms": {}}, "lacks 'arms'"),
        ({"arms": {1: None}}, "the key 1 of 'arms' must be a text"),
        ({"questions": {"?": [["huber | x", "ect"]]}}, "both or neither"),
        ({"evaluate": {"x": ["--colour", "1"]}}, "cm-study: error: unrecognized arguments"),
        ({"evaluate": {"x": ["--help"]}}, "An evaluation takes options"),
        ({"evaluate": {"x": ["--out", "elsewhere"]}}, "may not say --out"),
        ({"evaluate": {"x": ["--allow_modules", "os"]}}, "may not say --out or --allow_modules"),
        ({"options": {"allow_modules": "os"}}, "belongs to the command line of cm-study"),
        ({"options": {"model.init.path": "{study}/b"}}, "needs the run b, which `first` lacks"),
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
    assert "--jobs: a whole number from 1" in program("cm-study", path, "--jobs", 0).err


@pytest.mark.parametrize("name", [pytest.param("SIGINT", marks=pytest.mark.slow), "SIGTERM"])
def test_a_study_that_is_stopped_stops_its_runs(name, study, tmp_path):
    options = {"model.total_kimg": 64, "fid.every_kimg": None, "samples.every_kimg": 100}
    path = study(tune=None, options=options, arms={"ect": None}, questions={})
    out = tmp_path / "out"
    run = out / "ect/seed1"
    words = [sys.executable, "-m", "cm_lightning.cli.study", str(path), "--out", str(out)]
    # whoever runs the tests in the background may ignore it, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)
    signal.signal(signal.SIGINT, before)
    try:
        deadline = time.monotonic() + 120
        while not any(run.glob("checkpoints/*.ckpt")):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(getattr(signal, name))
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75
    assert errors.strip() == "cm-study: stopped; the same command continues."
    assert not json.loads((run / "run.json").read_text()).get("results")
    assert "SIGTERM: writing a checkpoint" in (out / "ect/seed1.log").read_text()
    assert not (out / "ect/seed2").exists()
    left = subprocess.run(["pgrep", "--session", str(process.pid)], check=False)
    assert left.returncode == 1  # nothing runs on


def test_first_runs_shares_evaluations_and_times(study, program, tmp_path):
    """A teacher first; an arm of another with a share of its lengths; scores by cm-eval."""
    out = tmp_path / "out"
    short = {"model.total_kimg": 0.64, "fid.every_kimg": None}
    short["ema.profiles"] = [{"class_path": "ConstantEMA", "init_args": {"rate": 0.9}}]
    arms = {
        "tuned": {"options": {"model.init.path": "{study}/start"}, "evaluate": EVALUATE},
        "longer": {"of": "tuned", "share": 2},
        "timed": {"of": "tuned", "time_of": "longer"},
    }
    changes = {"first": {"start": {"options": short}}, "lengths": ["model.total_kimg"]}
    questions = {"Is longer better?": [["longer", "tuned"], ["tuned | no<b>", "longer | no<b>"]]}
    changes |= {"options": short, "questions": questions}
    path = study(arms=arms, tune=None, **changes)
    done = program("cm-study", path, "--out", out, "--jobs", 2)
    assert done.code == 0, done.err
    record = json.loads((out / "longer/seed1/run.json").read_text())
    assert record["results"]["kimg"] == 1.28
    assert record["origins"]["init"]["path"] == str(out / "start")
    outcome = read_outcome(out)
    found = outcome["results"]["tuned"]
    scores = json.loads((out / "tuned/seed1/eval-steps/eval.json").read_text())["results"]
    (key,) = [key for key in found if key.startswith("steps/")]
    assert key == "steps/ema_0.9/sigmas 80 2 0.5"
    assert found[key][0] == np.mean([row["fd"] for row in scores])
    assert "| tuned | steps/ema_0.9/sigmas 80 2 0.5 |" in (out / "study.md").read_text()
    assert set(outcome["first"]["start"]) == {METRIC, METRIC.replace("nfe1", "nfe2")}

    # the timed arm takes as many images as fit, by the speeds of both arms' runs
    minutes = {
        arm: training_minutes([out / arm / f"seed{seed}" for seed in (1, 2)])
        for arm in ("tuned", "longer")
    }
    share = outcome["arms"]["timed"]["share"]
    assert share == float(f"{minutes['longer'] / minutes['tuned']:.3g}")
    total = json.loads((out / "timed/seed1/run.json").read_text())["total_kimg"]
    assert total == float(f"{share * 0.64:.4g}")
    speeds = [
        row["speed/images_per_second"]
        for seed in (1, 2)
        for row in read_metrics(out / f"tuned/seed{seed}/metrics.csv")
        if "speed/images_per_second" in row
    ]
    assert minutes["tuned"] == pytest.approx(640 / 60 / np.median(speeds))

    # results of other evaluations, or of another length, are not taken for this study's
    record = out / "timed/seed1/run.json"
    text = record.read_text()
    record.write_text(json.dumps(json.loads(text) | {"total_kimg": 0.6 * total}))
    shorter = program("cm-study", path, "--out", out)
    assert shorter.code == 2
    assert "fit in the time of its arm" in shorter.err
    record.write_text(text)
    log = out / "tuned/seed1.log"
    assert log.read_text().count("evaluation steps: ") == 1  # what ended is not begun again
    fewer = {"tuned": arms["tuned"] | {"evaluate": {"steps": ["--n", "50", "--sigmas", "80"]}}}
    other = program("cm-study", study(arms=arms | fewer, tune=None, **changes), "--out", out)
    assert other.code == 2
    assert "tuned/seed1 was made with other options" in other.err
    assert "(evaluation steps; words)" in other.err

    # an evaluation that was stopped goes on, a damaged one is named
    log.write_text(log.read_text().replace("Written to ", "Stopped at "))
    file = out / "tuned/seed2/eval-steps/eval.json"
    scores = file.read_text()
    file.write_text(scores.replace('"fd"', '"df"').replace('"seed"', '"deed"'))
    damaged = program("cm-study", study(arms=arms, tune=None, **changes), "--out", out)
    assert damaged.code == 2
    assert f"{file} lacks" in damaged.err
    assert log.read_text().count("evaluation steps: ") == 2
    file.write_text(scores)

    # its page
    page = tmp_path / "page"
    done = program("cm-compare", out, "--out", page)
    assert done.code == 0, done.err
    text = (page / "comparison.html").read_text()
    assert "<h3>Is longer better?</h3>" in text
    assert "no answer: tuned | no&lt;b&gt;; longer | no&lt;b&gt;." in text
    assert "timed" in text
    assert (page / "figures" / "arms_fd_digits66_ema_0.9_nfe1.png").is_file()
    assert (page / "figures" / "samples_nfe1.png").is_file()

    # results of runs that began at another model are not taken either
    shutil.rmtree(out / "start")
    (out / "start.log").unlink()
    changes["first"] = {"start": {"options": short | {"seed_everything": 5}}}
    other = program("cm-study", study(arms=arms, tune=None, **changes), "--out", out)
    assert other.code == 2
    assert "made with other options than those of the study (options; after start)" in other.err
    assert "Is longer better?" in (page / "comparison.md").read_text()
    assert program("cm-compare", out, out / "start", "--out", page).code == 2


@pytest.mark.slow
def test_a_search_alone_and_its_result(study, program, tmp_path):
    """--search prints the search and trains nothing else; chosen values are not searched again."""
    out = tmp_path / "out"
    done = program("cm-study", study(), "--out", out, "--search", "--jobs", 2)
    assert done.code == 0, done.err
    assert "| ect |" in done.out
    assert "| huber |" not in done.out
    assert not (out / "study.json").exists()
    assert {path.name for path in out.glob("*/*/seed*") if path.is_dir()} == {"seed7"}
    tune = yaml.safe_load((tmp_path / "study.yaml").read_text())["tune"]
    path = study(tune=tune | {"chosen": {"ect": 1e-3}})
    done = program("cm-study", path, "--out", out, "--jobs", 2)
    assert done.code == 0, done.err
    assert json.loads((out / "study.json").read_text())["search"] == {}
    assert {path.name for path in (out / "huber").iterdir()} == {"0.001"}
    assert "has no `tune`" in program("cm-study", study(tune=None), "--search").err


def test_runs_that_need_no_first_run_do_not_wait(tmp_path):
    """Order of a pool of one: the first run, then those without it, results as asked for."""
    done = []

    class Recorded(Runner):
        def _one(self, run, before):
            assert all(future.done() for name, future in before.items() if run.needs(name))
            done.append(run.name)
            return {"place": len(done)}

    runs = [
        Run("tuned", tmp_path, {"model.init.path": "{study}/start"}, {}),
        Run("nested", tmp_path, {"a": {"b": ["{study}/start/x"]}}, {}),
        Run("scratch", tmp_path, {"model.init.path": "start"}, {}),
    ]
    with Recorded(tmp_path, (4, 4.0), 1, [Run("start", tmp_path, {}, {})]) as runner:
        results = runner(runs)
    assert done == ["start", "scratch", "tuned", "nested"]
    assert [row["place"] for row in results] == [3, 4, 2]


EVALUATE = {"steps": ["--n", "66", "--seeds", "0", "1", "--sigmas", "80", "2", "0.5"]}


def test_a_study_of_another(study, program, tmp_path):
    """Its keys replace, its options come on top everywhere, its share multiplies lengths."""
    base = study(
        lengths=["model.total_kimg"],
        first={"start": {"options": {"model.total_kimg": 3, "model.distance": "L1"}}},
        evaluate={"steps": ["--n", "66"]},
    )
    base.rename(tmp_path / "base.yaml")
    small = tmp_path / "small.yaml"
    text = {"of": "base.yaml", "share": 0.5, "options": {"model.distance": "L2"}, "seeds": [4, 5]}
    small.write_text(yaml.safe_dump(text))
    found, whole = read_study(small), read_study(tmp_path / "base.yaml")
    assert found.seeds == [4, 5]
    assert found.arms["ect"].options["model.total_kimg"] == 0.032
    assert found.first["start"].options == {"model.total_kimg": 1.5, "model.distance": "L2"}
    assert whole.arms["huber"].options["model.distance"] == "PseudoHuber"
    assert found.arms["huber"].options["model.distance"] == "L2"
    assert found.arms["ect"].evaluate == {"steps": ["--n", "66"]}
    assert found.first["start"].evaluate == {}
    for changes, message in (
        ({"of": None}, "in a study `of` another; got 0.5"),
        ({"of": None, "share": None}, "lacks 'arms'"),
        ({"of": "small.yaml"}, "must lie beside it and stand alone"),
        ({"of": "../base.yaml"}, "There is no study"),
        ({"share": 0}, "share must be positive"),
        ({"colour": 1}, "knows no 'colour'"),
        ({"options": {1: 2}}, "Unknown key '1'"),
    ):
        small.write_text(yaml.safe_dump(text | changes))
        done = program("cm-study", small, "--out", tmp_path / "out")
        assert done.code == 2, changes
        assert message in done.err, (changes, done.err)
    done = program("cm-study", study(share=2), "--out", tmp_path / "out")
    assert "in a study `of` another; got 2" in done.err


@pytest.mark.slow
def test_the_study_on_fashion_runs(program, tmp_path):
    """Two of its arms, the teacher and all evaluations, shrunk; images of the right form."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (80, 28, 28))
    write_idx(tmp_path / "set", images=images, labels=np.arange(80) % 10)
    for config in (ROOT / "configs").glob("*_fashion.yaml"):
        (tmp_path / config.name).symlink_to(config)
    folder = tmp_path / "studies"
    folder.mkdir()
    text = (ROOT / "configs" / "studies" / "fashion32.yaml").read_text()
    text = text.replace('"10000"', '"66"').replace('--euler, "18"', '--euler, "2"')
    (folder / "fashion32.yaml").write_text(text.replace('--heun, "18"', '--heun, "2"'))
    backbone = "model.denoiser.init_args.backbone.init_args"
    small = {
        "trainer.accelerator": "cpu",
        "data.source.init_args.root": str(tmp_path / "set"),
        "data.global_batch": 8,
        "data.resident": False,
        f"{backbone}.model_channels": 32,
        f"{backbone}.num_blocks": 1,
        "fid.n": 66,
        "samples.n": 4,
        "diagnostics.teacher_rows": 2,
        "diagnostics.teacher_steps": 2,
        "diagnostics.every_kimg": 0.008,
    }
    study = {"of": "fashion32.yaml", "share": 2e-4, "seeds": [1, 2], "options": small}
    (folder / "small.yaml").write_text(yaml.safe_dump(study))
    out = tmp_path / "out"
    words = ["--out", out, "--jobs", 2, "--only", "ect", "sct"]
    done = program("cm-study", folder / "small.yaml", *words)
    assert done.code == 0, done.err
    outcome = read_outcome(out)
    keys = [f"fd_timm66/ema_0.99/nfe{n}" for n in (1, 2, 4)]
    keys += [f"classifier/ema_0.99/{words}" for words in ("sigmas 80", "sigmas 80 0.821")]
    assert set(keys) <= set(outcome["results"]["sct"])
    floor = [key for key in outcome["first"]["teacher"] if key.startswith("imagenet")]
    assert len(floor) == 2
    assert "### Is SCT better than ECT?" in (out / "study.md").read_text()


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_options_of_published_studies_are_known(path, program):
    study = read_study(path)
    for name, arm in (study.first | study.arms).items():
        words = option_words(arm.options, Path("runs"))
        done = program("cm-fit", "--config", arm.config, *words, "--print_config")
        assert done.code == 0, (name, done.err)
