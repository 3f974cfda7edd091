"""Details of stores and references that no other test would miss."""

from __future__ import annotations

import os

import numpy as np
import torch
from PIL import Image

from cm_lightning.callbacks.checkpoints import AtomicCheckpointIO
from cm_lightning.data.references import ReferenceBank, ReferenceSet, nearest_distances
from cm_lightning.data.store import Resize, compute_fingerprint, write_store
from cm_lightning.sampling import draw_labels

CPU = torch.device("cpu")


def test_few_samples_have_the_classes_of_sorted_data():
    stored = np.repeat(np.arange(10), 100)
    few = draw_labels(stored, range(100))
    assert len(few.unique()) == 10
    assert torch.equal(draw_labels(stored, range(1000)).sort().values, torch.from_numpy(stored))


def test_nearest_distances_of_other_settings_are_not_taken(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 4, 4, 1), dtype=np.uint8)
    store = write_store(tmp_path / "s", images, np.arange(30) % 3, source={}, transform=Resize())
    kinds = [(c, f) for c in (False, True) for f in (False, True)]
    first = {kind: nearest_distances(store, *kind, CPU, keep=False) for kind in kinds}
    for kind in kinds:
        assert torch.equal(nearest_distances(store, *kind, CPU), first[kind])


def test_resizing_is_pils_bicubic():
    image = np.random.default_rng(0).integers(0, 256, (1, 9, 9, 3), dtype=np.uint8)
    expected = Image.fromarray(image[0]).resize((4, 4), Image.Resampling.BICUBIC)
    assert np.array_equal(Resize(4, "resize")(image)[0], np.asarray(expected))


def test_the_fingerprint_knows_the_shape():
    pixels = np.arange(128, dtype=np.uint8)
    prints = {
        compute_fingerprint(pixels.reshape(shape), None) for shape in ((8, 1, 4, 4), (2, 1, 8, 8))
    }
    assert len(prints) == 2
    # and what is written in checkpoints and caches stays the same over versions
    assert compute_fingerprint(pixels.reshape(8, 1, 4, 4), np.arange(8)).startswith(
        "bda05ee91af05d2b"
    )


def test_subsets_of_classes_are_drawn_apart(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    store = write_store(
        tmp_path / "s", images, np.repeat([0, 1], 20), source={}, transform=Resize()
    )
    bank = ReferenceBank(store, ReferenceSet(n=6), True, False, 0)
    index = bank.choose(torch.tensor([0, 1]), 64)
    assert not np.array_equal(index[:5], index[5:] - 20)


def test_a_store_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync = [], os.fsync
    monkeypatch.setattr(
        os,
        "fsync",
        lambda fd: (done.append(os.readlink(f"/proc/self/fd/{fd}").rpartition("/")[2]), sync(fd)),
    )
    images = np.zeros((2, 4, 4, 1), np.uint8)
    write_store(tmp_path / "s", images, np.arange(2), source={}, transform=Resize())
    assert {"images.npy", "labels.npy", "store.json"} <= set(done)


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, sync, rename = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), rename(a, b)))
    AtomicCheckpointIO().save_checkpoint({"a": 1}, tmp_path / "x.ckpt")
    assert done == ["sync", "rename"]
