"""ECT's mapping r(t) against the table computed from the paper's formula."""

from __future__ import annotations

import math

import pytest
import torch

from cm_lightning.objective import ECTMapping
from cm_lightning.types import InputError

# columns: stages 0 to 7 at q = 2
TABLE = {
    0.002: (0, 0, 0.000751, 0.001375, 0.001688, 0.001844, 0.001922, 0.001961),
    0.02: (0, 0, 0.007600, 0.013800, 0.016900, 0.018450, 0.019225, 0.019612),
    0.1: (0, 0, 0.039998, 0.069999, 0.084999, 0.092500, 0.096250, 0.098125),
    0.3: (0, 0, 0.134833, 0.217416, 0.258708, 0.279354, 0.289677, 0.294839),
    0.821: (0, 0.114035, 0.467517, 0.644259, 0.732629, 0.776815, 0.798907, 0.809954),
    1.0: (0, 0.212117, 0.606059, 0.803029, 0.901515, 0.950757, 0.975379, 0.987689),
    1.526: (0, 0.599475, 1.062737, 1.294369, 1.410184, 1.468092, 1.497046, 1.511523),
    2.0: (0.046377, 1.023188, 1.511594, 1.755797, 1.877899, 1.938949, 1.969475, 1.984737),
    3.0: (0.930890, 1.965445, 2.482722, 2.741361, 2.870681, 2.935340, 2.967670, 2.983835),
    5.0: (2.366143, 3.683071, 4.341536, 4.670768, 4.835384, 4.917692, 4.958846, 4.979423),
    10.0: (4.998184, 7.499092, 8.749546, 9.374773, 9.687387, 9.843693, 9.921847, 9.960923),
    20.0: (10.0, 15.0, 17.5, 18.75, 19.375, 19.6875, 19.84375, 19.921875),
    80.0: (40.0, 60.0, 70.0, 75.0, 77.5, 78.75, 79.375, 79.6875),
}


@pytest.mark.parametrize("stage", range(8))
def test_table_at_q_2(stage):
    t = torch.tensor(list(TABLE), dtype=torch.float64)
    expected = torch.tensor([row[stage] for row in TABLE.values()], dtype=torch.float64)
    torch.testing.assert_close(ECTMapping().r(t, stage), expected, rtol=0, atol=6e-7)


def test_other_factors_are_the_same_decays():
    t = torch.tensor(list(TABLE), dtype=torch.float64)
    for stage in range(4):
        torch.testing.assert_close(
            ECTMapping(q=4).r(t, stage), ECTMapping(q=2).r(t, 2 * stage + 1), rtol=1e-14, atol=0
        )
    torch.testing.assert_close(
        ECTMapping(q=256).r(t, 0), ECTMapping(q=2).r(t, 7), rtol=1e-14, atol=0
    )


@pytest.mark.parametrize(
    ("mapping", "share"),
    [
        (ECTMapping(-1.1, 2.0), 0.811345),
        (ECTMapping(-0.8, 1.6), 0.820188),
        (ECTMapping(-1.0, 1.4), 0.882939),
        (ECTMapping(-1.1, 2.0, q=4), 0.584780),
    ],
)
def test_share_of_zero_targets(mapping, share, generator):
    t, r = mapping.sample(400_000, 0, torch.device("cpu"), generator)
    assert float((r == 0).double().mean()) == pytest.approx(share, abs=2.5e-3)
    assert bool(((r >= 0) & (r < t)).all())


def test_law_of_t(generator):
    t, _ = ECTMapping().sample(400_000, 0, torch.device("cpu"), generator)
    assert t.dtype is torch.float64
    assert float(t.log().mean()) == pytest.approx(-1.1, abs=0.01)
    assert float(t.log().std()) == pytest.approx(2.0, abs=0.01)
    assert float((t < 0.002).double().mean()) == pytest.approx(0.0053, abs=5e-4)


def test_stages_start_at_exact_multiples_and_stop():
    mapping = ECTMapping(kimg_per_stage=3200)
    assert [mapping.stage(n) for n in (0, 3_199_999, 3_200_000, 25_600_000)] == [0, 0, 1, 7]
    assert ECTMapping(kimg_per_stage=0.5).stage(1600) == math.floor(1600 / 500)


@pytest.mark.parametrize(
    "arguments", [{"q": 1.0}, {"p_std": 0.0}, {"kimg_per_stage": 0.0}, {"stages": 0}, {"k": -1.0}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match=next(iter(arguments))):
        ECTMapping(**arguments)
