"""The bank: whole set, classes, random subsets, mirrored images, nearest distances."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cm_lightning.data import (
    ImageDataModule,
    ReferenceBank,
    ReferenceSet,
    Resize,
    Store,
    nearest_distances,
    write_store,
)
from cm_lightning.data.store import to_float
from cm_lightning.types import InputError

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    images[7] = images[3]  # a duplicate
    labels = np.arange(30) % 3
    return write_store(tmp_path / "store", images, labels, source={}, transform=Resize())


def bank(store, spec=ReferenceSet(), conditional=True, flip=False, seed=0):
    return ReferenceBank(store, spec, conditional, flip, seed)


def test_the_whole_set_with_labels_and_positions(store):
    """Class by class, if there are classes."""
    references = bank(store)(torch.tensor([0, 2]), 0, CPU)
    by_class = [*range(0, 30, 3), *range(1, 30, 3), *range(2, 30, 3)]
    assert references.index.tolist() == by_class
    assert references.labels.tolist() == store.labels[by_class].tolist()
    images = to_float(torch.from_numpy(store.images[by_class]))
    assert torch.equal(references.images, images)
    assert torch.equal(references.squares, images.square().sum((1, 2, 3)))
    plain = bank(store, conditional=False)(None, 0, CPU)
    assert plain.labels is None
    assert plain.index.tolist() == list(range(30))


def test_the_whole_set_is_made_once(store):
    whole = bank(store)
    assert whole(torch.tensor([0]), 0, CPU).images is whole(torch.tensor([1]), 64, CPU).images


def test_a_set_too_large_as_floats_stays_grey_levels(store, monkeypatch):
    levels = store.images.nbytes
    for limit, kind, size in ((4 * levels, torch.float32, 4), (4 * levels - 1, torch.uint8, 1)):
        monkeypatch.setattr("cm_lightning.data.references.WHOLE", limit)
        whole = bank(store)
        references = whole(torch.tensor([0]), 0, CPU)
        assert references.images.dtype == kind
        assert whole.nbytes == references.images.nbytes == size * levels
    assert references.squares is None
    assert bank(store, ReferenceSet(n=5)).nbytes == 0


def test_classes_that_do_not_fit_together_are_fetched(store, monkeypatch):
    monkeypatch.setattr("cm_lightning.data.references.WHOLE", 10)
    references = bank(store)(torch.tensor([2, 0, 2]), 0, CPU)
    assert sorted(references.index.tolist()) == [i for i in range(30) if i % 3 != 1]
    assert references.labels.tolist() == [i % 3 for i in references.index.tolist()]


@pytest.mark.parametrize("flip", [False, True])
def test_random_subsets_are_a_function_of_seed_and_images_seen(store, flip):
    spec = ReferenceSet(n=5)
    one = bank(store, spec, flip=flip)(torch.tensor([0, 1]), 64, CPU)
    counts = np.bincount(one.labels.numpy(), minlength=3)
    assert counts.tolist() == [4, 4, 0]
    assert len(set(one.index.tolist())) == 8
    again = bank(store, spec, flip=flip)(torch.tensor([0, 1]), 64, CPU)
    assert torch.equal(one.index, again.index)
    other_rows = bank(store, spec, flip=flip)(torch.tensor([1]), 64, CPU)
    assert torch.equal(other_rows.index, one.index[one.labels == 1])  # another device's batch
    for nimg, seed in ((128, 0), (64, 1)):
        other = bank(store, spec, flip=flip, seed=seed)(torch.tensor([0, 1]), nimg, CPU)
        assert not torch.equal(one.index, other.index)
    free = bank(store, spec, conditional=False, flip=flip)(None, 0, CPU)
    assert len(set(free.index.tolist())) == 4


def test_the_loader_fetches_subsets_ahead(store, tmp_path):
    """Workers, this process and resident images give the same references and batches."""
    seen = []
    for workers, resident in ((0, False), (2, False), (0, True)):
        data = ImageDataModule(
            Store(str(store.path)),
            global_batch=6,
            num_workers=workers,
            resident=resident,
            flip=True,
        )
        data.prepare_data()
        trainer = SimpleNamespace(
            world_size=1,
            global_rank=0,
            accumulate_grad_batches=1,
            strategy=SimpleNamespace(root_device=CPU),
            lightning_module=SimpleNamespace(position=0),
        )
        data.trainer = trainer
        data.setup()
        data.use_references(ReferenceSet(n=5), skip=True)
        batches = []
        for raw, _ in zip(data.train_dataloader(), range(3), strict=False):
            assert (len(raw.references.images) == 0) == resident
            batches.append(data.on_after_batch_transfer(raw, 0))
            trainer.lightning_module.position += 6
        seen.append(batches)
    for batches in seen[1:]:
        for a, b in zip(seen[0], batches, strict=True):
            assert torch.equal(a.x0, b.x0)
            assert a.references.layout.parts == b.references.layout.parts
            assert torch.equal(a.references.layout.rows, b.references.layout.rows)
            for x, y in zip(a.references[:-1], b.references[:-1], strict=True):
                assert (x is None and y is None) or torch.equal(x, y)


@pytest.mark.parametrize("resident", [False, True])
def test_what_stays_on_the_device_is_counted(store, resident):
    data = ImageDataModule(Store(str(store.path)), global_batch=6, resident=resident, flip=True)
    data.setup()
    images = store.images.nbytes
    assert data.held_bytes == images * resident
    data.use_references(ReferenceSet(), skip=False)
    assert data.held_bytes == images * (resident + 2 * 4)  # mirrored ones too, as floats


def test_mirrored_images_count_on(store):
    references = bank(store, flip=True)(torch.tensor([0]), 0, CPU)
    by_class = [*range(0, 60, 3), *range(1, 60, 3), *range(2, 60, 3)]
    assert references.index.tolist() == by_class
    assert references.labels.tolist() == store.labels[np.array(by_class) % 30].tolist()
    images = references.images[np.argsort(by_class)]
    assert torch.equal(images[30:], images[:30].flip(-1))


def test_resident_images_are_used(store):
    resident = torch.from_numpy(store.images.copy())
    a = bank(store)(torch.tensor([0]), 0, CPU, resident)
    assert torch.equal(a.images, to_float(resident[a.index]))


@pytest.mark.parametrize("conditional", [False, True])
def test_announced_references_are_those_of_the_store(store, conditional):
    labels, resident = torch.tensor([2, 0, 2]), torch.from_numpy(store.images.copy())
    subsets = bank(store, ReferenceSet(n=5), conditional, flip=True)
    announced = subsets.announce(labels, 12)
    assert not len(announced.images)
    for a, b in zip(subsets.fill(announced, resident), subsets(labels, 12, CPU), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("conditional", [False, True])
def test_nearest_distances(store, conditional, flip):
    found = nearest_distances(store, conditional, flip, CPU, chunk=7)
    x = torch.from_numpy(store.images.copy()).double() / 127.5 - 1
    candidates = torch.cat([x, x.flip(-1)]) if flip else x
    squares = (x.flatten(1)[:, None] - candidates.flatten(1)).square().sum(2)
    squares[squares == 0] = torch.inf
    if conditional:
        labels = torch.from_numpy(store.labels).repeat(2 if flip else 1)
        squares[labels[:30, None] != labels] = torch.inf
    torch.testing.assert_close(found.double(), squares.min(1).values.sqrt(), rtol=1e-5, atol=0)
    kept = sorted(path.name for path in store.path.glob("nearest*.npy"))
    assert len(kept) == 1
    np.save(store.path / kept[0], np.full(30, 7, np.float32))
    assert nearest_distances(store, conditional, flip, CPU).tolist() == [7] * 30  # read, not made


def test_an_image_alone_in_its_class_is_infinitely_far(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 2, 2, 1), dtype=np.uint8)
    store = write_store(
        tmp_path / "s", images, np.array([0, 0, 0, 1]), source={}, transform=Resize()
    )
    assert nearest_distances(store, True, False, CPU)[3] == torch.inf


@pytest.mark.parametrize(
    ("spec", "conditional", "message"),
    [
        (ReferenceSet(n=31), False, "asks for 31 references per image and the data have only 30"),
        (ReferenceSet(n=11), True, "label 0 has only 10"),
    ],
)
def test_fewer_references_than_asked_for(store, spec, conditional, message):
    with pytest.raises(InputError, match=message):
        bank(store, spec, conditional)


def test_a_label_without_images(tmp_path):
    images = np.zeros((3, 2, 2, 1), np.uint8)
    labels = np.array([0, 2, 2])
    store = write_store(tmp_path / "s", images, labels, source={}, transform=Resize())
    with pytest.raises(InputError, match="label 1 has only 0"):
        bank(store)


@pytest.mark.parametrize(
    "arguments", [{"n": 0}, {"source": "batch", "n": 4}, {"source": "bank", "gather": True}]
)
def test_bad_arguments_are_named(arguments):
    with pytest.raises(InputError, match="references"):
        ReferenceSet(**arguments)
