"""Running the command-line programs inside the test process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "configs" / "ect_digits.yaml")
TINY = str(ROOT / "tests" / "tiny.yaml")


ONE_CALL = "[{class_path: MultistepSampler, init_args: {sigmas: [80]}}]"


class Done(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def program(monkeypatch, capsys):
    """``program("cm-fit", "--config", ...)`` runs as from a shell; returns code, stdout, stderr."""

    def run(name: str, *arguments: object) -> Done:
        from cm_lightning.cli import compare, data, evaluate, fit, sample, study, weights

        programs = {
            "cm-compare": compare,
            "cm-data": data,
            "cm-eval": evaluate,
            "cm-fit": fit,
            "cm-sample": sample,
            "cm-study": study,
            "cm-weights": weights,
        }
        main = programs[name].main
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    return run


@pytest.fixture
def fit(program):
    """Train the digits config, shrunk to seconds."""

    def run(run_dir: Path, *arguments: object) -> Done:
        return program(
            "cm-fit", "--config", DIGITS, "--config", TINY, "--run_dir", run_dir, *arguments
        )

    return run


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """A diffusion run of 20 steps with label dropout."""
    from cm_lightning.cli import fit

    run = tmp_path_factory.mktemp("runs") / "teacher"
    words = ["--config", str(ROOT / "configs" / "diffusion_digits.yaml"), "--config", TINY]
    words += ["--run_dir", str(run), "--model.total_kimg", "1.28", "--model.optimizer.lr", "5e-3"]
    words += ["--model.denoiser.backbone.label_dropout", "0.1", "--fid.n", "66"]
    fit.main([*words, "--fid.samplers", ONE_CALL, "--samples.samplers", ONE_CALL])
    return run
