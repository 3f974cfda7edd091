"""The order of images, and the LightningDataModule under a real trainer."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch

from cm_lightning.data import (
    Digits,
    ImageDataModule,
    Order,
    ReferenceSet,
    Source,
    StepSampler,
)
from cm_lightning.types import InputError


class Recorder(L.LightningModule):
    """Remembers what it was fed."""

    def __init__(self, nimg: int = 0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.position = nimg
        self.batches = []

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def feed(data: ImageDataModule, steps: int = 3, nimg: int = 0, **trainer) -> list:
    module = Recorder(nimg)
    L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=-1,
        max_steps=steps,
        use_distributed_sampler=False,
        **trainer,
    ).fit(module, data)
    return module.batches


def test_every_epoch_is_a_permutation():
    order = Order(17, seed=3)
    first, second = (order(np.arange(17 * k, 17 * (k + 1))).index for k in (0, 1))
    assert sorted(first) == sorted(second) == list(range(17))
    assert not np.array_equal(first, second)
    across = order(np.arange(10, 25)).index
    assert np.array_equal(across, np.concatenate([first[10:], second[:8]]))
    assert not np.array_equal(Order(17, seed=4)(np.arange(17)).index, first)


def test_coins_are_fair_and_fixed():
    flips = Order(1000, seed=0)(np.arange(20_000)).flip
    assert flips.mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(Order(1000, seed=0)(np.arange(20_000)).flip, flips)


def test_order_and_coins_come_from_separate_streams():
    rows = Order(1000, seed=5)(np.arange(1000, 2000))
    streams = [np.random.default_rng(np.random.SeedSequence((5, 1, k))) for k in (0, 1)]
    assert np.array_equal(rows.index, streams[0].permutation(1000))
    assert np.array_equal(rows.flip, streams[1].random(1000) < 0.5)


def take(sampler: StepSampler, n: int) -> list:
    return [rows for rows, _ in zip(sampler, range(n), strict=False)]


@pytest.mark.parametrize(("world", "micro"), [(1, 12), (2, 6), (3, 2), (1, 4)])
def test_the_images_of_a_step_do_not_depend_on_the_split(world, micro):
    whole = take(StepSampler(50, 1, 12, 12), 5)
    accumulation = 12 // (world * micro)
    parts = [
        take(StepSampler(50, 1, 12, micro, rank, world), 5 * accumulation) for rank in range(world)
    ]
    for step in range(5):
        rows = [
            parts[rank][step * accumulation + j]
            for j in range(accumulation)
            for rank in range(world)
        ]
        assert np.array_equal(np.concatenate([r.index for r in rows]), whole[step].index)
        assert np.array_equal(np.concatenate([r.flip for r in rows]), whole[step].flip)


def test_a_restart_continues_the_stream():
    whole = take(StepSampler(50, 1, 12, 4), 30)
    rest = take(StepSampler(50, 1, 12, 4, start_nimg=36), 21)
    for a, b in zip(whole[9:], rest, strict=True):
        assert np.array_equal(a.index, b.index)


def test_batches_under_a_trainer():
    data = ImageDataModule(Digits(), global_batch=64, flip=True)
    batches = feed(data)
    assert len(batches) == 3
    x0, labels, place, references, *_ = batches[1]
    assert references is None
    index = place % len(data.store)
    assert x0.shape == (64, 1, 8, 8)
    assert x0.dtype is torch.float32
    assert float(x0.min()) >= -1
    assert float(x0.max()) <= 1
    images, expected = data.store[index.numpy()]
    assert torch.equal(labels, expected)
    plain = images.float() / 127.5 - 1
    flips = Order(1797, 0)(np.arange(64, 128)).flip
    assert torch.equal(x0[torch.from_numpy(flips)], plain[torch.from_numpy(flips)].flip(-1))
    assert torch.equal(x0[torch.from_numpy(~flips)], plain[torch.from_numpy(~flips)])
    assert torch.equal(place >= len(data.store), torch.from_numpy(flips))


@pytest.mark.parametrize("changes", [{"num_workers": 2}, {"resident": True}])
def test_workers_and_residence_change_nothing(changes):
    plain = feed(ImageDataModule(Digits(), global_batch=32, flip=True))
    other = feed(ImageDataModule(Digits(), global_batch=32, flip=True, **changes))
    for a, b in zip(plain, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a[:3], b[:3], strict=True))


def test_references_travel_with_the_batch():
    data = ImageDataModule(Digits(), global_batch=32, flip=True)
    original = data.setup

    def setup(stage=None):
        original(stage)
        data.use_references(ReferenceSet(n=9), skip=True)

    data.setup = setup
    for batch in feed(data):
        labels = batch.references.labels
        assert set(labels.tolist()) == set(batch.labels.tolist())
        assert len(labels) == 8 * len(set(labels.tolist()))
        x = data.store.images[batch.references.index.numpy() % len(data.store)]
        mirrored = (batch.references.index >= len(data.store)).numpy()
        x = np.where(mirrored[:, None, None, None], x[..., ::-1], x)
        assert np.array_equal(batch.references.images.numpy(), x)
        assert batch.references.nearest.shape == (32,)
        assert float(batch.references.nearest.min()) > 0.1


def test_the_loader_starts_where_the_module_stands():
    whole = feed(ImageDataModule(Digits(), global_batch=32), steps=4)
    rest = feed(ImageDataModule(Digits(), global_batch=32), steps=2, nimg=64)
    assert torch.equal(whole[2].index, rest[0].index)
    assert torch.equal(whole[3].x0, rest[1].x0)


def test_a_resumed_run_keeps_its_global_batch():
    with pytest.raises(InputError, match=r"data\.global_batch 48 does not divide the 64 images"):
        feed(ImageDataModule(Digits(), global_batch=48), steps=1, nimg=64)


def test_accumulation_follows_from_the_batch():
    batches = feed(ImageDataModule(Digits(), global_batch=32, micro_batch=8), steps=2)
    assert len(batches) == 8
    whole = feed(ImageDataModule(Digits(), global_batch=32), steps=2)
    assert torch.equal(torch.cat([b.x0 for b in batches[:4]]), whole[0].x0)


def test_unconditional_batches_have_no_labels():
    data = ImageDataModule(Digits(), global_batch=8, conditional=False)
    assert feed(data, steps=1)[0].labels is None
    assert data.num_classes == 0


def test_plans():
    data = ImageDataModule(Digits(), global_batch=256, micro_batch=32)
    assert data.plan(2) == (256, 2, 32, 4)
    assert data.plan(16) == (256, 16, 16, 1)
    with pytest.raises(InputError, match="not divisible by 3"):
        data.plan(3)
    with pytest.raises(InputError, match="micro_batch 48"):
        ImageDataModule(Digits(), global_batch=256, micro_batch=48).plan(1)


def test_accumulation_by_hand_is_refused():
    with pytest.raises(InputError, match="micro_batch"):
        feed(ImageDataModule(Digits(), global_batch=8), steps=1, accumulate_grad_batches=2)


@pytest.mark.parametrize("changes", [{"global_batch": 0}, {"micro_batch": 0}, {"num_workers": -1}])
def test_bad_arguments_are_named(changes):
    with pytest.raises(InputError, match=next(iter(changes))):
        ImageDataModule(Digits(), **changes)


def attach(data: ImageDataModule, rank: int = 0, world: int = 1, device: str = "cpu") -> None:
    data.trainer = SimpleNamespace(
        world_size=world,
        global_rank=rank,
        accumulate_grad_batches=1,
        lightning_module=Recorder(),
        strategy=SimpleNamespace(root_device=torch.device(device)),
    )


def test_ranks_share_a_step():
    whole = feed(ImageDataModule(Digits(), global_batch=16, micro_batch=4), steps=1)
    for rank in (0, 1):
        data = ImageDataModule(Digits(), global_batch=16, micro_batch=4)
        attach(data, rank, world=2)
        data.prepare_data()
        data.setup()
        assert data.trainer.accumulate_grad_batches == 2
        for batch, expected in zip(data.train_dataloader(), whole[rank::2], strict=False):
            assert torch.equal(batch.index, expected.index)


def test_resident_images_follow_the_device():
    data = ImageDataModule(Digits(), resident=True)
    data.prepare_data()
    for device in ("cpu", "meta"):
        attach(data, device=device)
        data.setup()
        data.train_dataloader()
        assert data._resident.device.type == device


class Blank(Source):
    """Six dark images without labels; counts how often it is read."""

    reads = 0
    name = "blank"

    def identity(self):
        return {"source": "blank"}

    def read(self):
        self.reads += 1
        return np.zeros((6, 4, 4, 1), np.uint8), None


def test_a_source_is_read_once_per_transform(tmp_path):
    source = Blank()
    for resolution, shape in ((None, (1, 4, 4)), (None, (1, 4, 4)), (8, (1, 8, 8))):
        data = ImageDataModule(
            source, resolution=resolution, conditional=False, cache=str(tmp_path)
        )
        data.prepare_data()
        data.setup()
        assert data.image_shape == shape
    assert source.reads == 2


def test_labels_cannot_be_invented(tmp_path):
    data = ImageDataModule(Blank(), cache=str(tmp_path))
    data.prepare_data()
    with pytest.raises(InputError, match=r"data\.conditional is true, but blank has no labels"):
        data.setup()
