"""cm-compare: the numbers of the runs, ranked only where they may be."""

from __future__ import annotations

import base64
import json
import re
import shutil

import pytest

from cm_lightning.cli.compare import curves, differing, read_entry
from cm_lightning.evaluation import read_metrics


@pytest.fixture
def runs(fit, tmp_path):
    """Two runs of one kind, seeds 0 and 1."""
    found = []
    for seed in (0, 1):
        run = tmp_path / f"seed{seed}"
        done = fit(run, "--seed_everything", seed)
        assert done.code == 0, done.err
        found.append(run)
    return found


def last(run):
    return json.loads((run / "run.json").read_text())["results"]["last"]


def test_table_curves_and_page(runs, program, tmp_path):
    out = tmp_path / "out"
    done = program("cm-compare", *runs, "--out", out)
    assert done.code == 0, done.err
    text = (out / "comparison.md").read_text()
    assert "cannot be ranked" not in text
    lowest = [
        min(value for key, value in last(run).items() if key.endswith("nfe1")) for run in runs
    ]
    assert f"**{min(lowest):.4g}**" in text
    assert f"{max(lowest):.4g}" in text
    assert f"**{max(lowest):.4g}**" not in text
    page = (out / "comparison.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # curves, two samplers of two runs, the diagnostics of two runs
    assert len(pictures) == 1 + 4 + 2
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in page
    assert (out / "curves.png").is_file()


def test_curves_are_those_of_the_log(runs):
    entry = read_entry(runs[0])
    rows = read_metrics(runs[0] / "metrics.csv")
    for key, points in curves(entry).items():
        assert [(kimg, value) for kimg, _, value in points] == [
            (row["kimg"], row[key]) for row in rows if key in row
        ]
        minutes = [time for _, time, _ in points]
        assert minutes == sorted(minutes)
        speed = {row["kimg"]: row["speed/images_per_second"] for row in rows if "loss" in row}
        whole = sum(
            (end - start) * 1000 / speed[end] / 60
            for start, end in zip([0.0, *list(speed)[:-1]], speed, strict=True)
        )
        assert minutes[-1] == pytest.approx(whole, rel=1e-6)


def test_results_of_cm_eval_take_over_with_their_spread(runs, program, tmp_path):
    for run in runs:
        words = ["--n", 66, "--seeds", 3, 4, "--sigmas", 80]
        assert program("cm-eval", run, *words).code == 0
    done = program("cm-compare", *runs, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    values = [row["fd"] for row in json.loads((runs[0] / "eval/eval.json").read_text())["results"]]
    mean, spread = sum(values) / 2, abs(values[0] - values[1]) / 2**0.5
    assert f"{mean:.4g} ± {spread:.2g}" in done.out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features_sha256": "0" * 64}, "features (seed0"),
        ({"n": 50000}, "number of samples (seed0: 66, seed1: 50000)"),
        ({"reference": "other.npz"}, "reference statistics"),
        ({"data_fingerprint": "1" * 64}, "training images"),
    ],
)
def test_what_cannot_be_compared_is_not_ranked(runs, program, tmp_path, change, words):
    path = runs[1] / "run.json"
    record = json.loads(path.read_text())
    for key, value in change.items():
        place = record if key == "data_fingerprint" else record["results"]["measured_with"]
        assert key in place
        place[key] = value
    path.write_text(json.dumps(record))
    assert len(differing([read_entry(run) for run in runs])) == 1
    done = program("cm-compare", *runs, "--out", tmp_path / "out")
    assert done.code == 0
    assert "These distances cannot be ranked" in done.out
    assert words in done.out
    assert "**" not in done.out


def test_mistakes(runs, program, tmp_path):
    assert "A run is named twice" in program("cm-compare", runs[0], runs[0]).err
    assert "is not a run directory" in program("cm-compare", tmp_path).err
    record = json.loads((runs[0] / "run.json").read_text())
    del record["results"]
    (runs[0] / "run.json").write_text(json.dumps(record))
    assert "has no results yet" in program("cm-compare", *runs).err
    shutil.rmtree(runs[1])
    assert program("cm-compare", *runs).code == 2
