"""Pieces of the regimes against values worked out here: what a slip would change in silence."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cm_lightning.callbacks import DiagnosticsCallback
from cm_lightning.dropout import DropoutKey, shared_dropout
from cm_lightning.ema import HalfLifeEMA, WarmupEMA
from cm_lightning.networks import EDM2Precond, EDM2UNet
from cm_lightning.networks.layers import UNetBlock
from cm_lightning.objective import (
    L2,
    DoublingGrid,
    Draw,
    ECTMapping,
    Euler,
    GeneratorCoupling,
    Heun,
    LogNormal,
    ReferenceMean,
    SquaredL2,
)
from cm_lightning.optim import GradientStats
from cm_lightning.regimes import CD, CT, ECT, GC, ICT, SCT, Diffusion
from cm_lightning.sampling import DEFAULT_SAMPLERS, MultistepSampler, draw_images
from cm_lightning.types import Batch, Denoiser, InputError, LossOutput, References
from tests.regimes.test_waiting import network, teacher
from tests.toys import TinyDenoiser

CPU = torch.device("cpu")


class Plain(Denoiser):
    """A network that takes a label of augmentation and gives a constant."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value))
        self.sigma_data = 0.5
        self.backbone = SimpleNamespace(augment_dim=2)

    def forward(self, x, sigma, labels=None, augment_labels=None):
        self.told = augment_labels
        return self.value.expand_as(x)


class Shift:
    """An augmentation that replaces each image by its row's first number."""

    labels, uniforms, normals = 2, 3, 1

    def __call__(self, x0, u, w):
        return u[:, 0, None, None, None].expand_as(x0), torch.cat([u[:, :1], w], 1)


def test_diffusion_learns_the_augmented_image_of_its_own_rows():
    module = Diffusion(Plain(0.0), 1, augment=Shift())
    x0 = torch.full((8, 1, 2, 2), 9.0)
    whole = module.loss(Batch(x0, None, torch.arange(8)), Draw(0, 0, 0, 8, CPU)).distance
    assert float(whole.max()) <= 4  # numbers in [0, 1], four pixels
    parts = [
        module.loss(Batch(x0[:4], None, torch.arange(4)), Draw(0, 0, start, 8, CPU)).distance
        for start in (0, 4)
    ]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_the_solver_is_the_one_that_was_asked_for(tmp_path):
    taught = teacher(tmp_path)
    for solver, kind in (("euler", Euler), ("heun", Heun)):
        assert type(SCT(network(), 1, solver=solver).objective.solver) is kind
        student = network(label_dropout=0.0)
        module = CD(student, taught, 1, solver=solver, distance=L2())
        assert type(module.objective.solver) is kind


def test_defaults_are_the_published_ones():
    rates = {CT: 4e-4, ICT: 1e-4, ECT: 1e-4, SCT: 1e-4, GC: 1e-4, Diffusion: 1e-3}
    for regime, rate in rates.items():
        options = {"distance": L2()} if regime is CT else {}
        optimizer = regime(TinyDenoiser(), 1, **options).configure_optimizers()
        assert optimizer.param_groups[0]["lr"] == rate, regime
        adam = torch.optim.Adam if regime is Diffusion else torch.optim.RAdam
        assert type(optimizer) is adam, regime
    assert Diffusion(TinyDenoiser(), 1).learning_rate.ramp_kimg == 10_000
    assert SCT(TinyDenoiser(), 1).objective.discretization.substeps == 4
    assert ECT(TinyDenoiser(), 1).objective.discretization == ECTMapping()
    assert LogNormal() == LogNormal(-1.2, 1.2)
    assert HalfLifeEMA().kimg == 500
    assert (MultistepSampler((80.0,)), MultistepSampler((80.0, 0.821))) == DEFAULT_SAMPLERS
    # e steps of beta are one step of the published update
    warm = WarmupEMA(0.9999, every=5)
    assert warm.beta(64_000_000, 64) ** 5 == pytest.approx(0.9999)


def test_the_grid_stops_doubling():
    grid = DoublingGrid(s0=10, s1=25, total_kimg=1)
    assert grid.size(0) == 11
    assert grid.size(5000) == grid.size(10**9) == 26
    assert grid.stage(10**9) == 2


def test_no_gradient_goes_through_a_generated_endpoint():
    torch.manual_seed(0)
    model = TinyDenoiser()
    module = GC(model, 1, coupling=GeneratorCoupling(mix=1.0, endpoint="online"))
    x0 = torch.rand(16, 1, 8, 8) * 2 - 1
    seen = []
    real = module.objective.coupling.__class__.__call__

    def watched(self, *arguments):
        found = real(self, *arguments)
        seen.append(found)
        return found

    patch = pytest.MonkeyPatch()
    patch.setattr(GeneratorCoupling, "__call__", watched)
    module.loss(Batch(x0, None, torch.arange(16)), Draw(0, 0, 0, 16, CPU))
    patch.undo()
    assert not any(value.requires_grad for value in seen[0] if isinstance(value, torch.Tensor))


