"""Reconstruction of averages from those a real run has kept."""

from __future__ import annotations

import pytest
import torch

from cm_lightning.types import InputError
from cm_lightning.weights import from_pretrained, load_posthoc
from tests.cli.conftest import DIGITS, TINY


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """40 steps with three widths and snapshots at every eighth."""
    from cm_lightning.cli import fit

    run = tmp_path_factory.mktemp("runs") / "run"
    profiles = ", ".join(
        f"{{class_path: PowerEMA, init_args: {{std: {std}}}}}" for std in (0.05, 0.1, 0.075)
    )
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", str(run)]
    words += ["--model.total_kimg", "2.56", "--model.optimizer.lr", "1e-2"]
    words += ["--fid.n", "66", "--fid.every_kimg", "9", "--samples.every_kimg", "9"]
    words += ["--ema.profiles", f"[{profiles}]", "--ema.snapshots"]
    fit.main([*words, "[0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875]"])
    return run


def distance(a: dict, b: dict) -> float:
    return sum(float((a[name] - b[name]).square().sum()) for name in a) ** 0.5


def test_a_width_that_was_tracked_is_found_again(run_dir, monkeypatch):
    """Without its own averages, from the two others: far closer than either of them."""
    from cm_lightning.weights import posthoc

    tracked = from_pretrained(run_dir, "ema_std0.075").state_dict()
    others = [from_pretrained(run_dir, f"ema_std{w}").state_dict() for w in ("0.050", "0.100")]
    whole = posthoc.read_checkpoint

    def without(path):
        checkpoint = whole(path)
        averages = checkpoint["callbacks"]["EMACallback"]["averages"]
        assert len(averages) == 24
        kept = {name: value for name, value in averages.items() if "0.075" not in name}
        checkpoint["callbacks"]["EMACallback"]["averages"] = kept
        return checkpoint

    exact = load_posthoc(run_dir, 0.075)
    assert distance(exact.denoiser.state_dict(), tracked) < 1e-3 * distance(tracked, others[0])
    assert exact.info["ema"] == "ema_std0.075_posthoc"
    monkeypatch.setattr(posthoc, "read_checkpoint", without)
    found = load_posthoc(run_dir, 0.075).denoiser.state_dict()
    nearest = min(distance(other, tracked) for other in others)
    assert distance(found, tracked) < 0.1 * nearest


def test_sweep_and_mistakes(run_dir, program, tmp_path):
    out = tmp_path / "out"
    done = program("cm-weights", "phema", run_dir, "--std", 0.06, 0.09, "--out", out)
    assert done.code == 0, done.err
    assert "ema_std0.060_posthoc" in (out / "std0.060" / "README.md").read_text()
    for std in (0.06, 0.09):
        expected = load_posthoc(run_dir, std).denoiser.state_dict()
        loaded = from_pretrained(out / f"std{std:.3f}").state_dict()
        assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    wide = program("cm-weights", "phema", run_dir, "--std", 0.06, 0.5, "--out", tmp_path / "wide")
    assert wide.code == 2
    assert "std must lie" in wide.err
    assert not (tmp_path / "wide").exists()
    assert program("cm-weights", "phema", run_dir, "--std", 0.06, "--out", out).code == 2


def test_a_run_without_such_averages(program, tmp_path):
    run = tmp_path / "run"
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", run, "--model.total_kimg", 0.064]
    assert program("cm-fit", *words).code == 0
    with pytest.raises(InputError, match="keeps 1 averages"):
        load_posthoc(run, 0.075)
