"""Losses and tables produced by the official implementations (see tests/golden/README.md)."""

from __future__ import annotations

import json

import pytest
import torch

from cm_lightning.objective import (
    L2,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    PseudoHuber,
    SampleMean,
)
from cm_lightning.types import Batch
from tests.conftest import GOLDEN
from tests.toys import FunctionDenoiser

FILES = [path for path in sorted(GOLDEN.glob("*.json")) if "ect" in json.loads(path.read_text())]


def cases(part: str) -> list:
    return [
        pytest.param(case, id=f"{path.stem}-{number}")
        for path in FILES
        for number, case in enumerate(json.loads(path.read_text())["ect"][part])
    ]


def test_golden_files_were_found():
    assert FILES


@pytest.mark.parametrize("case", cases("t_to_r"))
def test_r_of_t_is_official(case):
    mapping = ECTMapping(q=case["q"], k=case["k"], b=case["b"])
    t = torch.tensor(case["t"], dtype=torch.float64)
    expected = torch.tensor(case["r"], dtype=torch.float64)
    torch.testing.assert_close(mapping.r(t, case["stage"]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", cases("loss"))
def test_ect_loss_is_official(case):
    mapping = ECTMapping(q=case["q"])
    x0, z = (torch.tensor(case[key], dtype=torch.float64) for key in ("x0", "eps"))
    t = (torch.tensor(case["normal"], dtype=torch.float64) * 2.0 - 1.1).exp()
    r = mapping.r(t, case["stage"])
    denoiser = FunctionDenoiser(lambda x, s: x / (1 + s * s) + 0.1 * x.sin() * s / (1 + s))
    distance = L2() if case["c"] == 0 else PseudoHuber(case["c"])
    objective = Objective(mapping, Independent(), Euler(SampleMean()), distance, InverseStep())
    batch = Batch(x0, None, torch.arange(len(x0)))
    output = objective.evaluate(denoiser, denoiser, batch, t, r, z, torch.zeros_like(t))
    expected = torch.tensor(case["weighted_loss"], dtype=torch.float64)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
