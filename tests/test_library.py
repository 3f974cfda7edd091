"""The package without its command line: a plain Trainer, loaders of one's own, and mistakes."""

from __future__ import annotations

import copy
import gc
import signal
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from torch.utils.data import DataLoader

import cm_lightning
from cm_lightning.callbacks import (
    CheckpointCallback,
    DiagnosticsCallback,
    EMACallback,
    FIDCallback,
    SamplesCallback,
)
from cm_lightning.callbacks.step import StepCallback, step_of
from cm_lightning.cli.errors import about_machine
from cm_lightning.data import Digits, ImageDataModule, ReferenceSet, Source
from cm_lightning.ema import ConstantEMA, PowerEMA
from cm_lightning.evaluation import DigitsFeatures, read_metrics, reference_name, save_npz, to_uint8
from cm_lightning.evaluation.frechet import frechet_distance
from cm_lightning.files import replacing, save_tensors
from cm_lightning.loggers import MetricsCSV
from cm_lightning.networks import EDM2Precond, EDM2UNet, EDMPrecond, SongUNet
from cm_lightning.objective import (
    L1,
    L2,
    SNR,
    ECTMapping,
    GeneratorCoupling,
    GrowingGrid,
    LogNormal,
    PseudoHuber,
    ReferenceMean,
    SquaredL2,
)
from cm_lightning.optim import GradientGuard, LearningRate
from cm_lightning.regimes import CD, CT, ECT, SCT
from cm_lightning.sampling import GuidedDenoiser, euler, heun, image_noise, multistep
from cm_lightning.types import Batch, InputError, References
from cm_lightning.weights import Pretrained


