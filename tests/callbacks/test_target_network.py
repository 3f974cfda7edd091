"""The averaged target after each step, bit for bit, and in the checkpoint of that step."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from cm_lightning.callbacks import CheckpointCallback, TargetNetworkCallback
from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.ema import WarmupEMA
from cm_lightning.objective import L2, GeneratorCoupling, GrowingGrid
from cm_lightning.regimes import CT, ICT
from tests.toys import TinyDenoiser


class Watch(L.Callback):
    """The trained weights after every step, seen from inside the run."""

    def __init__(self) -> None:
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append([p.detach().clone() for p in pl_module.denoiser.parameters()])


def train(module, folder, steps):
    watch = Watch()
    trainer = L.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        callbacks=[CheckpointCallback(every_kimg=0.032, keep=9), watch],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ImageDataModule(Digits(), conditional=False, global_batch=32))
    return watch.weights


def expected(start, weights, rates):
    average = [p.clone() for p in start]
    for values, rate in zip(weights, rates, strict=True):
        for mean, value in zip(average, values, strict=True):
            mean.copy_(value if rate == 0 else torch.lerp(mean, value, 1 - rate))
    return average


@pytest.mark.parametrize("name", ["target", "endpoint"])
def test_average_after_five_steps_and_in_the_checkpoint(name, tmp_path):
    torch.manual_seed(0)
    denoiser = TinyDenoiser()
    start = [p.detach().clone() for p in denoiser.parameters()]
    if name == "target":
        grid = GrowingGrid(s0=2, s1=20, mu0=0.6)
        module = CT(denoiser, 0.32, discretization=grid, distance=L2())
        rates = [grid.spanning(0.32).target_rate(32 * step) for step in range(5)]
        assert len(set(rates)) > 2
    else:
        module = ICT(denoiser, 0.32, coupling=GeneratorCoupling(average=WarmupEMA()))
        rates = [WarmupEMA().beta(32 * step, 32) for step in range(5)]
        assert rates[0] == 0
    weights = train(module, tmp_path, 5)
    wanted = expected(start, weights, rates)
    network = getattr(module, name)
    for ours, value in zip(network.parameters(), wanted, strict=True):
        assert torch.equal(ours, value)
    path = tmp_path / "checkpoints" / "nimg000000000160.ckpt"
    state = torch.load(path, weights_only=True)["state_dict"]
    for (key, _), value in zip(network.named_parameters(), wanted, strict=True):
        assert torch.equal(state[f"{name}.{key}"], value)


def test_buffers_are_copied():
    module = CT(TinyDenoiser(), 0.32, distance=L2())
    for network, value in ((module.denoiser, 2.0), (module.target, 1.0)):
        network.register_buffer("counter", torch.tensor(value))
    TargetNetworkCallback().on_step(None, module, 32, 64)
    assert float(module.target.counter) == 2


def test_the_optimizer_never_sees_averaged_networks(tmp_path):
    module = CT(TinyDenoiser(), 0.32, distance=L2())
    trainable = {id(p) for p in module.denoiser.parameters()}
    optimizer = module.configure_optimizers()
    assert {id(p) for group in optimizer.param_groups for p in group["params"]} == trainable
    assert not any(p.requires_grad for p in module.target.parameters())
    assert module.schedule["levels"] == 2
    assert module.schedule["target_rate"] == pytest.approx(0.81)
    needed = ICT(TinyDenoiser(), 0.32).configure_callbacks()
    assert not any(isinstance(callback, TargetNetworkCallback) for callback in needed)


def test_schedules_do_not_depend_on_the_batch(tmp_path):
    """Same images seen, same grid and rate, whatever the number of images per step."""
    seen = {}
    for batch in (16, 32):
        module = CT(TinyDenoiser(), 0.32, distance=L2(), discretization=GrowingGrid(s1=20))
        module.global_batch = batch
        for nimg in range(0, 321, 32):
            module.nimg = nimg
            seen.setdefault(nimg, set()).add(tuple(module.schedule.items()))
    assert all(len(values) == 1 for values in seen.values())
