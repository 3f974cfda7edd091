"""Networks against the official implementations, weight for weight."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch.nn import functional

from cm_lightning.networks import (
    ADMUNet,
    EDM2Precond,
    EDM2UNet,
    EDMPrecond,
    SongUNet,
    edm_coefficients,
)
from cm_lightning.types import expand
from tests.conftest import GOLDEN

FILES = sorted([*GOLDEN.glob("edm_*.npz"), *GOLDEN.glob("edm2*.npz")])
BACKBONES = {
    "EDMPrecond:SongUNet": (EDMPrecond, SongUNet),
    "EDMPrecond:DhariwalUNet": (EDMPrecond, ADMUNet),
    "EDM2Precond": (EDM2Precond, EDM2UNet),
}


def build(constructor: dict) -> EDMPrecond:
    arguments = dict(constructor)
    network = arguments.pop("network")
    assert network in BACKBONES, f"no class for the golden network {network}: add it to BACKBONES"
    channels = arguments.pop("img_channels")
    precond, backbone = BACKBONES[network]
    return precond(backbone(in_channels=channels, out_channels=channels, **arguments))


def test_golden_files_were_found():
    assert FILES


@pytest.mark.parametrize("attention", ["sdpa", "math"])
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_output_is_official(path, attention):
    golden = np.load(path, allow_pickle=False)
    denoiser = build(json.loads(str(golden["constructor"])) | {"attention": attention}).eval()
    state = {
        name.removeprefix("param/"): torch.from_numpy(golden[name])
        for name in golden.files
        if name.startswith("param/")
    }
    denoiser.load_state_dict(state, strict=True)
    x, sigma = torch.from_numpy(golden["x"]), torch.from_numpy(golden["sigma"])
    extra = {
        name: torch.from_numpy(golden[name]) if name in golden.files else None
        for name in ("class_labels", "augment_labels")
    }
    c_skip, c_out, c_in, c_noise = edm_coefficients(sigma, denoiser.sigma_data)
    with torch.no_grad():
        raw = denoiser.backbone(expand(c_in, x) * x, c_noise, *extra.values())
    if "raw" in golden.files:
        torch.testing.assert_close(raw, torch.from_numpy(golden["raw"]), rtol=1e-5, atol=1e-5)
    if "logvar" in golden.files:
        logvar = torch.from_numpy(golden["logvar"]).flatten()
        with torch.no_grad():
            torch.testing.assert_close(denoiser.log_variance(sigma), logvar, rtol=1e-5, atol=1e-5)
    denoised = expand(c_skip, x) * x + expand(c_out, x) * raw
    expected = torch.from_numpy(golden["denoised"])
    torch.testing.assert_close(denoised, expected, rtol=1e-5, atol=1e-5)
    rows = extra["class_labels"]
    labels = None if rows is None else rows.argmax(1)
    one_hot = rows is None or torch.equal(functional.one_hot(labels, rows.shape[1]).float(), rows)
    if one_hot and extra["augment_labels"] is None:
        with torch.no_grad():
            out = denoiser(x, sigma, labels)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
