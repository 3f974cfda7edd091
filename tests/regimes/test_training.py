"""What all regimes share: clock, learning rate, gradient sanitising, the end of a run."""

from __future__ import annotations

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy

from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.objective import EDM, LogNormal
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes import ECT, Diffusion
from cm_lightning.types import InputError, LossOutput, TrainingStopped
from tests.toys import TinyDenoiser, gaussian_denoiser


def train(module, steps: int | None = None, checkpoint=None, gradient_clip_val=None, **data):
    data = ImageDataModule(Digits(), conditional=False, **({"global_batch": 32} | data))
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps or -1,
        gradient_clip_val=gradient_clip_val,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.mark.parametrize("regime", [ECT, Diffusion])
def test_a_run_ends_at_its_length_in_images(regime):
    module = regime(TinyDenoiser(), total_kimg=0.1)
    trainer = train(module)
    assert module.nimg == 128  # the first multiple of 32 at or above 100
    assert trainer.global_step == 4


def test_the_clock_ignores_accumulation():
    module = ECT(TinyDenoiser(), total_kimg=0.128)
    assert train(module, micro_batch=8).global_step == 4
    assert module.nimg == 128


def test_learning_rate_by_formula():
    edm2 = LearningRate(ramp_kimg=10_000, decay_kimg=71_680)
    for mimg, rate in (
        (1, 1e-3),
        (10, 1e-2),
        (71.68, 1e-2),
        (200, 5.98665e-3),
        (1073.741824, 2.58374e-3),
    ):
        assert 0.01 * edm2.factor(round(mimg * 1e6), 2e6) == pytest.approx(rate, rel=1e-5)
    ect = LearningRate(decay_kimg=256)
    for kimg, rate in ((256, 1e-3), (1000, 5.05964e-4), (3200, 2.82843e-4), (12800, 1.41421e-4)):
        assert 1e-3 * ect.factor(kimg * 1000, 12_800) == pytest.approx(rate, rel=1e-5)
    fall = LearningRate(cooldown_kimg=40)
    assert [fall.factor(n * 1000, 100) for n in (0, 60, 80, 100)] == [1, 1, 0.5, 0]
    assert LearningRate(ramp_kimg=1).factor(0, 1) == 0
    with pytest.raises(InputError, match="ramp_kimg"):
        LearningRate(ramp_kimg=-1)


def test_the_optimizer_gets_the_rate_of_the_clock():
    module = ECT(
        TinyDenoiser(),
        total_kimg=0.128,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.5),
        learning_rate=LearningRate(cooldown_kimg=0.128),
    )
    seen = []
    module.on_train_batch_end = lambda *a: seen.append(
        module.trainer.optimizers[0].param_groups[0]["lr"]
    )
    train(module)
    assert seen == [0.5, 0.375, 0.25, 0.125]


def guarded(values, **options):
    p = torch.nn.Parameter(torch.zeros(len(values)))
    p.grad = torch.tensor(values)
    return p, GradientGuard(**options)([p], None)


def test_gradients_are_sanitised_as_published_and_counted():
    nan, inf = float("nan"), float("inf")
    p, stats = guarded([1.0, nan, inf, -inf])
    assert p.grad.tolist() == [1.0, 0.0, 1e5, -1e5]
    assert int(stats.nonfinite_steps) == int(stats.streak) == 1
    p, _ = guarded([1.0, nan, inf, -inf], infinity=0)
    assert p.grad.tolist() == [1.0, 0.0, 0.0, 0.0]
    p, stats = guarded([3.0, 4.0])
    assert p.grad.tolist() == [3.0, 4.0]
    assert float(stats.norm) == 5
    assert int(stats.nonfinite_steps) == 0


@pytest.mark.parametrize("infinity", [0.0, 1e5])
def test_lightning_clips_what_was_sanitised(infinity):
    """``trainer.gradient_clip_val``, which published recipes do without."""
    norms = []

    class Watched(ECT):
        def on_before_optimizer_step(self, optimizer):
            next(self.denoiser.parameters()).grad.fill_(math.inf)
            super().on_before_optimizer_step(optimizer)

        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            super().optimizer_step(epoch, batch_idx, optimizer, closure)
            norms.append([p.grad.norm() for p in self.denoiser.parameters()])

    module = Watched(TinyDenoiser(), total_kimg=0.032, gradients=GradientGuard(infinity))
    train(module, gradient_clip_val=1e-3)
    (found,) = norms
    total = torch.stack(found).norm()
    assert total == pytest.approx(1e-3, rel=1e-3)
    assert module.gradient_stats.nonfinite_steps == 1


