"""Regimes that must coincide: one in the limit of another, bit for bit unless roundings differ."""

from __future__ import annotations

import copy

import pytest
import torch

from cm_lightning.callbacks import TargetNetworkCallback
from cm_lightning.dropout import shared_dropout
from cm_lightning.ema import ConstantEMA
from cm_lightning.objective import (
    L2,
    DoublingGrid,
    Draw,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Heun,
    Independent,
    InverseStep,
    KarrasGrid,
    Objective,
    Phases,
    PseudoHuber,
    ReferenceMean,
    SampleMean,
    SquaredL2,
    TeacherMean,
    Uniform,
)
from cm_lightning.regimes import CT, ECT, GC, ICT
from cm_lightning.sampling import GuidedDenoiser
from cm_lightning.types import Batch, References
from tests.toys import FunctionDenoiser, TinyDenoiser

CPU = torch.device("cpu")


def batch(n: int = 32, features: int = 8) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.rand(n, 1, features, features, generator=generator) * 2 - 1
    return Batch(x0, None, torch.arange(n))


def draw(n: int = 32, nimg: int = 640) -> Draw:
    return Draw(seed=3, nimg=nimg, start=0, total=n, device=CPU)


@pytest.fixture
def denoiser():
    torch.manual_seed(0)
    return TinyDenoiser(dropout=0.3).train()


def losses(module) -> torch.Tensor:
    return module.loss(batch(), draw()).loss


def step(module) -> list[torch.Tensor]:
    """Gradients of one loss."""
    module.zero_grad()
    losses(module).mean().backward()
    return [p.grad.clone() for p in module.denoiser.parameters()]


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- GC ---


def bases(denoiser, coupling):
    """Every regime with a coupling; CD through its objective, as its teacher is a function."""
    yield "ect", ECT(denoiser, 1.0, coupling=coupling)
    yield "ict", ICT(denoiser, 1.0, coupling=coupling)
    yield "ct", CT(denoiser, 1.0, coupling=coupling, distance=L2())
    teacher = FunctionDenoiser(lambda x, t: 0.25 * x / (0.25 + t * t))
    module = ICT(denoiser, 1.0, coupling=coupling)
    module.assemble(
        Objective(KarrasGrid(18), coupling, Heun(TeacherMean(teacher)), L2(), Uniform()),
        ConstantEMA(0.95),
    )
    yield "cd", module


def test_gc_without_generated_rows_is_its_base(denoiser):
    plain = dict(bases(denoiser, Independent()))
    mixed = dict(bases(denoiser, GeneratorCoupling(0.0)))
    for name, base in plain.items():
        assert torch.equal(losses(base), losses(mixed[name])), name
        assert same(step(base), step(mixed[name])), name
    assert torch.equal(
        losses(GC(denoiser, 1.0, coupling=GeneratorCoupling(0.0))), losses(plain["ict"])
    )


def test_gc_works_with_every_base(denoiser):
    plain = dict(bases(denoiser, Independent()))
    for name, module in bases(denoiser, GeneratorCoupling(0.5)):
        differ = losses(module) != losses(plain[name])  # under ECT only where r > 0
        assert 1 <= int(differ.sum()) <= 28, name


def test_the_endpoint_drops_out_only_if_told_and_under_masks_of_its_own(denoiser):
    seen = {}
    for dropout in (False, True):
        module = GC(denoiser, 1.0, coupling=GeneratorCoupling(1.0, dropout=dropout))
        module.endpoint.register_forward_pre_hook(
            lambda _, inputs, dropout=dropout: seen.update({dropout: inputs})
        )
        modes = [m.training for m in module.endpoint.modules()]
        outputs = {}
        module.endpoint.register_forward_hook(
            lambda _, __, output, outputs=outputs: outputs.update(x=output)
        )
        module.loss(batch(), draw())
        assert modes == [m.training for m in module.endpoint.modules()]
        x, sigma = seen[dropout][:2]
        still = copy.deepcopy(denoiser).eval()(x, sigma)
        pair = copy.deepcopy(denoiser).train()
        with shared_dropout(pair, draw().dropout(), CPU):
            pair = pair(x, sigma)
        assert torch.equal(outputs["x"], still) is not dropout
        assert not torch.equal(outputs["x"], pair)


