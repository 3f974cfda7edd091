"""The store: atomic, fingerprinted, cheap to open, and honest about damage."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch

from cm_lightning.data import ImageStore, Resize, to_float, write_store
from cm_lightning.types import InputError


def make(path, images=None, labels=None, transform=None, labelled=True):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 6, 6, 3), dtype=np.uint8) if images is None else images
    if labelled and labels is None:
        labels = np.arange(len(images)) % 4
    return write_store(
        path, images, labels, source={"source": "test"}, transform=transform or Resize()
    )


def test_round_trip(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (30, 6, 6, 3), dtype=np.uint8)
    store = make(tmp_path / "s", images)
    assert len(store) == 30
    assert store.image_shape == (3, 6, 6)
    assert store.num_classes == 4
    got, labels = store[np.array([3, 0, 29])]
    assert torch.equal(got, torch.from_numpy(images[[3, 0, 29]]).permute(0, 3, 1, 2))
    assert labels.tolist() == [3, 0, 1]
    store.verify()
    assert isinstance(store.images, np.memmap)


def test_grey_levels_to_unit_range():
    x = to_float(torch.tensor([0, 255], dtype=torch.uint8))
    assert x.tolist() == [-1.0, 1.0]


def test_fingerprint_follows_pixels_labels_and_shape(tmp_path):
    images = np.zeros((8, 4, 4, 1), np.uint8)
    other = images.copy()
    other[7, 3, 3, 0] = 1
    prints = {
        make(tmp_path / "a", images).fingerprint,
        make(tmp_path / "b", other).fingerprint,
        make(tmp_path / "c", images, labels=np.zeros(8, np.int64)).fingerprint,
        make(tmp_path / "d", images, labelled=False).fingerprint,
        make(tmp_path / "e", images, transform=Resize(8)).fingerprint,
    }
    assert len(prints) == 5
    assert make(tmp_path / "f", images).fingerprint == make(tmp_path / "a2", images).fingerprint


def test_a_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(np, "save", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(InputError, match="disk full"):
        make(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_second_writer_gets_the_first_store(tmp_path):
    first = make(tmp_path / "s")
    assert make(tmp_path / "s").fingerprint == first.fingerprint
    with pytest.raises(InputError, match="already holds other data"):
        make(tmp_path / "s", images=np.ones((5, 6, 6, 3), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["s"]


def test_damage_is_seen(tmp_path):
    make(tmp_path / "s")
    path = tmp_path / "s" / "images.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="damaged"):
        ImageStore(tmp_path / "s")
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(InputError, match="fingerprint"):
        ImageStore(tmp_path / "s").verify()
    (tmp_path / "s" / "store.json").write_text("{")
    with pytest.raises(InputError, match=r"store\.json"):
        ImageStore(tmp_path / "s")
    with pytest.raises(InputError, match="no image store"):
        ImageStore(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (np.zeros((0, 4, 4, 1), np.uint8), None, "no images"),
        (np.zeros((3, 4, 4, 1), np.uint8), np.zeros(2, np.int64), "labels of shape"),
        (np.zeros((3, 4, 4, 1), np.uint8), np.array([0, 1, -1]), "smallest -1"),
    ],
)
def test_bad_content_is_refused(tmp_path, images, labels, words):
    with pytest.raises(InputError, match=words):
        make(tmp_path / "s", images, labels, labelled=False)
    assert not (tmp_path / "s").exists()


def test_pickled_without_the_data(tmp_path):
    store = make(tmp_path / "s", np.zeros((2000, 16, 16, 3), np.uint8))
    data = pickle.dumps(store)
    assert len(data) < 100_000
    assert torch.equal(pickle.loads(data)[np.array([5])][0], store[np.array([5])][0])


def test_padding_is_centred():
    images = np.full((2, 3, 4, 1), 9, np.uint8)
    out = Resize(6, "pad", fill=1)(images)
    assert out.shape == (2, 6, 6, 1)
    assert (out[:, 1:4, 1:5] == 9).all()
    assert out.sum() == 2 * (12 * 9 + 24)


def test_resizing_is_antialiased():
    board = np.indices((8, 8)).sum(0) % 2 * 255
    out = Resize(4, "resize")(board[None, ..., None].astype(np.uint8))
    assert out.shape == (1, 4, 4, 1)
    assert abs(int(out.mean()) - 127) < 12
    assert out.std() < 40


@pytest.mark.parametrize(
    ("transform", "words"), [(Resize(), "not square"), (Resize(3), "cannot be padded")]
)
def test_images_that_do_not_fit(transform, words):
    with pytest.raises(InputError, match=words):
        transform(np.zeros((1, 4, 6, 1), np.uint8))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((0,), "resolution"),
        ((8, "crop"), "got 'crop'"),
        ((8, "pad", 256), "fill"),
    ],
)
def test_transforms_that_do_not_exist(options, words):
    with pytest.raises(InputError, match=words):
        Resize(*options)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_files_that_are_no_arrays(tmp_path, content):
    make(tmp_path / "s")
    (tmp_path / "s" / "images.npy").write_bytes(content)
    with pytest.raises(InputError, match=r"delete .* to rebuild"):
        ImageStore(tmp_path / "s")


def test_images_of_another_shape(tmp_path):
    make(tmp_path / "s")
    np.save(tmp_path / "s" / "images.npy", np.zeros((30, 3, 5, 5), np.uint8))
    with pytest.raises(InputError, match=r"images\.npy is not what store\.json describes"):
        ImageStore(tmp_path / "s")


def test_labels_are_integers(tmp_path):
    make(tmp_path / "s")
    np.save(tmp_path / "s" / "labels.npy", np.zeros(30))
    with pytest.raises(InputError, match=r"labels\.npy is not what store\.json describes"):
        ImageStore(tmp_path / "s")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match=r"set data\.cache"):
        make(tmp_path / "file" / "s")


def test_reading_ahead_changes_nothing(tmp_path, monkeypatch):
    import copy
    import os
    import pickle

    from cm_lightning.data import store as module

    images = np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), dtype=np.uint8)
    store = write_store(tmp_path / "s", images, None, source={}, transform=Resize())
    index = np.array([3, 49, 3, 0])
    plain = store.read(index)
    asked = []
    real = os.posix_fadvise
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(os, "posix_fadvise", lambda *a: asked.append(a[1:3]) or real(*a))
    for other in (store, pickle.loads(pickle.dumps(store)), copy.copy(store)):
        assert np.array_equal(other.read(index), plain)
    header = (tmp_path / "s" / "images.npy").stat().st_size - images.nbytes
    assert asked == [(header + 192 * row, 192) for row in index] * 3
    assert np.array_equal(plain, images[index].transpose(0, 3, 1, 2))