def network(width: int = 8, **options) -> EDMPrecond:
    sizes = {"img_resolution": 8, "in_channels": 1, "out_channels": 1, "label_dim": 10}
    sizes |= {"model_channels": width, "channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    return EDMPrecond(SongUNet(**sizes | options))


def fit(module, *callbacks, root: Path, loader=None, **options) -> L.Trainer:
    options = {"logger": False, "max_epochs": 1, "accelerator": "cpu"} | options
    trainer = L.Trainer(
        default_root_dir=root,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    data = ImageDataModule(Digits(), global_batch=32) if loader is None else None
    trainer.fit(module, loader, datamodule=data)
    return trainer


def loader(n: int, size: int, last: bool = True) -> DataLoader:
    images, labels = torch.rand(n, 1, 8, 8) * 2 - 1, torch.arange(n) % 10
    rows = [(images[i], labels[i], torch.tensor(i)) for i in range(n)]
    pack = lambda parts: Batch(*map(torch.stack, zip(*parts, strict=True)))  # noqa: E731
    return DataLoader(rows, batch_size=size, collate_fn=pack, drop_last=not last)


def test_parts_are_found_from_the_top():
    assert cm_lightning.regimes.ECT is ECT
    assert set(cm_lightning.PARTS) <= set(dir(cm_lightning))
    with pytest.raises(AttributeError, match="nothing"):
        cm_lightning.nothing  # noqa: B018


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_the_clock_counts_images_of_any_loader(accumulation, tmp_path):
    """200 images in micro-batches of 40: the last step of an epoch has fewer of them."""
    module = ECT(network(), 100)
    log = MetricsCSV(tmp_path)
    diagnostics = DiagnosticsCallback(every_kimg=0.2)
    fit(
        module,
        diagnostics,
        EMACallback(),
        root=tmp_path,
        loader=loader(200, 40),
        accumulate_grad_batches=accumulation,
        logger=log,
    )
    assert module.nimg == 200


def test_micro_batches_of_a_step_are_equal(tmp_path):
    with pytest.raises(InputError, match="one of 8 images after those of 32: set drop_last"):
        fit(ECT(network(), 100), root=tmp_path, loader=loader(104, 32), accumulate_grad_batches=4)


def test_callbacks_that_need_a_data_module_say_so(tmp_path):
    for callback in (SamplesCallback(), FIDCallback(DigitsFeatures(), n=20)):
        with pytest.raises(InputError, match="train with an ImageDataModule"):
            fit(ECT(network(), 1), EMACallback(), callback, root=tmp_path, loader=loader(64, 32))
    pairs = DataLoader(torch.utils.data.TensorDataset(torch.rand(8, 1, 8, 8)), batch_size=8)
    with pytest.raises(InputError, match=r"must give batches as .*Batch.*, got list"):
        fit(ECT(network(), 1), root=tmp_path, loader=pairs)


def test_a_new_run_is_not_written_among_the_checkpoints_of_another(tmp_path):
    first = ECT(network(), 0.064)
    fit(first, EMACallback(), CheckpointCallback(every_kimg=0.032), root=tmp_path)
    there = sorted(tmp_path.glob("checkpoints/*"))
    with pytest.raises(InputError, match="holds the checkpoints of another run"):
        fit(ECT(network(), 0.064), EMACallback(), CheckpointCallback(), root=tmp_path)
    assert sorted(tmp_path.glob("checkpoints/*")) == there
    first.total_kimg = 0.096  # the module itself may go on
    fit(first, EMACallback(), CheckpointCallback(), root=tmp_path)
    assert first.nimg == 96


def test_callbacks_of_an_earlier_run_begin_anew(tmp_path):
    ema = EMACallback([ConstantEMA(0.9)], snapshots=[0.5])
    fid = FIDCallback(DigitsFeatures(), n=20, every_kimg=0.064)
    fit(ECT(network(), 0.064), ema, fid, root=tmp_path / "a")
    assert len(fid.best) == len(fid.last) > 0
    assert "ema_0.9@0.5" in ema.averages
    fit(ECT(network(16), 0.064), ema, fid, root=tmp_path / "b", max_steps=1)
    assert list(ema.averages) == ["ema_0.9", "ema_0.9@0.5"]
    shapes = [value.shape for value in ema.averages["ema_0.9@0.5"].values()]
    assert shapes == [value.shape for value in ema.averages["ema_0.9"].values()]
    assert not fid.best
    fit(ECT(network(16), 1), ema, fid, root=tmp_path / "c", max_steps=1)
    assert list(ema.averages) == ["ema_0.9"]


def test_dropout_is_random_again_after_training(tmp_path):
    module = ECT(network(dropout=0.5, label_dropout=0.5), 0.064)
    net, x = module.denoiser, torch.randn(4, 1, 8, 8)
    fit(module, root=tmp_path)
    net.train()
    for some in (net, copy.deepcopy(net)):
        first, second = (some(x, torch.ones(4), torch.arange(4)) for _ in range(2))
        assert not torch.equal(first, second)


@pytest.mark.parametrize("distance", [L1(), L2(), SquaredL2(), PseudoHuber(0.1)])
def test_a_distance_of_what_is_not_finite_is_not_finite(distance):
    a = torch.zeros(3, 1, 2, 2)
    a[1], a[2] = torch.nan, torch.inf
    found = distance(a, torch.zeros_like(a))
    assert found.isfinite().tolist() == [True, False, False]


def test_losses_are_means_over_finite_ones(tmp_path):
    module = ECT(network(), 0.064)
    with torch.no_grad():
        next(module.denoiser.parameters()).fill_(torch.nan)
    log = MetricsCSV(tmp_path)
    fit(module, DiagnosticsCallback(every_kimg=0.064), root=tmp_path, logger=log)
    head, row = (line.split(",") for line in (tmp_path / "metrics.csv").read_text().splitlines())
    values = dict(zip(head, row, strict=True))
    assert values["loss"] == values["distance"] == "nan"
    assert float(values["loss/nonfinite"]) == 64


def test_a_width_keeps_all_its_digits():
    assert [PowerEMA(std).name for std in (0.05, 0.1244)] == ["ema_std0.050", "ema_std0.1244"]


def test_levels_of_samplers_come_as_lists_arrays_and_tensors():
    net, z, labels = network().eval(), torch.randn(2, 1, 8, 8), torch.arange(2)
    levels = [80.0, 1.0]
    for draw, noise in ((euler, z), (heun, z), (multistep, torch.stack([z, z]))):
        kinds = levels, np.array(levels), torch.tensor(levels, dtype=torch.float64)
        first, *others = (draw(net, noise, kind, labels) for kind in kinds)
        assert all(torch.equal(first, other) for other in others)
        for wrong in ([], [1.0, 80.0], [80.0, 0.0], [80.0, torch.nan]):
            with pytest.raises(InputError, match="sigmas"):
                draw(net, noise, torch.tensor(wrong), labels)
    assert torch.equal(image_noise(0, torch.arange(2), 1, (2,)), image_noise(0, [0, 1], 1, (2,)))


@dataclass(frozen=True)
class Given(Source):
    """A source that gives what it is told to."""

    images: object = None
    labels: object = None
    name = "given"

    def identity(self):
        return {"source": "given"}

    def read(self):
        return self.images, self.labels


IMAGES = np.zeros((4, 8, 8, 1), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES / 255, None, r"images \(N, H, W, C\) of uint8, got float64 \(4, 8, 8, 1\)"),
        (IMAGES[..., 0], None, r"images \(N, H, W, C\) of uint8, got uint8 \(4, 8, 8\)"),
        (torch.from_numpy(IMAGES), None, "of uint8, got torch.uint8"),
        (np.zeros((4, 8, 8, 4), np.uint8), None, "of 1 or 3 channels"),
        (IMAGES, np.zeros(4, np.int32), r"labels \(N,\) of int64 or None, got int32"),
        (IMAGES, [0, 1, 0, 1], r"labels \(N,\) of int64 or None, got list"),
    ],
)
def test_a_source_of_other_arrays_leaves_nothing(images, labels, message, tmp_path):
    data = ImageDataModule(Given(images, labels), global_batch=2, cache=str(tmp_path / "cache"))
    with pytest.raises(InputError, match=message):
        data.prepare_data()
    assert not list(tmp_path.rglob("*.npy"))


