"""No step of any regime looks at a value: on a GPU each look would wait for the device."""

from __future__ import annotations

from collections import Counter

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cm_lightning.callbacks import DiagnosticsCallback, EMACallback, KimgProgress
from cm_lightning.data import Digits, ImageDataModule, ReferenceSet
from cm_lightning.ema import ConstantEMA, HalfLifeEMA, PowerEMA
from cm_lightning.networks import ConsistencyPrecond, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.objective import L2, COut, MinibatchOT, Phases, posterior
from cm_lightning.regimes import CD, CT, ECT, GC, ICT, SCT, Diffusion
from cm_lightning.weights import Pretrained, save_weights
from tests import toys

LOOKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "unique")


class Looks(TorchDispatchMode):
    """Counts operations whose result, or its shape, the host needs."""

    def __init__(self, trainer: L.Trainer) -> None:
        super().__init__()
        self.trainer, self.found = trainer, Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        indices = args[1] if name in ("index", "index_put_", "_index_put_impl_") else ()
        masked = any(i is not None and i.dtype == torch.bool for i in indices)
        if masked or name.startswith(LOOKS):
            states = self.trainer.optimizers[0].state.values()
            steps = [state["step"] for state in states if "step" in state]  # on the CPU always
            if not any(args[0] is step for step in steps):
                self.found[name] += 1
        return function(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Counts from the first batch to the start of the last, what torch does not see included."""

    def __init__(self, monkeypatch) -> None:
        self.patch, self.looks = monkeypatch, None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 1:  # the first step may set things up
            self.looks = Looks(trainer)
            for name in ("tolist", "numpy", "cpu"):
                real = getattr(torch.Tensor, name)

                def counted(tensor, *args, name=name, real=real, **kwargs):
                    self.looks.found[name] += 1
                    return real(tensor, *args, **kwargs)

                self.patch.setattr(torch.Tensor, name, counted)
            self.looks.__enter__()
        if batch_idx == 3:
            self.looks.__exit__(None, None, None)
            self.patch.undo()


def network(precond=EDMPrecond, classes: int = 10, label_dropout: float = 0.1):
    small = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    small |= {"label_dim": classes, "dropout": 0.2, "label_dropout": label_dropout}
    return precond(SongUNet(8, 1, 1, **small))


def edm2():
    kind = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "dropout": 0.2}
    return EDM2Precond(EDM2UNet(8, 1, 1, label_dim=10, **kind), learn_variance=True)


def teacher(folder):
    model, small = network(), {"model_channels": 16, "channel_mult": [1], "num_blocks": 1}
    backbone = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10}
    backbone |= small | {"attn_resolutions": [], "dropout": 0.2, "label_dropout": 0.1}
    config = {
        "class_path": "cm_lightning.networks.EDMPrecond",
        "init_args": {
            "backbone": {"class_path": "cm_lightning.networks.SongUNet", "init_args": backbone}
        },
    }
    save_weights(folder, config, model.state_dict(), {"regime": "Diffusion"})
    return Pretrained(str(folder))


KIMG = 1.28
REGIMES = {
    "diffusion": lambda path: Diffusion(network(), KIMG),
    "diffusion, EDM2": lambda path: Diffusion(edm2(), KIMG),
    "cd": lambda path: CD(
        network(ConsistencyPrecond, label_dropout=0.0),
        teacher(path),
        KIMG,
        guidance=1.5,
        distance=L2(),
    ),
    "ct": lambda path: CT(network(ConsistencyPrecond), KIMG, distance=L2()),
    "ict": lambda path: ICT(network(ConsistencyPrecond), KIMG),
    "ect": lambda path: ECT(network(), KIMG),
    "sct, class": lambda path: SCT(network(), KIMG),
    "sct, random": lambda path: SCT(network(), KIMG, references=ReferenceSet(n=8)),
    "sct, batch": lambda path: SCT(network(), KIMG, references=ReferenceSet("batch")),
    "sct, phases": lambda path: SCT(
        network(),
        KIMG,
        solver="heun",
        weighting=COut(),
        phases=Phases((0, 0.4, 80), normalize=True, uniform=True),
    ),
    "gc": lambda path: GC(network(ConsistencyPrecond), KIMG),
}


def train(module, callbacks, accelerator, **data) -> None:
    """Four steps."""
    averages = EMACallback([ConstantEMA(0.9), HalfLifeEMA(), PowerEMA(0.1)])
    progress = KimgProgress(log_seconds=0)  # it writes a line at every step
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        max_epochs=-1,
        max_steps=4,
        callbacks=[*callbacks, averages, DiagnosticsCallback(every_kimg=100), progress],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ImageDataModule(Digits(), global_batch=32, flip=True, **data))


def looks(module, monkeypatch, **data) -> Counter:
    watch = Watch(monkeypatch)
    train(module, [watch], "cpu", **data)
    return watch.looks.found


def test_every_regime_is_watched():
    assert {name.partition(",")[0] for name in REGIMES} == set(toys.REGIMES)


@pytest.mark.parametrize("name", REGIMES)
def test_a_step_waits_for_nothing(name, tmp_path, monkeypatch):
    module = REGIMES[name](tmp_path / "teacher")
    monkeypatch.setattr(posterior, "may_pick", lambda device: False)  # as on a GPU
    # random references are chosen by the loader, which may look at labels: in another process
    workers = int("random" in name)
    assert looks(module, monkeypatch, resident=True, num_workers=workers) == {}


class Waits(L.Callback):
    """Makes the second and third step fail where the host would wait for the GPU."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.cuda.set_sync_debug_mode("error" if batch_idx in (1, 2) else "default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", REGIMES)
def test_a_step_on_a_gpu_waits_for_nothing(name, tmp_path):
    module = REGIMES[name](tmp_path / "teacher")
    workers = int("random" in name)
    try:
        train(module, [Waits()], "gpu", resident=True, num_workers=workers)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_looks_are_seen(monkeypatch):
    found = looks(ECT(network(), KIMG, coupling=MinibatchOT()), monkeypatch)
    assert {"cpu", "nonzero", "numpy"} <= set(found)