def test_the_random_stream_depends_on_seed_and_place_apart():
    def first(seed, nimg, skipped=0):
        draw = Draw(seed, nimg, 0, 4, CPU, skipped)
        return float(torch.rand((), generator=draw.generator())), draw.dropout().seed

    found = [first(0, 64), first(64, 0), first(1, 63), first(0, 64, 64), first(0, 0)]
    assert len({number for number, _ in found}) == len(found)
    assert len({seed for _, seed in found}) == len(found)
    assert first(0, 64, 64) == first(0, 128)


def test_notes_of_the_references_by_hand():
    generator = torch.Generator().manual_seed(0)
    pool = torch.rand(6, 1, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1
    t = torch.tensor([0.7, 1.5, 3.0, 0.9], dtype=torch.float64)
    x_t = pool[:4] + t[:, None, None, None] * torch.randn(
        4, 1, 2, 2, generator=generator, dtype=torch.float64
    )
    nearest = torch.tensor([0.1, 0.1, 0.1, 50.0])
    references = References(pool, None, torch.arange(6), nearest=nearest)
    generated = torch.tensor([False, False, True, False])
    batch = Batch(pool[:4], None, torch.arange(4), references, generated=generated, notes={})
    mean = ReferenceMean()(x_t, t, batch)
    squares = (x_t[:, None] - pool[None]).flatten(2).square().sum(2)
    weights = torch.softmax(-squares / (2 * t[:, None] ** 2), 1)
    expected = torch.einsum("bn,nchw->bchw", weights, pool)
    torch.testing.assert_close(mean[:2], expected[:2])
    assert torch.equal(mean[2:], pool[2:4])
    notes = batch.notes
    torch.testing.assert_close(notes["ess"][:2], 1 / weights.square().sum(1)[:2])
    torch.testing.assert_close(notes["largest_weight"][:2], weights.max(1).values[:2])
    shift = (expected - pool[:4]).flatten(1).square().mean(1) / t**2
    torch.testing.assert_close(notes["discrepancy"][:2], shift[:2])
    assert notes["skipped"].tolist() == [0, 0, 0, 1]  # a generated row is none of its business


def test_a_window_by_hand():
    callback = DiagnosticsCallback(every_kimg=0.004, edges=(1.0, 10.0), exact_rows=0, spike=None)
    rows = []

    class Log:
        def log_metrics(self, metrics, step):
            rows.append(metrics)

    trainer = SimpleNamespace(
        strategy=SimpleNamespace(reduce=lambda values, reduce_op: values),
        callbacks=[],
        loggers=[Log()],
        is_global_zero=True,
        optimizers=[SimpleNamespace(param_groups=[{"lr": 0.5}])],
        world_size=1,
        default_root_dir=".",
    )
    module = SimpleNamespace(
        device=CPU,
        nimg=0,
        total_nimg=100,
        schedule={},
        global_batch=2,
        position=0,
        init=None,
        origins={},
        objective=None,
        gradient_stats=GradientStats(torch.tensor(3.0), torch.tensor(2), torch.tensor(0)),
    )
    trainer.lightning_module = module
    callback.teacher = lambda *arguments: {}
    callback.on_start(trainer, module)
    histograms = []
    real = callback._totals

    def totals():
        found = real()
        histograms.append(found[1].clone())
        return found

    callback._totals = totals
    for number in range(4):  # two windows of two steps
        output = LossOutput(
            torch.tensor([10.0, 1000.0]),
            torch.tensor([1.0, 3.0]),
            torch.tensor([1.0, 20.0]),
            torch.tensor([0.25, 15.0]),
            {"skipped": torch.tensor([0.0, 1.0])},
        )
        norm = torch.tensor(2.0 + 2 * number)
        module.gradient_stats = GradientStats(norm, torch.tensor(2), torch.tensor(0))
        callback.on_micro_batch(trainer, module, {"output": output})
        module.nimg += 2
        module.position = module.nimg
        callback.on_step(trainer, module, module.nimg - 2, module.nimg)
    assert len(rows) == 2
    assert callback.loss == 505
    for number, row in enumerate(rows):
        assert row["loss"] == 505
        assert row["distance"] == 2
        assert row["ratio/r_over_t"] == pytest.approx(0.5)
        assert row["gradient/norm"] == 3 + 4 * number
        assert row["gradient/nonfinite"] == 2
        assert row["schedule/learning_rate"] == 0.5
        assert row["loss_by_sigma/1-10"] == 10  # a level on an edge belongs above it
        assert row["distance_by_sigma/1-10"] == 1
        assert row["distance_by_sigma/above_10"] == 3
        assert row["skipped/1-10"] == 0
        assert row["skipped/above_10"] == 1
        assert "loss_by_sigma/below_1" not in row
        assert row["kimg"] == 0.004 * (number + 1)
    for histogram in histograms:  # of log10 from -6 to 6 in 48 bins: a quarter each
        assert histogram.nonzero().flatten().tolist() == [28, 36]
        assert histogram.sum() == 4


@pytest.mark.parametrize("make", ["song", "edm2"])
def test_dropout_comes_before_the_second_convolution(make):
    torch.manual_seed(0)
    if make == "song":
        block = UNetBlock(32, 32, 16, dropout=0.5)
        second = block.conv1
        inputs = torch.randn(4, 32, 8, 8), torch.randn(4, 16)
    else:
        model = EDM2UNet(8, 1, 1, model_channels=32, channel_mult=[1], num_blocks=1, dropout=0.5)
        block = next(b for b in model.enc.values() if hasattr(b, "conv_res1"))
        second, inputs = block.conv_res1, None
    seen = []
    second.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    network_ = block if make == "song" else EDM2Precond(model)
    network_.train()
    with shared_dropout(network_, DropoutKey(1, 0), CPU):
        if inputs is None:
            network_(torch.randn(4, 1, 8, 8), torch.ones(4))
        else:
            block(*inputs)
    share = float((seen[0] == 0).float().mean())
    assert 0.4 < share < 0.6


def test_images_get_their_own_labels_whatever_the_batch():
    seen = []

    class Listening(Denoiser):
        num_classes = 10

        def __init__(self) -> None:
            super().__init__()
            self.sigma_data = 0.5

        def forward(self, x, sigma, labels=None):
            seen.append(labels.tolist())
            return x

    labels = torch.tensor([3, 1, 4, 1, 5])
    options = {"seed": 0, "shape": (1, 2, 2), "batch": 2, "device": CPU}
    list(draw_images(Listening(), MultistepSampler((80.0,)), range(5), labels, **options))
    assert seen == [[3, 1], [4, 1], [5]]


def test_a_checkpoint_brings_back_the_clock_and_refuses_other_teachers(tmp_path):
    module = ECT(TinyDenoiser(), 1)
    module._trainer = None
    module.nimg, module.skipped = 640, 128
    module.gradient_stats = GradientStats(torch.zeros(()), torch.tensor(5), torch.tensor(2))
    saved = {"state_dict": module.state_dict()}
    patch = pytest.MonkeyPatch()
    patch.setattr(ECT, "trainer", SimpleNamespace(datamodule=SimpleNamespace(fingerprint="a" * 64)))
    module.on_save_checkpoint(saved)
    patch.undo()
    again = ECT(TinyDenoiser(), 1)
    again._trainer = None
    again.on_load_checkpoint(copy.deepcopy(saved))
    assert (again.nimg, again.skipped, again.position) == (640, 128, 768)
    assert int(again.gradient_stats.nonfinite_steps) == 5
    assert int(again.gradient_stats.streak) == 2
    other = ECT(TinyDenoiser(), 1)
    other._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(fingerprint="b" * 64), accumulate_grad_batches=1
    )
    with pytest.raises(InputError, match="trained on data with fingerprint aaaaaaaaaaaaaaaa"):
        other.on_load_checkpoint(copy.deepcopy(saved))
    saved["cm_lightning"]["borrowed"] = {"teacher": "c" * 64}
    with pytest.raises(InputError, match="The teacher changed since the run started"):
        again.on_load_checkpoint(copy.deepcopy(saved))
    cd = CD(network(label_dropout=0.0), teacher(tmp_path), 1, distance=L2())
    patch.setattr(CD, "trainer", SimpleNamespace(datamodule=None))
    kept = {}
    cd.on_save_checkpoint(kept)
    patch.undo()
    assert kept["cm_lightning"]["borrowed"] == {"teacher": cd.origins["teacher"]["sha256"]}


def test_weights_know_the_networks_sigma_data():
    class Watching:
        def __call__(self, t, r, sigma_data):
            self.sigma_data = sigma_data
            return torch.ones_like(t)

    weighting = Watching()
    model = TinyDenoiser()
    model.sigma_data = 0.25
    module = ECT(model, 1, weighting=weighting, distance=SquaredL2())
    module.loss(Batch(torch.zeros(4, 1, 8, 8), None, torch.arange(4)), Draw(0, 0, 0, 4, CPU))
    assert weighting.sigma_data == 0.25
