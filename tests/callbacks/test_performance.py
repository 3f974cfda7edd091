"""Settings of speed change a run by rounding at most, and no name of a weight."""

from __future__ import annotations

from functools import cache

import lightning as L
import pytest
import torch
from torch import nn

from cm_lightning.callbacks import EMACallback, PerformanceCallback, performance
from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.ema import ConstantEMA
from cm_lightning.networks import ADMUNet, EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.networks.layers import Conv, Recomputable
from cm_lightning.objective import ECTMapping
from cm_lightning.regimes import ECT, SCT
from cm_lightning.types import InputError
from tests.toys import TinyDenoiser

STEPS = 20


class Losses(L.Callback):
    """The mean loss of every optimizer step."""

    def __init__(self) -> None:
        self.found: list[float] = []
        self._sum, self._count = 0.0, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._sum, self._count = self._sum + float(outputs["output"].loss.sum()), self._count + 1
        if self._count == trainer.accumulate_grad_batches:
            self.found.append(self._sum / pl_module.global_batch)
            self._sum, self._count = 0.0, 0


def network(kind: str = "song"):
    torch.manual_seed(0)
    small = {"model_channels": 32, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": [8]}
    small |= {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10}
    small |= {"dropout": 0.3, "label_dropout": 0.2}
    if kind == "edm2":
        wide = {"model_channels": 64, "channel_mult": [1, 1]}  # with a way down and up
        return EDM2Precond(EDM2UNet(**(small | wide)))
    return EDMPrecond({"song": SongUNet, "adm": ADMUNet}[kind](**small))


def run(
    kind="song", regime=ECT, precision="32-true", micro_batch=None, accelerator="cpu", **settings
):
    """Losses, weights and averages of 20 steps; eager and fp32 unless told otherwise."""
    settings = {"compile": False, "channels_last": False} | settings
    mapping = ECTMapping(kimg_per_stage=0.08, stages=4)  # a stage lasts 5 steps
    module = regime(network(kind), STEPS * 16 / 1000, discretization=mapping)
    averages, losses = EMACallback([ConstantEMA(0.9)]), Losses()
    trainer = L.Trainer(
        accelerator=accelerator,
        devices=1,
        precision=precision,
        max_epochs=-1,
        callbacks=[averages, losses, PerformanceCallback(**settings)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, ImageDataModule(Digits(), 16, micro_batch))
    assert len(losses.found) == STEPS
    weights = {name: p.detach().cpu() for name, p in module.denoiser.state_dict().items()}
    average = {name: p.cpu() for name, p in averages.averages["ema_0.9"].items()}
    return torch.tensor(losses.found), weights, average


def check(plain, other, loss: float, weight: float) -> None:
    """Relative difference of every loss, and of all weights and averages by norm."""
    assert plain[1].keys() == other[1].keys()
    torch.testing.assert_close(other[0], plain[0], rtol=loss, atol=0)
    for a, b in zip(plain[1:], other[1:], strict=True):
        for name in a:
            difference, size = (a[name] - b[name]).norm(), a[name].norm().clamp_min(0.1)
            assert float(difference) <= weight * float(size), name


@pytest.fixture(scope="module")
def plain():
    return run()


MODES = {
    "checkpointing": ({"checkpointing": True}, 1e-5, 1e-4),
    "channels_last": ({"channels_last": True}, 1e-4, 1e-3),
    "accumulated": ({"micro_batch": 4}, 1e-4, 1e-3),
    "bf16": ({"precision": "bf16-mixed"}, 5e-2, 2e-2),
    "bf16, checkpointing": ({"precision": "bf16-mixed", "checkpointing": True}, 5e-2, 2e-2),
}


@pytest.mark.parametrize("mode", MODES)
def test_twenty_steps_are_those_of_eager_fp32(mode, plain):
    settings, loss, weight = MODES[mode]
    check(plain, run(**settings), loss, weight)


def test_a_compiled_graph_takes_the_same_twenty_steps(plain, monkeypatch):
    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda m, options=None: real(m, backend="aot_eager"))
    check(plain, run(compile=True), 1e-5, 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_code_takes_the_same_twenty_steps(plain, precision):
    compiled = run(compile=True, precision=precision, checkpointing=precision != "32-true")
    check(plain, compiled, *((1e-4, 1e-3) if precision == "32-true" else (5e-2, 2e-2)))


ON_A_GPU = MODES | {
    "checkpointing": ({"checkpointing": True}, 1e-4, 1e-3),  # its kernels need not repeat exactly
    "compiled": ({"compile": True, "channels_last": True}, 1e-4, 1e-3),
    "compiled, bf16": ({"compile": True, "precision": "bf16-mixed"}, 5e-2, 2e-2),
    "tf32": ({"tf32": True}, 1e-2, 5e-3),
}


@cache
def plain_on_a_gpu(kind):
    return run(kind, accelerator="gpu")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ON_A_GPU)
@pytest.mark.parametrize("kind", ["song", "adm", "edm2"])
def test_twenty_steps_on_a_gpu_are_those_of_eager_fp32(kind, mode):
    settings, loss, weight = ON_A_GPU[mode]
    check(plain_on_a_gpu(kind), run(kind, accelerator="gpu", **settings), loss, weight)


@pytest.mark.parametrize("kind", ["adm", "edm2"])
def test_recomputing_is_exact_in_other_networks(kind):
    a, b = run(kind, SCT), run(kind, SCT, checkpointing=True)
    check(a, b, 1e-5, 1e-4)


def test_every_convolution_gets_channels_last():
    denoiser, seen = network(), []
    denoiser.channels_last = True
    for module in denoiser.modules():
        if isinstance(module, Conv):
            module.register_forward_hook(lambda m, i, out: seen.append(out))
    denoiser(torch.randn(4, 1, 8, 8), torch.ones(4), torch.zeros(4, dtype=torch.long))
    assert len(seen) > 5
    # what attention gives back is laid out by pixels of a channel, and only its projection sees it
    wide = [out for out in seen if out.shape[1] > 1]
    laid = [out.is_contiguous(memory_format=torch.channels_last) for out in wide]
    assert sum(laid) >= 0.7 * len(laid)
    assert laid[:3] == [True] * 3


def test_checkpointing_keeps_fewer_activations():
    def kept(on: bool) -> int:
        denoiser, sizes = network(), []
        for module in denoiser.modules():
            if isinstance(module, Recomputable):
                module.checkpointing = on
        with torch.autograd.graph.saved_tensors_hooks(
            lambda x: (sizes.append(x.numel()), x)[1], lambda x: x
        ):
            denoiser(torch.randn(4, 1, 8, 8), torch.ones(4), torch.zeros(4, dtype=torch.long))
        return sum(sizes)

    assert kept(True) < 0.3 * kept(False)


def test_defaults_on_a_cpu_leave_networks_alone():
    flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    module = ECT(network(), 0.016)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[PerformanceCallback(tf32=True)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    seen = []
    module.on_train_batch_end = lambda *a: seen.append(torch.backends.cuda.matmul.allow_tf32)
    trainer.fit(module, ImageDataModule(Digits(), 16))
    assert seen == [True]
    assert flags == (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    assert module.denoiser.backbone._compiled_call_impl is None
    assert not module.denoiser.channels_last


def test_what_cannot_be_done_is_said(monkeypatch):
    monkeypatch.setattr(performance.shutil, "which", lambda name: None)
    for module, settings, words in (
        (ECT(network(), 0.016), {"compile": True}, "needs a C\\+\\+ compiler"),
        (ECT(TinyDenoiser(), 0.016), {"checkpointing": True}, "no residual blocks"),
    ):
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=1,
            callbacks=[PerformanceCallback(**settings)],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        with pytest.raises(InputError, match=words):
            trainer.fit(
                module,
                ImageDataModule(Digits(), 16, conditional=isinstance(module.denoiser, EDMPrecond)),
            )
