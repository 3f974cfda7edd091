"""Command lines with words missing, doubled, replaced or added."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.damage import HARM, MUTATIONS, harm, mutate_file
from tests.fuzz.harness import ends_well, examples, refused, workplace

WORDS = [
    "", " ", "-1", "0", "1", "2", "0.5", "nan", "inf", "-inf", "1e999", "9" * 30, "x", "null",
    "--bogus", "--out", "--", "-", "-h7", "=", "--=", "--out=", "/proc/nowhere", "/proc", ".", "..",
    "run", "weights", "store", "study.yaml", "x.yaml", "file.txt", "/proc/version", "ä漢😀", "a\nb",
    "a\0b", "a" * 300, "a/" * 2000, "{", "[1", "[1, 2]", "{a: 1}", "&a [*a]", "[" * 3000,
    "2001-99-99", "!!x y", "!!python/object/apply:os.system [touch canary]", "$(touch canary)",
    "\x1b[31m", "~", "\ud800", "--config", "--check", "--model.total_kimg=null",
    "--data.source=Store", "--ema.profiles=[null]", "--trainer.callbacks=[{class_path: Timer}]",
    "--model.optimizer.lr=-1", "--fid.samplers=[]", "--model=ECT", "--model.init.path=file.txt",
    "--model.distance={class_path: LPIPS}", "--run_dir=run", "--resume=file.txt", "--resume=run",
    "--data.source={class_path: Store, init_args: {path: store}}", "--run_dir=file.txt/a",
    "--n=2", "--seed=5", "--seeds=1", "true",
]  # fmt: skip
GOOD = {
    "fit": "cm-fit --config x.yaml --check",
    "sample": "cm-sample run --sigmas 80 0.8 --n 2 --out out --labels 3",
    "phases": "cm-sample weights --phases 3 --eta 0.8 --n 2 --out out --grid",
    "guided": "cm-sample run --n 1 --out out --guidance 1.5 --worse_ema live",
    "eval": "cm-eval run --n 66 --seeds 0 --sigmas 80 --out out --batch 64",
    "mid": "cm-eval run --n 66 --seeds 0 --mid 0.2 3 2 --out out",
    "convert": "cm-data convert idx --out out --transform pad --resolution 16",
    "look": "cm-data inspect store --grid out/x.png --verify",
    "stats": "cm-data stats store --features DigitsFeatures --out out/x.npz",
    "prefetch": "cm-data prefetch --config x.yaml",
    "inspect": "cm-weights inspect weights --resolution 8",
    "import": "cm-weights import weights --out out --regime CD",
    "export": "cm-weights export run --out out --ema live --format safetensors",
    "phema": "cm-weights phema run --std 0.07 --out out",
    "compare": "cm-compare run weights --out out",
    "study": "cm-study study.yaml --out out --only b",
}
CHANGE = st.tuples(
    st.sampled_from(["drop", "double", "replace", "replace", "insert", "insert", "value"]),
    st.integers(0, 50),
    st.sampled_from(WORDS),
)
STUDY = {
    "config": "x.yaml",
    "options": {"model.total_kimg": 0.064, "fid.n": 2},
    "seeds": [1, 2],
    "lengths": ["model.total_kimg"],
    "evaluate": {"steps": ["--n", "66", "--sigmas", "80"]},
    "tune": {
        "key": "model.optimizer.init_args.lr",
        "values": [1e-3],
        "seeds": [3],
        "metric": "x",
        "chosen": {"c": 2e-3},
    },
    "first": {"start": {"evaluate": {"floor": ["--heun", "18"]}}},
    "arms": {
        "a": {"options": {"model.distance": "L2"}},
        "b": {"tuned_as": "a", "share": 2},
        "c": {"of": "a", "options": {"model.init.path": "{study}/start"}},
        "d": {"of": "c", "time_of": "b"},
    },
    "questions": {"Which?": [["b", "a"]], "In one?": [["a | x", "a | y"]]},
}
RUNS = {"runs": ["run", "run"]}
OUTCOME = {
    "title": "A study",
    "seeds": [1, 2],
    "arms": {"a": RUNS | {"tuned": 1e-3}, "b": RUNS | {"share": 0.5, "of": "a", "time_of": "a"}},
    "first": {"start": {"fd/ema/nfe1": 1.0}},
    "key": "model.optimizer.init_args.lr",
    "search": {"a": {"0.001": 1.0, "0.01": 2.0}},
    "results": {
        "a": {"fd/ema/nfe1": [1.0, 2.0], "steps/ema/sigmas 80 2": [1.0, 2.0], "own": [3, 4]},
        "b": {"fd/ema/nfe1": [1.0, 3.0], "steps/ema/sigmas 80 2": [1.0, 2.5]},
    },
    "questions": {"Which?": [["b", "a"]], "In one?": [["a | own", "a | fd/ema/nfe1"]]},
}


def changed(words: list[str], changes: list[tuple[str, int, str]]) -> list[str]:
    """A command line after changes."""
    words = list(words)
    for how, number, word in changes:
        place = 1 + number % max(len(words) - 1, 1)
        if how == "insert" or place >= len(words):
            words.insert(place, word)
        elif how == "drop":
            del words[place]
        elif how == "double":
            words.insert(place, words[place])
        elif how == "value":  # an option stays, what follows it does not
            options = [i for i, text in enumerate(words) if text.startswith("--")]
            if options:
                words[options[number % len(options)] + 1 :][:1] = [word]
                words.insert(options[number % len(options)] + 1, word)
        else:
            words[place] = word
    return words


@pytest.fixture
def everything(run, weights, store, tmp_path):
    """Sources of every command, to be copied into a workplace."""
    merged = yaml.safe_load((run / "config.yaml").read_text())
    merged.pop("run_dir", None)
    (tmp_path / "x.yaml").write_text(yaml.safe_dump(merged))
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY))
    (tmp_path / "file.txt").write_text("precious")
    names = ("x.yaml", "study.yaml", "file.txt")
    return [run, weights, store, store.parent / "idx", *(tmp_path / name for name in names)]


@examples(50)
@given(st.sampled_from(sorted(GOOD)), st.lists(CHANGE, min_size=1, max_size=2))
def test_one_or_two_words_wrong(everything, command, changes):
    words = changed(GOOD[command].split(), changes)
    if words[0] == "cm-fit" and "--check" not in words:
        words.append("--check")
    if words[0] == "cm-study":
        words += ["--only", "nobody"]
    with workplace(*everything) as folder:
        ends_well(folder, *words, outputs=None)


@examples(15)
@given(st.one_of(HARM, MUTATIONS))
def test_damaged_studies(everything, damage):
    with workplace(*everything) as folder:
        if isinstance(damage, tuple):
            harm(folder / "study.yaml", damage)
        else:
            mutate_file(folder / "study.yaml", damage)
        refused(folder, "cm-study", "study.yaml", "--out", "out", "--only", "nobody")


@examples(15)
@given(st.one_of(HARM, MUTATIONS))
def test_damaged_outcomes_of_studies(everything, damage):
    with workplace(*everything) as folder:
        (folder / "study.json").write_text(json.dumps(OUTCOME))
        if isinstance(damage, tuple):
            harm(folder / "study.json", damage)
        else:
            mutate_file(folder / "study.json", damage)
        ends_well(folder, "cm-compare", ".", "--out", "out")


MISTAKES = {
    "fit: out of range": ["cm-fit", "--config", "x.yaml", "--check", "--model.total_kimg", "0"],
    "fit: no config": ["cm-fit", "--check", "--model.total_kimg", "1"],
    "fit: config twice, one missing": ["cm-fit", "--config", "x.yaml", "--config", "no.yaml"],
    "fit: config is a folder": ["cm-fit", "--config", "run", "--check"],
    "fit: config is a picture": ["cm-fit", "--config", "file.txt", "--check"],
    "fit: null": ["cm-fit", "--config", "x.yaml", "--check", "--model.total_kimg", "null"],
    "fit: a null inside": [
        *["cm-fit", "--config", "x.yaml", "--check"],
        *["--model.discretization", "{class_path: ECTMapping, init_args: {q: null}}"],
    ],
    "fit: a callback that YAML cannot hold": [
        *["cm-fit", "--config", "x.yaml", "--check"],
        *["--trainer.callbacks", "[{class_path: lightning.pytorch.callbacks.Timer}]"],
    ],
    "fit: endless": ["cm-fit", "--config", "x.yaml", "--check", "--fid.samplers", "&a [*a]"],
    "fit: deep": ["cm-fit", "--config", "x.yaml", "--check", "--fid.samplers", "[" * 5000],
    "fit: run_dir under a file": ["cm-fit", "--config", "x.yaml", "--run_dir", "file.txt/run"],
    "fit: run_dir is a file": ["cm-fit", "--config", "x.yaml", "--run_dir", "file.txt"],
    "fit: run_dir is a store": ["cm-fit", "--config", "x.yaml", "--run_dir", "store"],
    "fit: run_dir of a null": ["cm-fit", "--config", "x.yaml", "--run_dir", "a\0b"],
    "fit: run_dir too long": ["cm-fit", "--config", "x.yaml", "--run_dir", "a" * 300],
    "sample: out is a file": ["cm-sample", "run", "--n", "1", "--out", "file.txt"],
    "sample: out under a file": ["cm-sample", "run", "--n", "1", "--out", "file.txt/x"],
    "sample: out of a null": ["cm-sample", "run", "--n", "1", "--out", "a\0b"],
    "sample: n": ["cm-sample", "run", "--n", "9" * 12, "--out", "out"],
    "sample: heun": ["cm-sample", "run", "--heun", "9" * 12, "--out", "out"],
    "sample: phases": ["cm-sample", "run", "--phases", "9" * 12, "--out", "out"],
    "sample: nan": ["cm-sample", "run", "--sigmas", "nan", "--out", "out"],
    "sample: guidance": ["cm-sample", "run", "--guidance", "inf", "--out", "out"],
    "sample: device": ["cm-sample", "run", "--device", "abacus", "--out", "out"],
    "eval: out is a file": ["cm-eval", "run", "--n", "66", "--out", "file.txt"],
    "eval: out under a file": ["cm-eval", "run", "--n", "66", "--out", "file.txt/x"],
    "eval: accelerator": ["cm-eval", "run", "--n", "66", "--out", "out", "--accelerator", "x"],
    "eval: devices": ["cm-eval", "run", "--n", "66", "--out", "out", "--devices", "0"],
    "eval: scores": ["cm-eval", "run", "--n", "66", "--out", "out", "--scores", "x"],
    "data: out exists": ["cm-data", "convert", "idx", "--out", "store"],
    "data: out is a file": ["cm-data", "convert", "idx", "--out", "file.txt"],
    "data: out under a file": ["cm-data", "convert", "idx", "--out", "file.txt/x"],
    "data: resolution": [
        *["cm-data", "convert", "idx", "--out", "out"],
        *["--transform", "resize", "--resolution", "9" * 9],
    ],
    "data: grid in a file": ["cm-data", "inspect", "store", "--grid", "file.txt/x.png"],
    "data: grid is a folder": ["cm-data", "inspect", "store", "--grid", "run"],
    "data: stats in a file": [
        *["cm-data", "stats", "store", "--features", "DigitsFeatures", "--out", "file.txt/x"],
    ],
    "data: stats exist": [
        *["cm-data", "stats", "store", "--features", "DigitsFeatures", "--out", "file.txt"],
    ],
    "data: grid exists": ["cm-data", "inspect", "store", "--grid", "file.txt"],
    "data: batch": [
        *["cm-data", "stats", "store", "--features", "DigitsFeatures", "--out", "out"],
        *["--batch", "0"],
    ],
    "data: features": ["cm-data", "stats", "store", "--features", "os.system", "--out", "out"],
    "weights: out exists": ["cm-weights", "export", "run", "--out", "weights"],
    "weights: out under a file": ["cm-weights", "export", "run", "--out", "file.txt/x"],
    "weights: format": ["cm-weights", "export", "run", "--out", "out", "--format", "diffusers"],
    "weights: std": ["cm-weights", "phema", "run", "--std", "0.5", "--out", "out"],
    "weights: std twice": ["cm-weights", "phema", "run", "--std", "0.1", "0.1", "--out", "out"],
    "weights: no action": ["cm-weights"],
    "compare: out is a file": ["cm-compare", "run", "--out", "file.txt"],
    "compare: out under a file": ["cm-compare", "run", "--out", "file.txt/x"],
    "compare: twice": ["cm-compare", "run", "run", "--out", "out"],
    "study: out is a file": ["cm-study", "study.yaml", "--out", "file.txt", "--only", "a"],
    "study: metric": ["cm-study", "study.yaml", "--only", "nobody"],
    "study: a folder": ["cm-study", "run"],
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(everything, case):
    with workplace(*everything) as folder:
        refused(folder, *MISTAKES[case])


def test_a_study_whose_run_fails_leaves_nothing(everything):
    with workplace(*everything) as folder:
        study = STUDY | {"options": {"data.resolution": 12}, "tune": None, "questions": {}}
        study |= {"first": {}, "evaluate": {}}
        study["arms"] = {"a": {"options": {"model.distance": "L2"}}}
        (folder / "study.yaml").write_text(yaml.safe_dump(study))
        assert "the network takes (1, 8, 8)" in refused(
            folder, "cm-study", "study.yaml", "--out", "out"
        )
