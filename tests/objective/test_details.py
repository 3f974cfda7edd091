"""Details of the objective that no other test would miss."""

from __future__ import annotations

import math

import pytest
import torch

from cm_lightning.networks import ConsistencyPrecond, SongUNet
from cm_lightning.objective import (
    DoublingGrid,
    ECTMapping,
    GeneratorCoupling,
    Heun,
    KarrasGrid,
    ReferenceMean,
)
from cm_lightning.regimes import GC
from cm_lightning.types import Batch, InputError, References
from cm_lightning.weights import save_weights
from tests.toys import TinyDenoiser

CPU = torch.device("cpu")


def saved(folder):
    """A small network and its weights in a folder."""
    init = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "model_channels": 16}
    init |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = ConsistencyPrecond(SongUNet(**init))
    backbone = {"class_path": "cm_lightning.networks.SongUNet", "init_args": init}
    kind = "cm_lightning.networks.ConsistencyPrecond"
    config = {"class_path": kind, "init_args": {"backbone": backbone}}
    save_weights(folder, config, net.state_dict(), {"regime": "ICT"})
    return net


def test_the_share_of_generated_rows_ramps():
    coupling = GeneratorCoupling(0.2, mix_end=0.6)
    with pytest.raises(InputError, match="needs a length"):
        coupling.share(0)
    module = GC(TinyDenoiser(), total_kimg=10, coupling=coupling)
    share = module.objective.coupling.share
    assert [share(n) for n in (0, 5_000, 10_000, 20_000)] == pytest.approx([0.2, 0.4, 0.6, 0.6])
    own = GeneratorCoupling(0.2, mix_end=0.6, total_kimg=5).spanning(10)
    assert own.share(5_000) == pytest.approx(0.6)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_ratios_of_a_grid_that_are_no_powers_of_two():
    grid = DoublingGrid(s0=10, s1=35, total_kimg=9)  # floor(35 / 10) = 3
    stages = math.log2(3) + 1
    length = math.floor(9000 / stages)
    assert [grid.size(n) for n in (0, length - 1, length, 2 * length)] == [11, 11, 21, 36]


def test_a_phase_without_a_level_takes_nothing():
    grid = KarrasGrid(5)
    edges = (0.0, 0.001, 2.515, 80.0)  # no level of t lies below 0.001
    t, _ = grid.sample(20_000, 0, CPU, torch.Generator().manual_seed(0), edges)
    assert float((t <= 2.515 * 1.0001).double().mean()) == pytest.approx(0.5, abs=0.02)


def test_most_stages_of_the_mapping():
    ECTMapping(stages=24, kimg_per_stage=1).spanning(1000)
    with pytest.raises(InputError, match="give at most 24 stages"):
        ECTMapping(stages=25, kimg_per_stage=1).spanning(1000)


def test_notes_of_one_other_image():
    """Weights w of the own image and 1 - w of the other."""

    def pixel(value):
        return torch.full((1, 1, 1, 1), value, dtype=torch.float64)

    t, notes = torch.tensor([1.0, 2.0], dtype=torch.float64), {}
    others = References(pixel(1.0), None, torch.tensor([1]))
    batch = Batch(pixel(0.0), None, torch.tensor([0]), others, notes=notes)
    posterior = ReferenceMean(skip=None)
    mean = posterior(pixel(0.75), t[:1], batch)
    w = 1 / (1 + math.exp((0.75**2 - 0.25**2) / 2))
    assert float(mean) == pytest.approx(1 - w)
    assert float(notes["largest_weight"]) == pytest.approx(1 - w)
    assert float(notes["ess"]) == pytest.approx(1 / (w * w + (1 - w) ** 2))
    first = dict(notes)
    Heun(posterior)(pixel(0.75), t[:1], t[:1] / 2, batch)  # its second estimate notes nothing
    assert all(torch.equal(notes[name], first[name]) for name in first)
    notes.clear()
    found = posterior(pixel(0.75), t[1:], batch)
    assert float(notes["discrepancy"]) == pytest.approx(float(found) ** 2 / 4)


def test_rows_without_a_class_are_not_skipped():
    notes, far = {}, torch.tensor([99.0, 99.0])
    pair = torch.arange(2)
    references = References(torch.ones(2, 1, 1, 1), pair * 0, pair + 5, nearest=far)
    batch = Batch(torch.zeros(2, 1, 1, 1), -pair, pair, references, notes=notes)
    ReferenceMean()(torch.zeros(2, 1, 1, 1), torch.ones(2).double(), batch)
    assert notes["skipped"].tolist() == [1, 0]


def test_a_frozen_endpoint_is_the_one_named(tmp_path):
    other = saved(tmp_path / "w").eval()
    coupling = GeneratorCoupling(1.0, endpoint="frozen", weights=str(tmp_path / "w"))
    module = GC(saved(tmp_path / "own"), 1.0, coupling=coupling)
    endpoint = module.network("endpoint")
    assert endpoint is not module.denoiser
    for a, b in zip(endpoint.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert not a.requires_grad
    assert module.origins["endpoint"]["path"] == str(tmp_path / "w")