def test_gc_starts_when_told(denoiser):
    late = GC(denoiser, 1.0, coupling=GeneratorCoupling(0.5, start_kimg=0.641))
    assert torch.equal(losses(late), losses(ICT(denoiser, 1.0)))
    started = GC(denoiser, 1.0, coupling=GeneratorCoupling(0.5, start_kimg=0.64))
    assert not torch.equal(losses(started), losses(late))


def test_a_perfect_endpoint_of_a_single_image_is_its_base(denoiser):
    """Where the endpoint is the image itself, generating it changes nothing but rounding."""
    one = Batch(torch.full((32, 1, 8, 8), 0.3), None, torch.arange(32))
    module = GC(denoiser, 1.0, coupling=GeneratorCoupling(1.0))
    module.endpoint = FunctionDenoiser(lambda x, t: torch.full_like(x, 0.3))
    base = ICT(denoiser, 1.0)
    assert torch.equal(module.loss(one, draw()).loss, base.loss(one, draw()).loss)


# --- CT, iCT, ECT ---


@pytest.mark.parametrize("level", ["lower", "upper"])
def test_rows_whose_pair_ends_at_0_are_left_alone(level):
    """There the image is the target. With phases no pair ends there but those of the first."""
    data, n = batch(8), 8
    t = torch.linspace(0.5, 40, n).double()
    r = torch.where(torch.arange(n) % 2 == 0, 0, t / 2)
    z, u = torch.randn_like(data.x0), torch.zeros(n)
    asked = {}
    for phases in (None, Phases((0.0, 5.0, 80.0))):
        coupling = GeneratorCoupling(1.0, endpoint="frozen", weights="x", level=level)
        leaves = (ECTMapping(), coupling, Euler(SampleMean()), SquaredL2(), Uniform())
        levels = []

        def endpoint(x, sigma, levels=levels):
            levels.append(sigma.flatten().double())
            return 0 * x

        network = FunctionDenoiser(lambda x, sigma: 0.5 * x)
        out = Objective(*leaves, phases).evaluate(
            network, network, data, t, r, z, u, endpoint=FunctionDenoiser(endpoint)
        )
        assert torch.equal(out.notes["generated"].bool(), out.r > 0)
        asked[phases] = levels[0]
        expected = t if level == "upper" else out.r
        made = out.r > 0
        torch.testing.assert_close(levels[0][made], expected[made], rtol=1e-6, atol=0)
    assert (out.r[r == 0] > 0).sum() == 3  # clamped to the edge, and asked there


def test_ct_with_rate_0_is_ict(denoiser):
    """After a step at rate 0 the target network is the trained network."""
    leaves = {
        "discretization": DoublingGrid(),
        "distance": PseudoHuber(),
        "weighting": InverseStep(),
    }
    ct = CT(denoiser, 1.0, target=ConstantEMA(0.0), **leaves)
    with torch.no_grad():
        for p in denoiser.parameters():
            p.add_(0.01)
    ict = ICT(denoiser, 1.0)
    assert not torch.equal(losses(ct), losses(ict))
    ct.global_batch = 32
    TargetNetworkCallback().on_step(None, ct, 0, 32)
    assert torch.equal(losses(ct), losses(ict))
    assert same(step(ct), step(ict))


def test_ect_and_ict_with_the_same_leaves_are_one(denoiser):
    leaves = {"discretization": ECTMapping(), "distance": L2(), "weighting": InverseStep()}
    assert torch.equal(losses(ECT(denoiser, 1.0, **leaves)), losses(ICT(denoiser, 1.0, **leaves)))


# --- CD ---