def wide() -> EDMPrecond:
    return network(out_channels=3)


def no_labels() -> None:
    x = torch.zeros(1, 1, 8, 8)
    references = References(x, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    ReferenceMean()(x, torch.ones(1), Batch(x, None, torch.zeros(1).long(), references))


X, ONE = torch.zeros(4, 1, 8, 8), torch.ones(4)
EYE = torch.eye(3, dtype=torch.float64)

MISTAKES = {
    "takes images of 1 channels and gives 3": wide,
    "total_kimg must be 0.001": lambda: ECT(network(), 0.0004),
    "GrowingGrid: total_kimg must be 0.001": lambda: GrowingGrid(total_kimg=0.0001),
    "A regime trains a Denoiser": lambda: ECT(SongUNet(8, 1, 1), 1),
    r"init must be Pretrained\(path\)": lambda: ECT(network(), 1, init="run"),
    r"teacher must be Pretrained\(path\)": lambda: CD(network(), "run", 1),
    "model.solver must be one of euler, heun, got 'Heun'": lambda: SCT(network(), 1, solver="Heun"),
    "model.solver must be one of heun, euler": lambda: CD(
        network(), Pretrained("run"), 1, solver="rk4"
    ),
    "model.init must be one of teacher, random": lambda: CD(
        network(), Pretrained("run"), 1, init="Teacher"
    ),
    "endpoint must be one of": lambda: GeneratorCoupling(endpoint="foo"),
    "level must be one of": lambda: GeneratorCoupling(level="foo"),
    "SNR: kind must be one of": lambda: SNR("foo"),
    "rate must be one of": lambda: GrowingGrid(rate="x"),
    "references.source must be one of": lambda: ReferenceSet(source="Bank"),
    "at most 3 stages, or longer ones": lambda: ECT(
        network(), 8, discretization=ECTMapping(q=256, kimg_per_stage=1)
    ),
    "ramp_kimg must be 0 or more": lambda: LearningRate(ramp_kimg=float("nan")),
    "p_mean must be finite": lambda: LogNormal(p_mean=float("nan")),
    "ECTMapping: p_mean": lambda: ECTMapping(p_mean=float("nan")),
    "infinity must be 0 or more": lambda: GradientGuard(infinity=float("nan")),
    "labels must be 4 whole numbers, one per image, got torch.float32": lambda: network()(
        X, ONE, ONE
    ),
    r"whole numbers, one per image, got torch.int64 of shape \(1,\)": lambda: network()(
        X, ONE, torch.zeros(1).long()
    ),
    "learn_variance is true, and the loss of ECT": lambda: ECT(
        EDM2Precond(EDM2UNet(8, 1, 1, model_channels=64), learn_variance=True), 1
    ),
    "needs labels, got None": lambda: GuidedDenoiser(network(label_dropout=0.1), None, 2.0)(X, ONE),
    "The references have labels and the batch has none": no_labels,
    "images from -1": lambda: image_noise(0, [-1], 1, (2,)),
    "seed -1": lambda: image_noise(-1, [0], 1, (2,)),
    "as floats, got torch.uint8": lambda: to_uint8(torch.zeros(2, dtype=torch.uint8)),
    "must be symmetric": lambda: frechet_distance(EYE[0], -EYE, EYE[0], EYE),
    "with variances of 0 or more": lambda: frechet_distance(
        EYE[0], EYE + EYE.roll(1, 0), EYE[0], EYE
    ),
    "call them first": lambda: ImageDataModule(Digits()).store,
    "Batches are made for a trainer": lambda: ImageDataModule(Digits()).train_dataloader(),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_in_python(message):
    with pytest.raises(InputError, match=message):
        MISTAKES[message]()


def test_a_backbone_that_changes_the_shape_is_refused():
    class Half(torch.nn.Module):
        def forward(self, x, noise, labels=None):
            return x[..., ::2]

    with pytest.raises(InputError, match=r"\(4, 1, 8, 8\) and gave \(4, 1, 8, 4\)"):
        EDMPrecond(Half())(X, ONE)


def test_ct_of_one_image_per_grid():
    assert CT(network(), 0.001).total_nimg == 1


def test_rows_of_long_runs_are_kept_or_dropped_by_the_image(tmp_path):
    log = MetricsCSV(tmp_path)
    for nimg in (11_000_064, 150_000_000, 150_000_256):
        log.log_metrics({"kimg": nimg / 1000, "loss": 1.0}, step=nimg // 128)
    log.resume_at(150_000_000)
    assert [row["kimg"] for row in read_metrics(log.path)] == [11000.064, 150000.0]
    log.resume_at(11_000_064)
    assert [row["kimg"] for row in read_metrics(log.path)] == [11000.064]


def test_statistics_are_told_apart_by_their_content(tmp_path):
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ref.npz").write_bytes(content)
    a, b, c = (reference_name(str(tmp_path / name / "ref.npz")) for name in "abc")
    assert a == b != c
    assert a.startswith("ref.npz ")
    assert reference_name("auto") == "auto"


def test_samples_that_are_all_alike_have_a_distance():
    """Of a model that collapsed, or whose images are not finite."""
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(200, 16, generator=generator, dtype=torch.float64)
    alike = torch.rand(16, generator=generator, dtype=torch.float64).expand(200, 16)
    n = len(real)
    outer, total = alike.T @ alike, alike.sum(0)
    flat = (outer - n * torch.outer(total / n, total / n)) / (n - 1)
    found = frechet_distance(real.mean(0), real.T.cov(), total / n, flat)
    expected = (real.mean(0) - alike[0]).square().sum() + real.T.cov().trace()
    assert found == pytest.approx(float(expected), rel=1e-6)


def test_a_teacher_is_left_out_without_a_data_module(tmp_path):
    module = ECT(network(), 0.064)
    module.origins["init"] = {"regime": "Diffusion", "path": "nowhere"}
    log = MetricsCSV(tmp_path)
    diagnostics = DiagnosticsCallback(every_kimg=0.032)
    fit(module, diagnostics, EMACallback(), root=tmp_path, loader=loader(64, 32), logger=log)
    assert len(read_metrics(log.path)) == 2


def test_samples_under_any_name(tmp_path):
    save_npz(tmp_path / "samples", torch.zeros(2, 3, 4, 4, dtype=torch.uint8))
    assert [path.name for path in tmp_path.iterdir()] == ["samples"]


def test_a_step_that_was_broken_off_is_begun_anew(tmp_path):
    module = ECT(network(), 100)
    options = {"root": tmp_path, "accumulate_grad_batches": 4}
    with pytest.raises(InputError, match="drop_last"):
        fit(module, loader=loader(104, 32), **options)
    fit(module, loader=loader(128, 32), **options)
    assert module.nimg == 128


def test_an_epoch_that_ended_is_not_gone_into_again(tmp_path):
    """A checkpoint of the last, shorter step of an epoch; the next one begins at its first row."""
    first, again = ECT(network(), 100), ECT(network(), 100)
    options = {"accumulate_grad_batches": 4, "loader": loader(280, 40)}
    every = {"every_kimg": 0.28}
    fit(first, EMACallback(), CheckpointCallback(**every), root=tmp_path, **options)
    assert first.nimg == 280
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        logger=False,
        callbacks=[EMACallback(), CheckpointCallback(**every)],
        max_epochs=2,
        accelerator="cpu",
        accumulate_grad_batches=4,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (path,) = tmp_path.glob("checkpoints/nimg000000000280.ckpt")
    trainer.fit(again, options["loader"], ckpt_path=path, weights_only=True)
    assert again.nimg == 560


def test_the_number_of_a_step_is_known_before_the_first():
    module = SimpleNamespace(position=640, global_batch=0)
    data = SimpleNamespace(global_batch=64)
    assert step_of(SimpleNamespace(lightning_module=module, datamodule=data)) == 10
    module.global_batch = 32
    assert step_of(SimpleNamespace(lightning_module=module, datamodule=None)) == 20


def test_a_network_of_ones_own_need_not_know_of_label_dropout():
    class Own(torch.nn.Module):
        in_channels, img_resolution, label_dim = 1, 8, 3

        def forward(self, x, noise, labels=None):
            return x

    assert multistep(EDMPrecond(Own()), X[None], [80.0]).shape == X.shape


def test_rows_of_a_resumed_training_are_there_once(tmp_path):
    def parts():
        checkpoints = CheckpointCallback(every_kimg=0.128, best=None)
        return EMACallback([ConstantEMA(0.9)]), DiagnosticsCallback(0.032), checkpoints

    module = ECT(network(), total_kimg=0.256)
    fit(module, *parts(), root=tmp_path, logger=MetricsCSV(tmp_path), max_steps=7)
    first = read_metrics(tmp_path / "metrics.csv")
    trainer = L.Trainer(
        default_root_dir=tmp_path,
        callbacks=list(parts()),
        logger=MetricsCSV(tmp_path),
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        max_epochs=1,
    )
    checkpoint = tmp_path / "checkpoints" / "nimg000000000128.ckpt"
    data = ImageDataModule(Digits(), global_batch=32)
    trainer.fit(ECT(network(), total_kimg=0.256), data, ckpt_path=checkpoint, weights_only=True)
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in first] == list(range(1, 8))
    assert [row["step"] for row in rows] == list(range(1, 9))


def test_numbers_of_lightnings_callbacks_are_dated(tmp_path):
    monitor = LearningRateMonitor("step")
    logger = MetricsCSV(tmp_path)
    module = ECT(network(), total_kimg=0.16)
    fit(
        module,
        monitor,
        DiagnosticsCallback(0.064),
        root=tmp_path,
        logger=logger,
        log_every_n_steps=2,
    )
    rows = [row for row in read_metrics(tmp_path / "metrics.csv") if "lr-RAdam" in row]
    assert len(rows) > 1
    for row in rows:
        assert row["kimg"] == pytest.approx(0.032 * row["step"])


def test_the_speed_is_that_of_training(tmp_path):
    class Slow(StepCallback):
        def on_step(self, trainer, pl_module, before, after):
            with self.pause():
                time.sleep(0.3)

    module = ECT(network(), total_kimg=0.32)
    parts = Slow(), DiagnosticsCallback(0.064)
    fit(module, *parts, root=tmp_path, logger=MetricsCSV(tmp_path))
    rows = read_metrics(tmp_path / "metrics.csv")
    assert min(row["speed/images_per_second"] for row in rows) > 64 / 0.6


def test_a_full_disk_is_told_with_the_name_of_the_file(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("Error: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        save_tensors({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    assert caught.value.filename == str(tmp_path / "model.safetensors")
    assert "model.safetensors cannot be read or written: No space" in about_machine(caught.value)
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "a.json"):
        raise OSError(28, "No space left on device")
    assert caught.value.filename == str(tmp_path / "a.json")
    assert not list(tmp_path.iterdir())


def test_nothing_of_a_training_stays_behind(tmp_path):
    """Neither its handlers of signals nor, through them or otherwise, its networks."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    module = ECT(network(), total_kimg=0.064)
    left = weakref.ref(module)
    parts = EMACallback([ConstantEMA(0.9)]), CheckpointCallback(every_kimg=0.032, best=None)
    fit(module, *parts, DiagnosticsCallback(0.032), root=tmp_path)
    assert {number: signal.getsignal(number) for number in before} == before
    del module, parts
    gc.collect()
    assert left() is None
