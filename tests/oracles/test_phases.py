"""Phases: edges, the objective by hand, one phase as none, deterministic sampling and eta."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from cm_lightning.objective import (
    DoublingGrid,
    Draw,
    ECTMapping,
    Euler,
    Independent,
    InverseStep,
    Objective,
    Phases,
    PseudoHuber,
    ReferenceMean,
    SampleMean,
    SquaredL2,
    Uniform,
)
from cm_lightning.sampling import PhasedSampler, multistep, phased
from cm_lightning.sigmas import phase_edges
from cm_lightning.types import Batch, InputError, References
from tests.toys import FunctionDenoiser, TinyDenoiser


@pytest.mark.parametrize(
    ("phases", "inner"),
    [
        (1, ()),
        (2, (2.515,)),
        (4, (0.170, 2.515, 17.53)),
        (8, (0.0261, 0.170, 0.743, 2.515, 7.10, 17.53, 39.0)),
    ],
)
def test_edges_of_the_karras_grid(phases, inner):
    edges = phase_edges(phases)
    assert (edges[0], edges[-1]) == (0, 80)
    assert edges[1:-1] == pytest.approx(inner, rel=3e-3)


def test_an_edge_belongs_to_the_segment_below():
    phases = Phases((0, 1, 4, 80))
    t = torch.tensor([1e-3, 1.0, 1.00001, 1.01, 4.0, 5.0, 80.0, 200.0], dtype=torch.float64)
    assert phases.end(t).tolist() == [0, 0, 0, 1, 1, 4, 4, 4]


@pytest.mark.parametrize("phases", [1, 2, 4])
def test_uniform_phases_are_equally_frequent_and_keep_the_law_within(phases):
    edges, n = phase_edges(phases), 400_000
    mapping = ECTMapping()
    generator = torch.Generator().manual_seed(0)
    device = torch.device("cpu")
    t, r = mapping.sample(n, 9_000_000, device, generator, edges)
    assert torch.equal(r, mapping.r(t, 2))
    plain, _ = mapping.sample(n, 0, device, generator)
    for low, high in pairwise((0.0, *edges[1:-1], torch.inf)):
        mine = t[(t > low) & (t <= high)]
        assert len(mine) / n == pytest.approx(1 / phases, abs=4e-3)
        theirs = plain[(plain > low) & (plain <= high)]
        for q in (0.1, 0.5, 0.9):
            expected = float(theirs.log().quantile(q))
            assert float(mine.log().quantile(q)) == pytest.approx(expected, abs=0.06)


def test_uniform_phases_on_a_grid():
    edges, grid = phase_edges(4), DoublingGrid(total_kimg=8)
    levels, law = grid.levels(0)[1:], grid.probabilities(0)
    generator = torch.Generator().manual_seed(0)
    t, r = grid.sample(400_000, 0, torch.device("cpu"), generator, edges)
    counts = torch.stack([(t == level).sum() for level in levels]) / len(t)
    end = Phases(edges).end(levels)
    for low in edges[:-1]:
        inside = end == low
        assert float(counts[inside].sum()) == pytest.approx(0.25, abs=3e-3)
        share = counts[inside] / counts[inside].sum()
        torch.testing.assert_close(
            share.double(), law[inside] / law[inside].sum(), atol=4e-3, rtol=0
        )
    assert bool((r < t).all())


def test_the_objective_draws_phases_as_asked():
    batch, *_ = setting()
    seen = []
    net = FunctionDenoiser(lambda x, s: seen.append(s.double()) or x)
    for uniform in (False, True):
        phases = Phases(phase_edges(4), uniform=uniform)
        objective = Objective(
            ECTMapping(), Independent(), Euler(SampleMean()), SquaredL2(), Uniform(), phases
        )
        output = objective(net, net, batch, Draw(0, 0, 0, 8, torch.device("cpu")))
        seen.append(output.t)
    plain, drawn = seen[2], seen[5]
    expected, _ = ECTMapping().sample(
        8, 0, torch.device("cpu"), Draw(0, 0, 0, 8, torch.device("cpu")).generator(), phase_edges(4)
    )
    assert torch.equal(drawn, expected)
    assert not torch.equal(plain, drawn)


def setting(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(8, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1
    z = torch.randn(x0.shape, generator=generator, dtype=dtype)
    t = torch.tensor([0.3, 0.9, 1.5, 3.0, 4.5, 10.0, 40.0, 80.0], dtype=torch.float64)
    r = torch.tensor([0.0, 0.5, 0.2, 2.0, 1.0, 9.0, 3.0, 79.0], dtype=torch.float64)
    return Batch(x0, None, torch.arange(8)), z, t, r


def test_objective_by_hand():
    batch, z, t, r = setting()
    net = FunctionDenoiser(lambda x, s: x / (1 + s * s) + 0.1 * x.sin())
    for normalize in (False, True):
        phases = Phases((0, 1, 4, 80), normalize)
        objective = Objective(
            ECTMapping(), Independent(), Euler(SampleMean()), SquaredL2(), Uniform(), phases
        )
        loss = objective.evaluate(net, net, batch, t, r, z, torch.zeros(8))
        end = torch.tensor([0, 0, 1, 1, 4, 4, 4, 4], dtype=torch.float64)
        assert loss.r.tolist() == torch.maximum(r, end).tolist()
        for i in range(8):
            x_t = batch.x0[i : i + 1] + t[i] * z[i : i + 1]
            x_r = batch.x0[i : i + 1] + loss.r[i] * z[i : i + 1]
            d_t, d_r = net(x_t, t[i : i + 1]), net(x_r, loss.r[i : i + 1].clamp_min(1e-9))
            f_t = d_t + end[i] / t[i] * (x_t - d_t)
            f_r = x_r if loss.r[i] == end[i] else d_r + end[i] / loss.r[i] * (x_r - d_r)
            scale = (1 - end[i] / t[i]) ** 2 if normalize else 1.0
            expected = float((f_t - f_r).square().sum() / scale)
            assert float(loss.loss[i]) == pytest.approx(expected, rel=1e-10)


def test_one_phase_is_none_bit_for_bit():
    torch.manual_seed(0)
    net = TinyDenoiser(dropout=0.3).train()
    batch, z, t, r = setting(torch.float32)
    batch = batch._replace(references=References(batch.x0, None, batch.index))
    losses = []
    for phases in (None, Phases(phase_edges(1)), Phases(phase_edges(1), normalize=True)):
        objective = Objective(
            *(ECTMapping(), Independent(), Euler(ReferenceMean())),
            *(PseudoHuber(), InverseStep(), phases),
        )
        losses.append(objective.evaluate(net, net, batch, t, r, z, torch.zeros(8)).loss)
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(losses[0], losses[2])


def exact(edges, s: float = 0.5) -> FunctionDenoiser:
    """For N(0, s^2): the D whose jump to the segment's end is the exact flow."""
    phases = Phases(edges)

    def function(x, t):
        end = phases.end(t.reshape(-1)).reshape(t.shape).to(x.dtype)
        there = ((s * s + end * end) / (s * s + t * t)).sqrt() * x
        return (there - end / t * x) / (1 - end / t)

    return FunctionDenoiser(function)


