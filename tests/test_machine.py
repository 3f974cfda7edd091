"""What depends on the machine: several processes, little memory, compilers, precision."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment

from cm_lightning.callbacks import (
    EMACallback,
    FIDCallback,
    performance,
)
from cm_lightning.callbacks import fid as fid_module
from cm_lightning.callbacks.memory import kept_bytes
from cm_lightning.callbacks.run_record import RunRecordCallback
from cm_lightning.cli.fit_run import is_child
from cm_lightning.data import Digits, EDMAugment, ImageDataModule
from cm_lightning.ema import update_average
from cm_lightning.evaluation import DigitsFeatures
from cm_lightning.networks import ADMUNet, EDMPrecond, SongUNet
from cm_lightning.objective import (
    Draw,
    SquaredL2,
)
from cm_lightning.regimes import ECT
from cm_lightning.sampling import evaluating
from cm_lightning.types import InputError
from tests.test_library import ONE, X, fit, network


def test_a_target_network_in_the_precision_of_its_model():
    average = [torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bfloat16)]
    update_average(average, [torch.ones(3, dtype=torch.float64), torch.ones(3)], 0.5)
    assert [a.tolist() for a in average] == [[0.5] * 3] * 2


def test_the_draw_can_be_traced():
    draw = Draw(3, 640, 0, 4, torch.device("cpu"))
    traced = torch.compile(draw.generator, backend="eager")()
    assert traced.initial_seed() == draw.generator().initial_seed()


@pytest.mark.parametrize("backbone", [SongUNet, ADMUNet])
def test_every_weight_has_a_gradient_without_augmentation(backbone):
    """DDP asks for that."""
    sizes = {"model_channels": 16, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    net = EDMPrecond(backbone(8, 1, 1, augment_dim=9, **sizes))
    net(X, ONE).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    net.eval()
    zeros = net(X, ONE, None, torch.zeros(4, 9))
    assert torch.equal(net(X, ONE), zeros)


def test_a_trial_makes_its_own_store(tmp_path):
    data = ImageDataModule(Digits(), cache=str(tmp_path / "nothing"))
    data.use_temporary_cache(tmp_path / "own")
    data.setup()
    assert len(data.store) == 1797
    assert not (tmp_path / "nothing").exists()


class Strategy:
    """Of a process beside others, of which one differs."""

    root_device = torch.device("cpu")

    def broadcast(self, value):
        return "runs/a/checkpoints/nimg1.ckpt"

    def reduce_boolean_decision(self, value, all):
        return not all


class Beside:
    """A trainer of a process beside others."""

    strategy = Strategy()
    datamodule = object()
    callbacks = (EMACallback(),)
    is_global_zero = True
    global_rank = 0


def test_processes_decide_together(capsys):
    fid = FIDCallback(DigitsFeatures(), n=20)
    fid.setup(Beside(), ECT(network(), 1), "fit")
    assert not fid.enabled
    assert "another process cannot load its weights" in capsys.readouterr().out
    with pytest.raises(InputError, match="another process cannot"):
        FIDCallback(DigitsFeatures(), n=20, required=True).setup(Beside(), ECT(network(), 1), "fit")
    with pytest.raises(InputError, match=r"go on from runs/a/.* file system that all nodes share"):
        RunRecordCallback("", None).setup(Beside(), None, "fit")


def test_too_little_memory_for_an_evaluation_halves_its_batch(tmp_path, monkeypatch, capsys):
    real, sizes = fid_module.draw_images, []

    def draw(*args, batch, **kwargs):
        sizes.append(batch)
        if batch > 10:
            raise torch.OutOfMemoryError("too little")
        return real(*args, batch=batch, **kwargs)

    monkeypatch.setattr(fid_module, "draw_images", draw)
    plain, small = (FIDCallback(DigitsFeatures(), n=24, batch=b, every_kimg=1) for b in (8, 24))
    for number, fid in enumerate((plain, small)):
        fit(ECT(network(), 0.032), EMACallback(), fid, root=tmp_path / str(number))
    assert sizes == [8, 8, 24, 12, 6, 6]
    assert small.last == pytest.approx(plain.last, rel=1e-4)
    assert "fid.batch is 6 from now on" in capsys.readouterr().out


def test_an_evaluation_leaves_compiled_graphs_alone():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    net = network().eval()
    net.backbone.compile(backend=backend)
    with torch.no_grad():
        expected = net(X[:3], ONE[:3], torch.arange(3))
        made = len(graphs)
        with evaluating(net):
            assert net(X, ONE, torch.arange(4)).shape == X.shape
            assert len(graphs) == made
        assert torch.equal(net(X[:3], ONE[:3], torch.arange(3)), expected)
    assert len(graphs) == made > 0


def test_augmentation_is_the_same_under_autocast():
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(16, 1, 8, 8, generator=generator) * 2 - 1
    u = torch.rand(16, 9, generator=generator)
    w = torch.randn(16, 4, generator=generator)
    expected = EDMAugment(0.9)(images, u, w)
    with torch.autocast("cpu", torch.bfloat16):
        found = EDMAugment(0.9)(images, u, w)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_distance_that_is_a_network_counts_in_the_memory():
    class Wide(SquaredL2):
        def __call__(self, a, b):
            return super().__call__(a.repeat(1, 64, 1, 1).exp(), b.repeat(1, 64, 1, 1))

    plain, wide = (kept_bytes(network(), 2, nullcontext(), d) for d in (SquaredL2(), Wide()))
    assert wide > plain + 2 * 64 * 64 * 4


def test_triton_needs_the_headers_of_python(monkeypatch):
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)
    monkeypatch.setattr(performance.shutil, "which", lambda name: name)
    paths = performance.sysconfig.get_paths()
    monkeypatch.setattr(performance.sysconfig, "get_paths", lambda: paths | {"include": "/none"})
    assert performance.compiler("cpu")
    assert not performance.compiler("cuda")


def test_a_child_of_lightnings_launcher_ends_quietly():
    environment = LightningEnvironment()
    strategy = SimpleNamespace(cluster_environment=environment)
    for rank in (0, 1):
        assert is_child(SimpleNamespace(strategy=strategy, local_rank=rank)) == (rank == 1)
    assert not is_child(SimpleNamespace(strategy=SimpleNamespace(), local_rank=1))
