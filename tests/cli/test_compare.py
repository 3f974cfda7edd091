"""cm-compare: the numbers of the runs, ranked only where they may be."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from cm_lightning.cli.compare import curves, differing, read_entry
from cm_lightning.cli.compare_figures import at_the_end, level
from cm_lightning.cli.fit import main
from cm_lightning.evaluation import read_metrics
from tests.cli.conftest import DIGITS, ONE_CALL, ROOT, TINY

BINS = {"above_10": 4.0, "0.5-2": 2.0, "below_0.5": 1.0, "2-10": 3.0}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two runs of one kind, seeds 0 and 1."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CM_HOME", str(folder / "home"))
        for seed in ("0", "1"):
            words = ["--config", DIGITS, "--config", TINY, "--seed_everything", seed]
            main([*words, "--run_dir", str(folder / f"seed{seed}")])
    return folder


@pytest.fixture
def runs(trained, tmp_path, monkeypatch):
    """Copies of the two."""
    monkeypatch.setenv("CM_HOME", str(trained / "home"))
    return [shutil.copytree(trained / name, tmp_path / name) for name in ("seed0", "seed1")]


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
    names = {path.stem for path in (out / "figures").iterdir()}
    assert {"fd_nfe1_kimg", "fd_nfe2_minutes", "gradient_norm", "target_variance"} <= names
    assert not {"ess", "transport_cost", "teacher_ode_distance"} & names  # nothing to draw
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    shown = {base64.b64decode(picture) for picture in pictures}
    figures = {path.stem: path.read_bytes() for path in (out / "figures").iterdir()}
    together = {"samples_nfe1", "samples_nfe2"}  # for reports: the page has the grids one by one
    assert together <= set(figures)
    assert {picture for name, picture in figures.items() if name not in together} <= shown
    assert all(picture.startswith(b"\x89PNG") for picture in shown)
    grids = [path.read_bytes() for run in runs for path in sorted(run.glob("samples/*/*/*.png"))]
    assert {grid for grid in grids if grid in shown} == {
        sorted(folder.glob("*.png"))[-1].read_bytes()
        for run in runs
        for folder in run.glob("samples/*/*")
    }
    assert "http" not in page
    assert "from the same noise and classes" in page
    assert "<td>seed_everything</td><td>0</td><td>1</td>" in page


class Words(HTMLParser):
    """Tags that are open, and the words of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.stack, self.words, self.alts = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "img"):
            self.stack.append(tag)
        self.alts += [dict(attrs)["alt"]] if tag == "img" else []

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_diagnostics_of_different_regimes_share_a_page(program, teacher, tmp_path):
    """Names that are equal are told apart; what a family is and how to read it is said."""
    quiet = ["--fid.samplers", ONE_CALL, "--samples.every_kimg", "null", "--ema.profiles"]
    quiet += ["[{class_path: ConstantEMA, init_args: {rate: 0.9}}]"]
    runs = []
    for regime, words in (("sct", ["--model.init.path", teacher]), ("gc", [])):
        run = tmp_path / regime / "seed<b>"
        config = ROOT / "configs" / f"{regime}_digits.yaml"
        given = ["--config", config, "--config", TINY, "--run_dir", run]
        done = program("cm-fit", *given, *quiet, *words)
        assert done.code == 0, done.err
        runs.append(run)
    out = tmp_path / "out"
    done = program("cm-compare", *runs, "--out", out)
    assert done.code == 0, done.err
    names = {path.stem for path in (out / "figures").iterdir()}
    assert {"ess", "target_variance", "transport_cost", "teacher_ode_distance"} <= names
    page = Words()
    page.feed((out / "comparison.html").read_text())
    assert page.stack == []
    text = "".join(page.words)
    for words in ("sct/seed<b>", "gc/seed<b>", "Effective sample size", "Transport cost"):
        assert words in text
    assert "ess, sct/seed<b>" in page.alts
    assert "ess, gc/seed<b>" not in page.alts
    report = (out / "comparison.md").read_text()
    rows = read_metrics(runs[1] / "metrics.csv")
    late = [row for row in rows if row["kimg"] >= 0.75 * 0.64]
    last = [row["transport_cost/2-10"] for row in late if "transport_cost/2-10" in row]
    assert f"{sum(last) / len(last):.4g}" in report
    assert all((out / name).is_file() for name in re.findall(r"\]\((figures/[^)]+)\)", report))


def test_bins_lie_in_the_order_of_noise_and_at_their_own_level():
    rows = [{"kimg": k, **{f"ess/{b}": v * k for b, v in BINS.items()}} for k in (1.0, 3.0, 4.0)]
    found = at_the_end(rows, "ess")
    assert found == {name: 3.5 * value for name, value in BINS.items()}  # the last quarter
    assert list(found) == sorted(BINS, key=level)
    assert level("0.5-2") == pytest.approx(1)
    assert level("1e-05-0.1") == pytest.approx(1e-3)
    assert at_the_end([], "ess") == {}


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


def test_a_run_that_went_on_from_another_says_so(runs, fit, program, tmp_path):
    parent = runs[0] / "checkpoints" / "nimg000000000320.ckpt"
    assert fit(tmp_path / "fork", "--resume", parent).code == 0
    assert program("cm-compare", tmp_path / "fork", runs[1], "--out", tmp_path / "out").code == 0
    text = (tmp_path / "out" / "comparison.md").read_text()
    assert f"from {parent} at 0.32 kimg; again: `cm-fit --config" in text
    assert f"--resume {parent} --run_dir NEW`" in text
    assert text.count("--resume") == 1


def test_a_damaged_record_is_named(runs, program, tmp_path):
    path = runs[0] / "run.json"
    whole = json.loads(path.read_text())
    for change, words in (
        ({"starts": []}, "It has no start"),
        ({"starts": [{"seconds": 1}]}, "lacks 'starts.0.device'"),
        ({"starts": [{"device": "cpu", "git": "abc"}]}, "starts.0.git"),
        ({"seed": None}, "seed"),
    ):
        path.write_text(json.dumps(whole | change))
        done = program("cm-compare", *runs, "--out", tmp_path / "out")
        assert done.code == 2
        assert "run.json cannot be read" in done.err
        assert words in done.err


def test_an_evaluation_of_another_size_is_left_out(runs, program, tmp_path):
    """A quick look at one run does not make the distances of training incomparable."""
    done = program("cm-compare", *runs, "--out", tmp_path / "before")
    rows = [line for line in done.out.splitlines() if line.startswith("| seed")]
    words = ["--n", 40, "--seeds", 0, "--sigmas", 80]
    assert program("cm-eval", runs[0], *words).code == 0
    done = program("cm-compare", *runs, "--out", tmp_path / "after")
    assert done.code == 0, done.err
    assert "cannot be ranked" not in done.out
    assert "Evaluations are left out, as they differ in number of samples (seed0: 40," in done.out
    assert [line for line in done.out.splitlines() if line.startswith("| seed")] == rows


def test_an_evaluation_of_a_shorter_run_is_left_out(runs, program, tmp_path):
    for run in runs:
        words = ["--n", 66, "--seeds", 0, "--sigmas", 80]
        assert program("cm-eval", run, *words).code == 0
    path = runs[0] / "eval/eval.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"kimg": content["kimg"] / 2}))
    done = program("cm-compare", *runs, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert f"{path} is of" in done.err
    assert "its distances of training are shown" in done.err
    again = program("cm-eval", runs[0], *words)
    assert again.code == 2
    assert "was measured with another kimg" in again.err


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
