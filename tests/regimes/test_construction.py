from functools import partial

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

from cm_lightning.networks import EDMPrecond, SongUNet
from cm_lightning.objective import GeneratorCoupling, Independent, MinibatchOT
from cm_lightning.regimes import SCT
from cm_lightning.types import InputError


def network() -> EDMPrecond:
    backbone = SongUNet(
        8, 1, 1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[]
    )
    return EDMPrecond(backbone)


def test_images_and_noise_must_be_independent():
    with pytest.raises(InputError, match="independent: choose Independent or GeneratorCoupling"):
        SCT(network(), coupling=MinibatchOT())
    for coupling in (Independent(), GeneratorCoupling(0.3)):
        SCT(network(), coupling=coupling)


@pytest.mark.parametrize("fused", [False, True])
def test_overflow_skips_a_step_before_gradients_are_sanitised(fused):
    module = SCT(network(), optimizer=partial(torch.optim.Adam, lr=0.1, fused=fused))
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    weights = list(module.denoiser.parameters())
    for weight in weights:
        weight.grad = torch.full_like(weight, torch.inf)
    before = [weight.detach().clone() for weight in weights]
    if not _optimizer_handles_unscaling(optimizer):  # Lightning's order of calls
        scaler.unscale_(optimizer)
    module.on_before_optimizer_step(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert all(torch.equal(old, new) for old, new in zip(before, weights, strict=True))
    assert scaler.get_scale() == 512
