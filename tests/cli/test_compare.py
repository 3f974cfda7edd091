"""cm-compare: the numbers of the runs, ranked only where they may be."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import pytest

from cm_lightning.cli import compare_figures
from cm_lightning.cli.compare import curves, differing, read_entry
from cm_lightning.cli.compare_figures import all_panels, at_the_end, by_level, distance_panels
from cm_lightning.cli.compare_runs import Entry
from cm_lightning.cli.fit import main
from cm_lightning.dashboard import panel
from cm_lightning.evaluation import diagnostics_figure, read_metrics
from cm_lightning.families import families_in, level, own_figures
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
    assert level("1e-07-1e-05") == pytest.approx(1e-6)
    assert level("0-5") == pytest.approx(5**0.5)
    for text in ("evil", "below_x", "-1-2", "2", "above_1e999", "1-2/3", "below_0"):
        assert level(text) is None
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


def entry(name, rows, last=(), path=None):
    """A run of these rows of metrics."""
    record = {"results": {"last": dict.fromkeys(last, 1.0)}, "starts": [], "total_kimg": 2}
    return Entry(name, path, record, rows, {}, {}, {})


@pytest.fixture
def drawn(monkeypatch):
    """Figures as they are drawn, in the place of their files."""
    found = []

    monkeypatch.setattr(compare_figures, "png", lambda figure: found.append(figure) or b"")
    return found


def legends(figure):
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_lines_of_distances_are_of_what_all_runs_have(drawn):
    """The live weights are best in one run, and the other has none."""
    shared, own = "fd_digits2k/ema_std0.100/nfe1", "fd_digits2k/live/nfe1"
    rows = [{"kimg": k, shared: 9.0 - k, own: 1.0} for k in (1.0, 2.0)]
    pair = [
        entry("both", rows, [shared, own]),
        entry("one", [{"kimg": k, shared: 5.0} for k in (1.0, 2.0)], [shared]),
        entry("phased", [{"kimg": 1.0, "fd_digits2k/live/phased_nfe4": 1.0}]),
    ]
    first, _ = distance_panels(pair)
    assert [line.get_ydata().tolist() for line in drawn[0].axes[0].lines] == [[8, 7], [5, 5]]
    assert legends(drawn[0]) == ["both", "one"]
    assert first.caption.startswith(
        "Frechet distance over digits features of 2k samples, average std 0.100, 1 network call. "
    )
    # where they share nothing each line says what it is
    alone = [entry("x", rows, [own]), entry("y", rows, [shared])]
    first, _ = distance_panels(alone)
    assert "share no average" in first.caption
    words = "digits features of 2k samples"
    assert " ".join(legends(drawn[2])[0].split()) == f"x: {words}, live weights, 1 network call"
    # and one point is no course
    assert distance_panels([entry("both", rows[-1:], [shared, own])]) == []


def test_figures_grow_with_their_legend_and_cut_nothing(tmp_path):
    """Fifteen arms, one of a long name: every text lies inside and the plot keeps its size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    names = [f"number-{n}-gc-time" for n in range(14)] + [" ".join(["a long name"] * 9)]
    pictures = []
    real = compare_figures.png
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_figures, "png", lambda f: pictures.append(f) or real(f))
        rows = [{"kimg": k, "gradient/norm": k, "discrepancy/1-2": k} for k in (1.0, 2.0)]
        all_panels([entry(name, rows, path=tmp_path) for name in names])
    assert len(pictures) == 2
    for figure in pictures:
        FigureCanvasAgg(figure).draw()
        (legend,) = figure.legends
        (axis,) = figure.axes
        for text in (*legend.get_texts(), axis.yaxis.label, axis.xaxis.label):
            box = text.get_window_extent()
            assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
            assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
        assert axis.bbox.height > 2.4 * figure.dpi
        assert not legend.get_window_extent().overlaps(axis.get_tightbbox())


OWN = r"sharp_$\frac{$"
NOTED = {"kimg": 1.0, "loss_by_sigma/1-2": 1.0, "loss_by_sigma/evil": 2.0, "speed/x": 3.0} | {
    f"{name}/1-2": 5.0 for name in (OWN, "ess")
}


