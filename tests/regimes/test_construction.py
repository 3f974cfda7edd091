from functools import partial

import pytest
import torch
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling

from cm_lightning.networks import ConsistencyPrecond, EDMPrecond, SongUNet
from cm_lightning.objective import (
    COut,
    GeneratorCoupling,
    Independent,
    InverseStep,
    MinibatchOT,
    Phases,
    SquaredL2,
)
from cm_lightning.regimes import CD, GC, SCT
from cm_lightning.types import InputError
from cm_lightning.weights import Pretrained, save_weights

SMALL = {"model_channels": 8, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}


def network(precond: type = EDMPrecond, **options) -> EDMPrecond:
    return precond(SongUNet(8, 1, 1, **SMALL, **options))


def saved(folder, precond: str = "EDMPrecond", **info) -> str:
    """A weights folder of such a network."""
    backbone = {"img_resolution": 8, "in_channels": 1, "out_channels": 1} | SMALL
    inner = {"class_path": "cm_lightning.networks.SongUNet", "init_args": backbone}
    config = {"class_path": f"cm_lightning.networks.{precond}", "init_args": {"backbone": inner}}
    save_weights(folder, config, network().state_dict(), info)
    return str(folder)


def test_images_and_noise_must_be_independent():
    with pytest.raises(InputError, match="independent: choose Independent or GeneratorCoupling"):
        SCT(network(), coupling=MinibatchOT())
    for coupling in (Independent(), GeneratorCoupling(0.3)):
        SCT(network(), coupling=coupling)


EDGES = (0.0, 2.0, 80.0)


def test_phases_have_no_endpoint_for_a_coupling(tmp_path):
    """Of the network in training; a frozen one without phases has."""
    for phases in (Phases((0.0, 80.0)), None):
        SCT(network(), coupling=GeneratorCoupling(0.3), phases=phases)
    for endpoint in ("ema", "online"):
        with pytest.raises(InputError, match="leave one of the two out"):
            SCT(network(), coupling=GeneratorCoupling(endpoint=endpoint), phases=Phases(EDGES))
    frozen = GeneratorCoupling(endpoint="frozen", weights=saved(tmp_path / "ect", regime="ECT"))
    SCT(network(), coupling=frozen, phases=Phases(EDGES))


def test_endpoints_come_from_consistency_models(tmp_path):
    infos = {
        "diffusion": ({"regime": "Diffusion"}, "predicts the mean of many images"),
        "nothing known": ({}, "predicts the mean of many images"),
        "phases": ({"regime": "SCT", "phases": list(EDGES)}, "was trained in phases"),
    }
    for name, (info, message) in infos.items():
        weights = saved(tmp_path / name, **info)
        with pytest.raises(InputError, match=message):
            GC(network(), coupling=GeneratorCoupling(endpoint="frozen", weights=weights))
    for name, info in (("ict", {"regime": "ICT"}), ("one", {"regime": "SCT", "phases": [0, 80]})):
        weights = saved(tmp_path / name, **info)
        GC(network(), coupling=GeneratorCoupling(endpoint="frozen", weights=weights))


def test_normalised_phases_need_another_weighting():
    normal = Phases(EDGES, normalize=True)
    with pytest.raises(InputError, match="contains that factor already"):
        SCT(network(), phases=normal)
    SCT(network(), phases=normal, weighting=COut())
    SCT(network(), phases=Phases(EDGES), weighting=InverseStep())
    SCT(network(), phases=Phases((0.0, 80.0), normalize=True))


def test_a_student_of_cd_always_sees_labels(tmp_path):
    """Labels are dropped inside the network, where the teacher's step does not see it."""
    weights = saved(tmp_path / "teacher", regime="Diffusion")
    CD(network(ConsistencyPrecond), Pretrained(weights), distance=SquaredL2())
    student = network(ConsistencyPrecond, label_dropout=0.1)
    with pytest.raises(
        InputError, match=r"label_dropout 0\.1, but CD's teacher always sees labels"
    ):
        CD(student, Pretrained(weights), distance=SquaredL2())


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
