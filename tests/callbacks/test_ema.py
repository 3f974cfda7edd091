"""The EMA callback: what it averages, lends, stores and leaves alone."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from cm_lightning.callbacks import EMACallback, StepCallback
from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.ema import ConstantEMA, HalfLifeEMA, PowerEMA, snapshot_nimg
from cm_lightning.regimes import ECT
from cm_lightning.types import InputError
from tests.toys import TinyDenoiser

PROFILES = (ConstantEMA(0.9), HalfLifeEMA(0.5), PowerEMA(0.1))


class Watch(StepCallback):
    """Remembers the weights after every optimizer step."""

    def __init__(self) -> None:
        self.weights, self.clock = [], []

    def on_step(self, trainer, pl_module, before, after):
        self.weights.append([p.detach().clone() for p in pl_module.denoiser.parameters()])
        self.clock.append((before, after))


def train(*callbacks, steps: int = 5, micro: int | None = None) -> ECT:
    torch.manual_seed(0)
    module = ECT(TinyDenoiser(), total_kimg=steps * 32 / 1000)
    data = ImageDataModule(Digits(), global_batch=32, micro_batch=micro, conditional=False)
    L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    ).fit(module, data)
    return module


@pytest.mark.parametrize("micro", [None, 8])
def test_averages_are_the_formula_after_every_optimizer_step(micro):
    watch, ema = Watch(), EMACallback(PROFILES)
    start = [p.detach().clone() for p in _start().parameters()]
    train(ema, watch, micro=micro)
    assert watch.clock == [(32 * k, 32 * (k + 1)) for k in range(5)]
    for profile in PROFILES:
        expected = [w.double() for w in start]
        for weights, (before, _) in zip(watch.weights, watch.clock, strict=True):
            beta = profile.beta(before, 32)
            expected = [
                beta * e + (1 - beta) * w.double() for e, w in zip(expected, weights, strict=True)
            ]
        for value, e in zip(ema.averages[profile.name].values(), expected, strict=True):
            torch.testing.assert_close(value.double(), e, rtol=1e-5, atol=1e-7)


def _start() -> TinyDenoiser:
    torch.manual_seed(0)
    return TinyDenoiser()


def test_lending_exchanges_and_gives_back():
    ema = EMACallback((ConstantEMA(0.9),))
    module = train(ema)
    live = [p.detach().clone() for p in module.denoiser.parameters()]

    def borrow() -> None:
        with ema.lend(module.denoiser, "ema_0.9"):
            for p, average in zip(
                module.denoiser.parameters(), ema.averages["ema_0.9"].values(), strict=True
            ):
                assert torch.equal(p, average)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        borrow()
    assert all(torch.equal(a, b) for a, b in zip(live, module.denoiser.parameters(), strict=True))
    with ema.lend(module.denoiser, "live"):
        pass
    with pytest.raises(InputError, match=r"ema_0\.9"), ema.lend(module.denoiser, "ema_1"):
        pass


def test_frozen_parameters_and_buffers_are_left_out():
    class Partly(TinyDenoiser):
        def __init__(self) -> None:
            super().__init__()
            self.model.first.requires_grad_(False)
            self.register_buffer("count", torch.zeros(1))

    torch.manual_seed(0)
    ema, module = EMACallback(), ECT(Partly(), total_kimg=1)
    ema.on_start(None, module)
    assert set(ema.averages["ema_0.9999"]) == {"model.last.weight", "model.last.bias"}


@pytest.mark.parametrize("profiles", [[], [ConstantEMA(0.9), ConstantEMA(0.9)]])
def test_profiles_must_exist_and_differ(profiles):
    with pytest.raises(InputError, match=r"ema\.profiles"):
        EMACallback(profiles)


def test_a_profile_missing_in_the_checkpoint_is_named():
    ema = EMACallback((PowerEMA(0.1),))
    with pytest.raises(InputError, match=r"ema_std0\.100"):
        ema.load_state_dict({"averages": {"ema_0.9": {}}, "total_nimg": 1000})


def test_snapshots_are_kept_at_their_share_of_the_run():
    watch, ema = Watch(), EMACallback((ConstantEMA(0.0),), snapshots=(0.4, 0.5))
    module = train(ema, watch)
    for share, step in ((0.4, 2), (0.5, 3)):  # the first step that reaches 64 and 80 images
        for value, weight in zip(
            ema.averages[f"ema_0@{share}"].values(), watch.weights[step - 1], strict=True
        ):
            assert torch.equal(value, weight)
    assert ema.names == ["ema_0"]
    with ema.lend(module.denoiser, "ema_0@0.4"):
        first = next(module.denoiser.parameters()).detach().clone()
    assert torch.equal(first, watch.weights[1][0])
    again = EMACallback((ConstantEMA(0.0),), snapshots=(0.4, 0.5))
    again.load_state_dict(ema.state_dict())
    again.on_start(None, module)
    assert again.averages.keys() == ema.averages.keys()


def test_snapshots_of_another_length_are_taken_anew():
    ema = EMACallback((ConstantEMA(0.0),), snapshots=(0.4,))
    module = train(ema, Watch())
    longer = ECT(module.denoiser, total_kimg=10 * module.total_kimg)
    longer.nimg = module.nimg
    again = EMACallback((ConstantEMA(0.0),), snapshots=(0.4,))
    again.load_state_dict(ema.state_dict())
    again.on_fit_start(None, longer)
    again.on_start(None, longer)
    assert list(again.averages) == ["ema_0"]
    passed = EMACallback((ConstantEMA(0.0),), snapshots=(0.05, 0.4))
    passed.load_state_dict(ema.state_dict())
    with pytest.raises(InputError, match=r"ema\.snapshots 0\.05 is .* goes on from"):
        passed.on_fit_start(None, longer)


def test_a_snapshot_has_seen_the_images_of_its_moment():
    assert snapshot_nimg("ema_0", 1000, 32) is None
    assert snapshot_nimg("ema_0@0.4", 1000, 32) == 416  # the first multiple of 32 from 400


@pytest.mark.parametrize("share", [0, 1, -0.1])
def test_bad_snapshots_are_named(share):
    with pytest.raises(InputError, match="snapshots"):
        EMACallback(snapshots=(share,))