def test_cd_with_the_exact_teacher_uses_all_references(denoiser):
    """CD with Euler steps and the exact denoiser of a finite set is SCT with the whole set."""
    data = batch(64)
    points = data.x0.flatten(1).double()

    def exact(x, t):
        flat = x.double().flatten(1)
        square = flat.square().sum(1, keepdim=True) - 2 * flat @ points.T + points.square().sum(1)
        weights = (-square / (2 * t.double().reshape(-1, 1) ** 2)).softmax(1)
        return (weights @ points).reshape(x.shape).to(x.dtype)

    teacher = TeacherMean(FunctionDenoiser(exact))
    data = data._replace(references=References(data.x0, None, data.index))
    values = [
        Objective(KarrasGrid(18), Independent(), solver, SquaredL2(), Uniform())(
            denoiser, denoiser, data, draw(64)
        ).loss
        for solver in (Euler(teacher), Euler(ReferenceMean()))
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)
    one = Objective(KarrasGrid(18), Independent(), Euler(SampleMean()), SquaredL2(), Uniform())
    assert not torch.allclose(one(denoiser, denoiser, data, draw(64)).loss, values[0], rtol=0.01)


class Labelled(FunctionDenoiser):
    """Two answers: with and without a label."""

    num_classes = 8
    label_dropout = 0.1

    def __init__(self) -> None:
        super().__init__(None)
        self.calls = 0

    def forward(self, x, sigma, labels=None):
        self.calls += 1
        shift = torch.where(labels >= 0, labels.to(x.dtype), -7).reshape(-1, 1, 1, 1)
        return 0.5 * x + shift


def test_guidance_scale_1_is_no_guidance():
    data = batch(8)._replace(labels=torch.arange(8))
    t = torch.full((8,), 2.0, dtype=torch.float64)
    for scale, calls in ((1.0, 1), (2.5, 2), (0.0, 2)):
        teacher = Labelled()
        mean = TeacherMean(GuidedDenoiser(teacher, None, scale))(data.x0, t, data)
        labels = data.labels.reshape(-1, 1, 1, 1)
        expected = 0.5 * data.x0 - 7 + scale * (labels + 7)
        torch.testing.assert_close(mean, expected.to(mean.dtype), rtol=1e-5, atol=1e-5)
        assert teacher.calls == calls
    exact = Labelled()(data.x0, t, data.labels)
    plain = GuidedDenoiser(Labelled(), None, 1.0)
    assert torch.equal(TeacherMean(plain)(data.x0, t, data), exact)


def test_guided_teacher_of_gaussian_data_has_the_guided_mean():
    """Classes N(m_c, s^2), all N(m_u, s^2): guidance is the denoiser of m_u + w (m_c - m_u)."""
    s2, means, w = 0.25, torch.tensor([0.6, -0.4]), 1.7

    class Classes(Labelled):
        def forward(self, x, sigma, labels=None):
            m = torch.where(labels >= 0, means[labels.clamp_min(0)], 0.1).reshape(-1, 1, 1, 1)
            t = sigma.reshape(-1, 1, 1, 1)
            return (s2 * x + t * t * m) / (s2 + t * t)

    x = torch.randn(2, 1, 4, 4)
    data = Batch(x, torch.tensor([0, 1]), torch.arange(2))
    t = torch.tensor([0.7, 3.0], dtype=torch.float64)
    guided = TeacherMean(GuidedDenoiser(Classes(), None, w))(x, t, data)
    m = (0.1 + w * (means - 0.1)).reshape(-1, 1, 1, 1)
    level = t.float().reshape(-1, 1, 1, 1)
    expected = (s2 * x + level**2 * m) / (s2 + level**2)
    torch.testing.assert_close(guided, expected, rtol=1e-5, atol=1e-6)


def test_a_copy_of_the_network_is_as_good_as_the_network(denoiser):
    """The target's identity does not matter, only its weights and dropout masks."""
    objective = Objective(ECTMapping(), Independent(), Euler(SampleMean()), L2(), InverseStep())
    twin = copy.deepcopy(denoiser)
    assert torch.equal(
        objective(denoiser, denoiser, batch(), draw()).loss,
        objective(denoiser, twin, batch(), draw()).loss,
    )
