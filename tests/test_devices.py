"""Every operation of a training step and of an evaluation meets tensors of one device.

No GPU is needed: torch's fake tensors have a device and a shape but no values, and an operation
on fake tensors of two devices fails as it would on a GPU. Autograd's engine and random generators
need a real device, so gradients are made up and noise is drawn without a generator. Copies from
the host that are not told to go on by themselves are counted: they would wait for a GPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter

import lightning as L
import pytest
import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode,
    _pop_mode,
)
from torch.utils._pytree import tree_leaves

from cm_lightning.callbacks import DiagnosticsCallback, EMACallback
from cm_lightning.data import Digits, EDMAugment, ImageDataModule, module
from cm_lightning.ema import ConstantEMA, HalfLifeEMA, PowerEMA
from cm_lightning.evaluation import DigitsFeatures, to_uint8
from cm_lightning.evaluation.frechet import FrechetDistance
from cm_lightning.networks import ADMUNet, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.objective import Draw
from cm_lightning.regimes import Diffusion
from cm_lightning.sampling import (
    EulerSampler,
    GuidedDenoiser,
    HeunSampler,
    MultistepSampler,
    PhasedSampler,
    consistency,
    draw_images,
    ode,
    samplers,
)
from cm_lightning.transfer import constant
from tests.regimes.test_waiting import KIMG, REGIMES, network

CUDA = torch.device("cuda:0")


class Devices(L.Callback):
    """Where weights, optimizer state and averages are after the last step."""

    def on_train_end(self, trainer, pl_module):
        averages = next(c for c in trainer.callbacks if isinstance(c, EMACallback)).averages
        state = trainer.optimizers[0].state.values()
        tensors = [*pl_module.parameters(), *(value["exp_avg"] for value in state)]
        tensors += [value for average in averages.values() for value in average.values()]
        self.found = {value.device for value in tensors}


class Copies(TorchDispatchMode):
    """Names what copies from the CPU to the device and waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, function._schema.name.removeprefix("aten::")
        out = function(*args, **kwargs)
        given = [a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)]
        # a single number takes part in arithmetic without a copy
        copies = name in ("copy_", "_to_copy")
        moved = [a for a in given if a.device.type == "cpu" and (a.ndim or copies)]
        made = [a for a in tree_leaves(out) if isinstance(a, torch.Tensor)]
        goes_on = kwargs.get("non_blocking") or (name == "copy_" and True in args[2:])
        if moved and not goes_on and any(a.device == CUDA for a in (*given, *made)):
            self.found[name] += 1
        return out


class Watch(L.Callback):
    """Counts copies of all steps but the first, which may set things up."""

    def __init__(self) -> None:
        self.copies = Copies()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2:  # two micro-batches are a step
            self.copies.__enter__()

    def on_train_end(self, trainer, pl_module):
        self.copies.__exit__(None, None, None)


class NoAccelerator(CPUAccelerator):
    """Lets Lightning believe in the device."""

    def setup_device(self, device):
        pass


