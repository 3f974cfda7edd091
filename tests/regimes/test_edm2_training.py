"""Training EDM2 networks: loss with learned variance, normalisation once per optimizer step."""

from __future__ import annotations

import copy

import lightning as L
import pytest
import torch

from cm_lightning.data import Digits, ImageDataModule
from cm_lightning.dropout import DropoutKey
from cm_lightning.networks import EDM2Precond, EDM2UNet, normalize_weights
from cm_lightning.networks.edm2 import MPConv
from cm_lightning.objective import L2, Draw
from cm_lightning.regimes import CT, ECT, Diffusion
from cm_lightning.types import Batch


def network(**options) -> EDM2Precond:
    torch.manual_seed(0)
    unet = EDM2UNet(8, 1, 1, model_channels=16, channel_mult=[1], num_blocks=1, dropout=0.2)
    return EDM2Precond(unet, **options)


def train(module, steps: int, callbacks=(), micro: int | None = None) -> None:
    L.Trainer(
        accelerator="cpu",
        max_epochs=-1,
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
    ).fit(module, ImageDataModule(Digits(), 32, micro, conditional=False))


def test_loss_with_learned_variance_by_hand():
    module = Diffusion(network(learn_variance=True), total_kimg=1).eval()
    with torch.no_grad():
        module.denoiser.unet.out_gain.fill_(1)
    x0 = torch.rand(6, 1, 8, 8) * 2 - 1
    draw = Draw(0, 0, 0, 6, torch.device("cpu"))
    output = module.loss(Batch(x0, None, torch.arange(6)), draw)
    u = module.denoiser.log_variance(output.t.float())
    weight = ((output.t**2 + 0.25) / (output.t * 0.5) ** 2).float()
    expected = output.distance * weight * (-u).exp() + 64 * u
    torch.testing.assert_close(output.loss, expected)
    output.loss.mean().backward()
    assert float(module.denoiser.logvar_linear.weight.grad.abs().sum()) > 0
    plain = Diffusion(network(), total_kimg=1).eval()
    plain.denoiser.load_state_dict(module.denoiser.state_dict())
    plain_output = plain.loss(Batch(x0, None, torch.arange(6)), draw)
    torch.testing.assert_close(plain_output.loss, output.distance * weight)


class Watch(L.Callback):
    """Weights at the start of every micro-batch's forward pass, and after it."""

    def __init__(self) -> None:
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        weight = pl_module.denoiser.unet.out_conv.weight
        self.seen.append((pl_module.nimg, weight.detach().clone()))


@pytest.mark.parametrize("regime", [ECT, Diffusion, CT])
def test_weights_are_normalised_once_per_optimizer_step(regime):
    options = {"distance": L2()} if regime is CT else {}
    module = regime(network(), total_kimg=0.096, **options)
    with torch.no_grad():
        module.denoiser.unet.out_conv.weight.mul_(5)
    watch = Watch()
    needed = module.configure_callbacks()
    assert [type(c).__name__ for c in needed][-1] == "WeightNormalizationCallback"
    train(module, 3, [watch], micro=16)
    assert [nimg for nimg, _ in watch.seen] == [0, 0, 32, 32, 64, 64]
    # the watch runs before the module's own callbacks: the second micro-batch sees the result
    for (_, first), (_, second) in zip(watch.seen[::2], watch.seen[1::2], strict=True):
        scaled = first / (1e-4 + first.square().flatten(1).mean(1).sqrt().reshape(-1, 1, 1, 1))
        torch.testing.assert_close(second, scaled)


def test_no_unused_parameter_is_left_to_ddp():
    """Every trainable parameter gets a gradient, in tuning as in diffusion training."""
    x0 = torch.rand(8, 1, 8, 8) * 2 - 1
    draw = Draw(0, 0, 0, 8, torch.device("cpu"))
    for module in (
        ECT(network(), total_kimg=1),
        Diffusion(network(learn_variance=True), total_kimg=1),
    ):
        module.loss(Batch(x0, None, torch.arange(8)), draw).loss.mean().backward()
        missing = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
        assert missing == []


def test_a_pair_at_one_level_has_no_loss_under_shared_dropout():
    """Nothing in a forward pass changes the weights, so both passes agree exactly."""
    from cm_lightning.objective import paired_forward

    net = network().train()
    with torch.no_grad():
        net.unet.out_gain.fill_(1)
    before = copy.deepcopy(net.state_dict())
    x, t = torch.randn(4, 1, 8, 8), torch.full((4,), 0.7).double()
    a, b = paired_forward(net, net, x, t, x, t, None, dropout=DropoutKey(3))
    assert torch.equal(a, b)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    normalize_weights(net)
    assert any(isinstance(m, MPConv) for m in net.modules())