def test_a_streak_ends_with_the_first_finite_gradient():
    p = torch.nn.Parameter(torch.zeros(1))
    stats, streaks = None, []
    for value in (1.0, float("nan"), float("nan"), 1.0, float("nan")):
        p.grad = torch.tensor([value])
        stats = GradientGuard()([p], stats)
        streaks.append(int(stats.streak))
    assert streaks == [0, 1, 2, 0, 1]
    assert int(stats.nonfinite_steps) == 3


class Broken(ECT):
    """Every loss is NaN."""

    def loss(self, batch, draw):
        output = super().loss(batch, draw)
        return LossOutput(output.loss * float("nan"), *output[1:])


def test_too_many_bad_gradients_stop_the_run_with_a_reason():
    module = Broken(TinyDenoiser(), total_kimg=10, gradients=GradientGuard(stop_after=30))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(TrainingStopped, match="not finite in 40 steps in a row"):
        train(module)
    assert module.nimg == 40 * 32
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


def test_diffusion_loss_at_the_optimum_on_gaussian_data():
    """Per number of the image: (t^2 + s_d^2) s^2 / (s_d^2 (s^2 + t^2)); exactly 1 for s = s_d."""
    from cm_lightning.objective import Draw
    from cm_lightning.types import Batch

    generator = torch.Generator().manual_seed(0)
    for s, values in ((0.5, {}), (1.0, {0.1: 1.0297, 1.0: 2.5, 10.0: 3.9703})):
        x0 = s * torch.randn(3000, 1, 8, 8, generator=generator, dtype=torch.float64)
        for t in values or (0.1, 1.0, 10.0):
            module = Diffusion(gaussian_denoiser(s), total_kimg=1, noise=_Fixed(t), weighting=EDM())
            draw = Draw(0, 0, 0, 3000, torch.device("cpu"))
            loss = module.loss(Batch(x0, None, torch.arange(3000)), draw).loss.mean() / 64
            assert float(loss) == pytest.approx(values.get(t, 1.0), rel=0.02)


class _Fixed(LogNormal):
    def __init__(self, t: float) -> None:
        super().__init__()
        object.__setattr__(self, "t", t)

    def sample(self, n, device, generator):
        return torch.full((n,), self.t, dtype=torch.float64)


@pytest.mark.parametrize("arguments", [{"total_kimg": 0}, {"total_kimg": 1, "seed": -1}])
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError):
        ECT(TinyDenoiser(), **arguments)


@pytest.mark.parametrize("strategy", [DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy])
def test_strategies_that_cut_the_network_are_refused(strategy, monkeypatch):
    module = ECT(TinyDenoiser(), total_kimg=0.1)
    # both need a GPU to start: let the trainer say that it has one
    monkeypatch.setattr(L.Trainer, "strategy", property(lambda trainer: strategy.__new__(strategy)))
    module._trainer = L.Trainer.__new__(L.Trainer)
    monkeypatch.setattr(L.Trainer, "datamodule", None, raising=False)
    monkeypatch.setattr(L.Trainer, "precision", "32-true")
    with pytest.raises(InputError, match=f"must be auto or ddp.*{strategy.__name__}"):
        module.setup("fit")


class Counting(torch.optim.SGD):
    """Keeps state among its settings, as some optimizers do."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("rate", [1e-3, 1e-2])
def test_settings_that_an_optimizer_changes_are_resumed(tmp_path, rate):
    def counting(parameters):
        optimizer = Counting(parameters, lr=1e-3 if begun == 0 else rate)
        optimizer.param_groups[0]["k"] = 0
        return optimizer

    begun = 0
    trainer = train(ECT(TinyDenoiser(), total_kimg=1, optimizer=counting), steps=3)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    begun, module = 1, ECT(TinyDenoiser(), total_kimg=1, optimizer=counting)
    trainer = train(module, steps=5, checkpoint=tmp_path / "a.ckpt")
    group = trainer.optimizers[0].param_groups[0]
    assert (group["k"], group["initial_lr"]) == (5, rate)