def test_values_that_a_regime_of_ones_own_notes_are_drawn(drawn):
    """Those of the bins of the loss are; what has other bins is something else."""
    assert families_in(["other/1-3", *NOTED]).keys() == {"loss_by_sigma", "ess", OWN}
    family, bins = own_figures(NOTED)[OWN]
    title = OWN.replace("sharp_", "Sharp ")
    assert bins == ["1-2"]
    assert family.scale == "linear"
    panels = {panel.title: panel for panel in by_level([entry("run", [NOTED])])}
    assert panels.keys() == {"Loss", "Effective sample size", title}
    assert panels[title].name == "sharp___frac__"
    assert panels[title].caption == "A value that the regime notes for every image."
    figure = diagnostics_figure([NOTED])
    assert [axis.get_title() for axis in figure.axes if axis.lines] == list(panels)
    figure.savefig("/dev/null", format="png")
    assert panel(f"{OWN}/1-2") == f"by_level_{OWN}/1-2"
    assert panel("fd_a2k/live/nfe1") == "fd_a2k/live/nfe1"


def rewrite(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_files_say_is_shown_and_not_obeyed(runs, program, tmp_path):
    """Markup, mathematics and escapes of terminals; a link in the place of a figure."""
    evil = "<i>$\\frac{$\x1b[2J"
    run = runs[0].rename(tmp_path / "a $\\frac{$ <i>")
    rewrite(run / "run.json", regime=evil, wandb_id=evil)
    text = (run / "metrics.csv").read_text()
    for name in ("loss_by_sigma/evil", "noted<i>$\\frac{$/2-10"):
        head, *lines = text.splitlines()
        text = "\n".join([f"{head},{name}", *(f"{line},1" for line in lines)]) + "\n"
    (run / "metrics.csv").write_text(text)
    (run / "samples/ema_0.9/nfe1/kimg<i>.png").write_bytes(b"")
    kept = tmp_path / "kept"
    kept.write_text("mine")
    figures = tmp_path / "out/figures"
    figures.mkdir(parents=True)
    (figures / "gradient_norm.png").symlink_to(kept)
    done = program("cm-compare", run, runs[1], "--out", tmp_path / "out")
    assert done.code == 0, done.err
    page = (tmp_path / "out/comparison.html").read_text()
    assert "<i>" not in page
    assert "Noted&lt;i&gt;$\\frac{$</b>. A value that the regime notes" in page
    report = (tmp_path / "out/comparison.md").read_text()
    assert "\x1b" not in page + report + done.out
    assert f"`cm-fit --config '{run}/config.yaml' --run_dir NEW`" in report
    assert kept.read_text() == "mine"
    assert not (figures / "gradient_norm.png").is_symlink()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("config.yaml", lambda text: text + "\nsamples: [1]\n", "'samples' of"),
        ("config.yaml", lambda text: text + "\nsamples: {seed: <b>}\n", "'samples.seed' of"),
        ("run.json", lambda text: text.replace('"n": 66', '"n": "66"'), "'n' of What"),
        ("run.json", lambda text: text.replace('"seconds":', '"time": 3, "x":'), "starts.0.time"),
        (
            "metrics.csv",
            lambda text: text + "inf" + "," * text.split("\n")[0].count(",") + "\n",
            "is",
        ),
    ],
)
def test_damaged_files_are_told_in_a_sentence(runs, program, tmp_path, name, change, words):
    path = runs[0] / name
    text = path.read_text().replace("\nsamples:", "\nsamples_before:")
    path.write_text(change(text))
    done = program("cm-compare", *runs, "--out", tmp_path / "out")
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_a_picture_is_a_png_or_none(runs, program, tmp_path):
    from PIL import Image

    path = sorted(runs[0].glob("samples/ema_0.9/nfe1/*.png"))[-1]
    Image.new("L", (8, 8)).save(path, format="GIF")
    done = program("cm-compare", *runs, "--out", tmp_path / "out")
    assert done.code == 2
    assert f"{path} is no picture" in done.err
    Image.new("LA", (8, 8)).save(path, format="PNG")
    assert program("cm-compare", *runs, "--out", tmp_path / "out").code == 0
