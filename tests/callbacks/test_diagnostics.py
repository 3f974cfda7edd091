"""The target's variance against published tables, and the picture."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cm_lightning.callbacks import DiagnosticsCallback
from cm_lightning.data import Digits
from cm_lightning.evaluation import diagnostics_figure, read_metrics, schedules_figure
from cm_lightning.objective import (
    DoublingGrid,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Independent,
    MinibatchOT,
    ReferenceMean,
    SampleMean,
)
from cm_lightning.types import Batch, InputError, References
from tests.cli.conftest import ROOT, TINY

EDGES = (0.98, 1.02, 1.96, 2.04, 4.9, 5.1)


@pytest.fixture(scope="module")
def digits():
    images, labels = Digits().read()
    x0 = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return x0, torch.from_numpy(np.array(labels)).long()


def measure(posterior, digits, n, conditional, sets=8, coupling=Independent()):
    """Mean over several random reference sets of what the callback measures."""
    x0, labels = digits
    labels = labels if conditional else None
    everything = References(x0, labels, torch.arange(len(x0)))
    callback = DiagnosticsCallback(edges=EDGES, exact_rows=len(x0))
    trainer = SimpleNamespace(
        world_size=1,
        global_rank=0,
        datamodule=SimpleNamespace(all_references=lambda batch: everything),
        strategy=SimpleNamespace(reduce=lambda values, reduce_op: values),
    )
    found = []
    for number in range(sets):
        generator = torch.Generator().manual_seed(number)
        chosen = torch.randperm(len(x0), generator=generator)
        if conditional:
            chosen = torch.cat([chosen[labels[chosen] == c][: n - 1] for c in range(10)])
        else:
            chosen = chosen[: n - 1]
        chosen_labels = None if labels is None else labels[chosen]
        some = References(x0[chosen], chosen_labels, chosen)
        order = torch.randperm(len(x0), generator=generator)
        batch = Batch(x0[order], None if labels is None else labels[order], order, some)
        module = SimpleNamespace(
            objective=SimpleNamespace(solver=Euler(posterior), coupling=coupling),
            complete=lambda batch: batch,
            seed=number,
            nimg=0,
        )
        callback._batch = batch
        found.append(callback._target_variance(trainer, module))
    return {key: float(np.mean([values[key] for values in found])) for key in found[0]}


@pytest.mark.parametrize(
    ("n", "conditional", "target", "sample"),
    [  # per pixel, at t = 1, 2, 5; the tables' own grid of set sizes
        (16, False, (6.53e-2, 7.87e-2, 2.95e-2), (7.55e-2, 0.206, 0.275)),
        (64, False, (4.94e-2, 3.18e-2, 7.6e-3), (7.55e-2, 0.206, 0.275)),
        (64, True, (0.0113, 0.0064, 0.0024), (0.0534, 0.121, 0.162)),
    ],
)
def test_target_variance_of_reference_sets(digits, n, conditional, target, sample):
    found = measure(ReferenceMean(skip=None), digits, n, conditional)
    bins = ("0.98-1.02", "1.96-2.04", "4.9-5.1")
    for name, a, b in zip(bins, target, sample, strict=True):
        assert found[f"target_variance/{name}"] == pytest.approx(a, rel=0.15)
        assert found[f"sample_variance/{name}"] == pytest.approx(b, rel=0.1)


def test_one_sample_has_the_variance_of_a_sample_and_the_whole_class_none(digits):
    found = measure(SampleMean(), digits, 4, True, sets=1)
    assert found["target_variance/1.96-2.04"] == found["sample_variance/1.96-2.04"] > 0.05
    found = measure(ReferenceMean(skip=None), digits, 2000, True, sets=1)
    assert max(v for key, v in found.items() if key.startswith("target")) < 1e-10


def test_it_is_left_out_where_noise_depends_on_the_image(digits):
    """What is measured has independent noise, as rows have that a generator leaves alone."""
    assert measure(SampleMean(), digits, 4, True, 1, MinibatchOT()) == {}
    generated = measure(SampleMean(), digits, 4, True, 1, GeneratorCoupling())
    assert generated == measure(SampleMean(), digits, 4, True, 1)


def test_runs_log_it_and_draw_the_picture(program, tmp_path):
    run = tmp_path / "run"
    words = ["--config", ROOT / "configs" / "sct_digits.yaml", "--config", TINY, "--run_dir", run]
    words += ["--model.references.n", "16", "--diagnostics.picture", "true"]
    assert program("cm-fit", *words).code == 0
    rows = read_metrics(run / "metrics.csv")
    keys = {key for row in rows for key in row}
    for family in ("target_variance", "sample_variance", "ess", "discrepancy", "skipped"):
        assert f"{family}/2-10" in keys
    last = [row for row in rows if "target_variance/2-10" in row][-1]
    assert 0 < last["target_variance/2-10"] < last["sample_variance/2-10"]
    assert (run / "diagnostics.png").read_bytes().startswith(b"\x89PNG")
    figure = diagnostics_figure(rows)
    assert len([axis for axis in figure.axes if axis.lines]) == 8
    (axis,) = (axis for axis in figure.axes if axis.get_title() == "Effective sample size")
    lines = axis.lines
    assert [line.get_label() for line in lines][-1] == "above 10"
    drawn = [row["ess/above_10"] for row in rows if "ess/above_10" in row]
    assert lines[-1].get_ydata().tolist() == drawn


def test_gc_logs_its_transport_cost(program, tmp_path):
    run = tmp_path / "run"
    words = ["--config", ROOT / "configs" / "gc_digits.yaml", "--config", TINY, "--run_dir", run]
    words += [
        "--fid.profiles",
        "[]",
        "--samples.every_kimg",
        "null",
        "--diagnostics.edges",
        "[0.5]",
    ]
    assert program("cm-fit", *words).code == 0
    rows = read_metrics(run / "metrics.csv")
    assert len(rows) > 2
    for row in rows:
        for name in ("below_0.5", "above_0.5"):
            # digits in [-1, 1] against unit noise: 1 + E x0^2, whatever the level
            assert row[f"independent_cost/{name}"] == pytest.approx(1.73, abs=0.12)
            assert row[f"transport_cost/{name}"] != row[f"independent_cost/{name}"]
            assert row[f"generated/{name}"] == pytest.approx(0.5, abs=0.25)


def test_switched_off(fit, tmp_path):
    run = tmp_path / "run"
    assert fit(run, "--diagnostics.exact_rows", "0").code == 0
    assert not any(
        "target_variance" in key for row in read_metrics(run / "metrics.csv") for key in row
    )
    assert not (run / "diagnostics.png").exists()
    assert fit(tmp_path / "bad", "--diagnostics.exact_rows", "-1").code == 2


def test_schedules_figure_shows_both_ends_of_a_stage():
    stairs, smooth = ECTMapping(kimg_per_stage=10), ECTMapping(kimg_per_stage=10, substeps=4)
    figure = schedules_figure({"ECT": stairs, "SCT": smooth}, 80)
    first, second = figure.axes[0].lines
    x, y = first.get_xdata(), first.get_ydata()
    before, after = y[(x > 15) & (x < 20)], y[(x > 20) & (x < 25)]
    assert np.ptp(before) == np.ptp(after) == 0
    assert before[0] > after[0]
    assert np.ptp(second.get_ydata()[(x > 15) & (x < 20)]) > 0
    assert second.get_ydata()[-1] == pytest.approx(y[-1])
    assert len(schedules_figure({"iCT": DoublingGrid()}, 80).axes) == 2
    with pytest.raises(InputError, match="total_kimg"):
        schedules_figure({"ECT": stairs}, 0)


def test_files_that_are_no_metrics(tmp_path):
    with pytest.raises(InputError, match="There is no"):
        read_metrics(tmp_path / "metrics.csv")
    (tmp_path / "metrics.csv").write_text("kimg,loss\n1,much\n")
    with pytest.raises(InputError, match=r"is not a metrics\.csv"):
        read_metrics(tmp_path / "metrics.csv")
    assert diagnostics_figure([{"kimg": 1.0, "loss": 2.0}]) is None
