"""Sources: digits, IDX files of every kind, and what is said of damaged ones."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest

from cm_lightning.data import IDX, Digits, ImageDataModule, read_idx
from cm_lightning.types import InputError

KINDS = {0x08: np.dtype("u1"), 0x0D: np.dtype(">f4"), 0x0E: np.dtype(">f8")}


def idx_bytes(array: np.ndarray, code: int = 0x08) -> bytes:
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return header + array.astype(KINDS[code]).tobytes()


def write_idx(root, images=None, labels=None, zipped=False, code=0x08, prefix="train"):
    root.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 6)) if images is None else images
    labels = np.arange(20) % 3 if labels is None else labels
    for name, content in (
        (f"{prefix}-images-idx3-ubyte", idx_bytes(images, code)),
        (f"{prefix}-labels-idx1-ubyte", idx_bytes(labels)),
    ):
        path = root / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return images, labels


def test_digits_are_the_real_ones():
    images, labels = Digits().read()
    assert images.shape == (1797, 8, 8, 1)
    assert images.dtype == np.uint8
    assert sorted(set(labels)) == list(range(10))
    assert images.max() == 255
    from sklearn.datasets import load_digits

    assert np.abs(images[..., 0] / 255 * 16 - load_digits().images).max() < 0.04


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("prefix", ["train", "t10k"])
def test_idx_round_trip(tmp_path, zipped, prefix):
    images, labels = write_idx(tmp_path / "set", zipped=zipped, prefix=prefix)
    split = "train" if prefix == "train" else "test"
    got, got_labels = IDX(str(tmp_path / "set"), split=split).read()
    assert np.array_equal(got[..., 0], images)
    assert np.array_equal(got_labels, labels)


@pytest.mark.parametrize("code", [0x0D, 0x0E])
def test_float_files_are_scaled(tmp_path, code):
    images = np.linspace(0, 1, 20 * 36).reshape(20, 6, 6)
    write_idx(tmp_path / "set", images=images, code=code)
    got, _ = IDX(str(tmp_path / "set")).read()
    assert np.array_equal(got[..., 0], np.round(images * 255).astype(np.uint8))


def test_labels_are_optional(tmp_path):
    write_idx(tmp_path / "set")
    (tmp_path / "set" / "train-labels-idx1-ubyte").unlink()
    assert IDX(str(tmp_path / "set")).read()[1] is None


def test_identity_follows_the_content(tmp_path):
    write_idx(tmp_path / "a")
    write_idx(tmp_path / "b")
    a, b = (IDX(str(tmp_path / name)) for name in "ab")
    assert a.identity() == b.identity()
    write_idx(tmp_path / "b", labels=np.zeros(20))
    assert a.identity() != b.identity()


def break_file(root, change):
    path = root / "train-images-idx3-ubyte"
    path.write_bytes(change(path.read_bytes()))


def nan_images(root):
    images = np.full((20, 6, 6), 0.5)
    images[3, 1, 1] = np.nan
    write_idx(root, images=images, code=0x0D)


BAD = {
    "truncated": (lambda r: break_file(r, lambda b: b[:-1]), "truncated"),
    "trailing": (lambda r: break_file(r, lambda b: b + b"x"), "too long"),
    "header": (lambda r: break_file(r, lambda b: b[:7]), "truncated"),
    "magic": (lambda r: break_file(r, lambda b: b"\1" + b[1:]), "not an IDX file"),
    "empty": (lambda r: break_file(r, lambda b: b""), "not an IDX file"),
    "labels": (lambda r: write_idx(r, labels=np.arange(19)), "19"),
    "nan": (nan_images, "1 values that are NaN"),
    "range": (lambda r: write_idx(r, images=np.full((20, 6, 6), 2.0), code=0x0D), "in \\[0, 1\\]"),
    "no images": (
        lambda r: write_idx(r, images=np.zeros((0, 6, 6)), labels=np.zeros(0)),
        "no images",
    ),
    "flat": (lambda r: write_idx(r, images=np.zeros((20, 36))), "dimensions"),
    "no pixels": (lambda r: write_idx(r, images=np.zeros((20, 0, 0))), "no images"),
    "float labels": (
        lambda r: (r / "train-labels-idx1-ubyte").write_bytes(idx_bytes(np.ones(20), 0x0D)),
        "labels as bytes",
    ),
    "missing": (lambda r: (r / "train-images-idx3-ubyte").unlink(), "has no train-images"),
}


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_one_sentence_and_nothing_is_written(tmp_path, case):
    change, words = BAD[case]
    root, cache = tmp_path / "set", tmp_path / "cache"
    write_idx(root)
    change(root)
    data = ImageDataModule(IDX(str(root)), cache=str(cache))
    with pytest.raises(InputError, match=words) as error:
        data.prepare_data()
    assert str(error.value).endswith(".")
    assert not list(cache.rglob("*.npy"))


def test_corrupt_gzip_and_missing_folder(tmp_path):
    write_idx(tmp_path / "set", zipped=True)
    path = tmp_path / "set" / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        read_idx(path)
    with pytest.raises(InputError, match="no folder"):
        IDX(str(tmp_path / "nowhere")).read()


def test_download_is_refused_offline(tmp_path):
    with pytest.raises(InputError, match="CM_OFFLINE"):
        IDX(str(tmp_path), download=True).read()


def test_download_uses_what_torchvision_left(tmp_path):
    (tmp_path / "FashionMNIST").mkdir()
    write_idx(tmp_path / "FashionMNIST" / "raw")
    assert IDX(str(tmp_path), download=True).read()[0].shape == (20, 6, 6, 1)


def test_an_interrupted_download_is_taken_up_again(tmp_path, monkeypatch):
    import torchvision.datasets

    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    monkeypatch.delenv("CM_OFFLINE")
    monkeypatch.setattr(
        torchvision.datasets, "FashionMNIST", lambda root, download: write_idx(raw, zipped=True)
    )
    assert IDX(str(tmp_path), download=True).read()[0].shape == (20, 6, 6, 1)


def test_a_failed_download_is_one_sentence(tmp_path, monkeypatch):
    import torchvision.datasets

    def fail(root, download):
        raise RuntimeError("no\nnetwork.")

    monkeypatch.delenv("CM_OFFLINE")
    monkeypatch.setattr(torchvision.datasets, "FashionMNIST", fail)
    with pytest.raises(InputError, match=r"could not be downloaded to .*: no network\.$"):
        IDX(str(tmp_path), download=True).read()


def test_an_unknown_split_is_refused():
    with pytest.raises(InputError, match="must be one of train, test, got 'val'"):
        IDX("somewhere", split="val")