@pytest.fixture
def gpu(monkeypatch):
    """A mode in which modules moved to ``cuda:0`` have fake weights there."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)

    def move(owner, function, recurse=True):
        with mode:
            if function(torch.empty(0)).device != CUDA:
                return owner
            for part in owner.modules():
                for name, value in part._parameters.items():
                    if value is not None and value.device != CUDA:
                        fake = torch.empty_like(value, device=CUDA)
                        part._parameters[name] = torch.nn.Parameter(fake, value.requires_grad)
                for name, value in part._buffers.items():
                    if value is not None:
                        part._buffers[name] = torch.empty_like(value, device=CUDA)
        return owner

    monkeypatch.setattr(torch.nn.Module, "_apply", move)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: contextlib.nullcontext())
    monkeypatch.setattr(Draw, "generator", lambda draw: None)
    constant.cache_clear()
    yield mode
    constant.cache_clear()
    while _get_current_dispatch_mode() is not None:
        _pop_mode()


def train(mode, monkeypatch, trained, data) -> L.Trainer:
    """Four steps on ``cuda:0``, set-up on the CPU."""

    def backward(loss, *args, **kwargs):
        assert loss.device == CUDA
        for parameter in trained.denoiser.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    real_row, real_nearest = module._StoreDataset.__getitem__, module.nearest_distances

    def row(dataset, rows):
        with unset_fake_temporarily():
            return real_row(dataset, rows)

    def nearest(store, conditional, flip, device, keep):
        assert device == CUDA
        return real_nearest(store, conditional, flip, torch.device("cpu"), keep=keep)

    monkeypatch.setattr(trained, "backward", backward)
    monkeypatch.setattr(module._StoreDataset, "__getitem__", row)
    monkeypatch.setattr(module, "nearest_distances", nearest)
    trainer = L.Trainer(
        strategy=SingleDeviceStrategy("cuda:0", accelerator=NoAccelerator()),
        max_epochs=-1,
        max_steps=4,
        callbacks=[
            EMACallback([ConstantEMA(0.9), HalfLifeEMA(), PowerEMA(0.1)]),
            DiagnosticsCallback(every_kimg=100),
            Devices(),
            Watch(),
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    begin = trainer.fit_loop.on_run_start

    def enter():
        mode.__enter__()
        begin()

    monkeypatch.setattr(trainer.fit_loop, "on_run_start", enter)
    trainer.fit(trained, data)
    return trainer


def augmented(path):
    backbone = SongUNet(8, 1, 1, augment_dim=9, model_channels=16, channel_mult=[1], num_blocks=1)
    return Diffusion(EDMPrecond(backbone), KIMG, augment=EDMAugment())


RUNS = REGIMES | {"diffusion, augmented": augmented}


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_a_training_step(name, resident, gpu, monkeypatch, tmp_path):
    trained = RUNS[name](tmp_path / "teacher")
    kind = {"global_batch": 16, "micro_batch": 8, "flip": True, "cache": str(tmp_path)}
    kind |= {"conditional": "augmented" not in name}
    data = ImageDataModule(Digits(), **kind)
    if resident:
        data.prepare_data()
        data.setup("fit")
        data.resident = True
        with gpu:
            data._resident = torch.from_numpy(data.store.images.copy()).to(CUDA)
    trainer = train(gpu, monkeypatch, trained, data)
    assert trainer.global_step == 4
    assert next(c for c in trainer.callbacks if isinstance(c, Devices)).found == {CUDA}
    assert next(c for c in trainer.callbacks if isinstance(c, Watch)).copies.found == {}


def test_copies_are_seen(gpu):
    with gpu:
        there, here = torch.zeros(2, device=CUDA), torch.ones(2)
        for copy, name in (
            (lambda: here.to(CUDA), "_to_copy"),
            (lambda: there.copy_(here), "copy_"),
            (lambda: there.__setitem__(0, 1.0), "copy_"),
            (lambda: there.__setitem__(slice(1), 1.0), None),
            (lambda: here.to(CUDA, non_blocking=True), None),
            (lambda: there * torch.tensor(2.0), None),
        ):
            with Copies() as copies:
                copy()
            assert list(copies.found) == ([] if name is None else [name])


def test_a_tensor_left_behind_is_found(gpu, monkeypatch, tmp_path):
    trained = REGIMES["ect"](tmp_path / "teacher")
    trained.denoiser.sigma_data = torch.tensor(0.5).expand(1)  # no buffer: it stays on the CPU
    data = ImageDataModule(Digits(), global_batch=16, cache=str(tmp_path))
    with pytest.raises(RuntimeError, match=r"devices.* cuda:0,? (and )?cpu"):
        train(gpu, monkeypatch, trained, data)


SAMPLERS = {
    "multistep": MultistepSampler((80.0, 0.8)),
    "phased": PhasedSampler((0.0, 0.4, 80.0), 0.9),
    "heun": HeunSampler(3),
    "euler": EulerSampler(3),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_and_their_features(name, gpu, monkeypatch):
    real_sigmas = samplers.karras_sigmas

    def sigmas(*args):
        with unset_fake_temporarily():
            return real_sigmas(*args)

    monkeypatch.setattr(samplers, "karras_sigmas", sigmas)
    for sampling in (consistency, ode):  # fake labels have no values to look at
        monkeypatch.setattr(sampling, "check_labels", lambda *_: None)
    denoiser = GuidedDenoiser(network().eval(), network().eval(), 1.5).to(CUDA)
    features = DigitsFeatures()
    features.load()
    metric = FrechetDistance(features)
    with gpu:
        metric.to(CUDA)
        images = next(
            draw_images(
                denoiser,
                SAMPLERS[name],
                range(6),
                torch.zeros(6, dtype=torch.long),
                seed=0,
                shape=(1, 8, 8),
                batch=4,
                device=CUDA,
            )
        )
        assert images.device == CUDA
        metric.update(to_uint8(images.nan_to_num()), real=False)


SIZES = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
NETWORKS = {
    "song": lambda: EDMPrecond(SongUNet(8, 1, 1, **SIZES, attn_resolutions=[4])),
    "adm": lambda: EDMPrecond(ADMUNet(8, 1, 1, **SIZES, attn_resolutions=[4])),
    "edm2": lambda: EDM2Precond(EDM2UNet(8, 1, 1, **SIZES, attn_resolutions=[4])),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_pass_under_autocast(name, dtype, gpu, monkeypatch):
    """Autocast of a GPU knows other operations than that of a CPU."""
    denoiser = NETWORKS[name]().to(CUDA)
    monkeypatch.setattr(torch.amp.autocast_mode, "is_autocast_available", lambda kind: True)
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", dtype)
    try:
        with gpu:
            x = torch.zeros(2, 1, 8, 8, device=CUDA)
            out = denoiser(x, torch.ones(2, device=CUDA))
        assert (out.device, out.dtype, out.shape) == (CUDA, torch.float32, x.shape)
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