@pytest.mark.parametrize("phases", [1, 2, 4, 8])
def test_exact_phases_arrive_at_the_exact_endpoint(phases):
    edges = phase_edges(phases)
    z = torch.randn(6, 1, 2, 2, dtype=torch.float64)
    endpoint = 0.5 / (0.25 + 6400) ** 0.5 * 80 * z
    torch.testing.assert_close(phased(exact(edges), z, edges), endpoint, rtol=1e-9, atol=0)
    assert PhasedSampler(edges).nfe == phases


def test_eta_1_is_plain_and_one_phase_is_one_step():
    z = torch.randn(6, 1, 2, 2)
    net = FunctionDenoiser(lambda x, t: x / (1 + t) + 0.1)
    for edges in (phase_edges(1), phase_edges(4)):
        assert torch.equal(phased(net, z, edges), phased(net, z, edges, eta=1.0))
    assert torch.equal(phased(net, z, phase_edges(1)), multistep(net, z[None], [80.0]))
    assert not torch.equal(phased(net, z, phase_edges(4)), phased(net, z, phase_edges(4), eta=0.8))


def test_eta_asks_below_the_edges_and_ends_at_zero():
    seen = []
    net = FunctionDenoiser(lambda x, t: seen.append(float(t.max())) or 0 * x)
    z = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    out = phased(net, z, (0, 1, 4, 80), eta=0.5)
    assert seen == [80, 2, 0.5]
    assert float(out) == 0
    assert PhasedSampler((0, 1, 4, 80), eta=0.5).name == "phased_nfe3_eta0.5"


@pytest.mark.parametrize(
    "make",
    [
        lambda: Phases((0, 2, 1)),
        lambda: Phases((0.1, 2)),
        lambda: Phases((0,)),
        lambda: PhasedSampler((0, 1, 1)),
        lambda: PhasedSampler((0, 1), eta=0),
        lambda: PhasedSampler((0, 1), eta=1.1),
        lambda: phase_edges(0),
    ],
)
def test_bad_edges_and_eta_are_named(make):
    with pytest.raises(InputError):
        make()
