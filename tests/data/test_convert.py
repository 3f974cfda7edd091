"""Every layout gives the same pixels and labels; kills, damage and full disks lose nothing."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cm_lightning.data import ImageStore, Transform, convert, open_images
from cm_lightning.data import convert as convert_module
from cm_lightning.types import InputError
from tests.data.test_readers import write_idx

NONE = Transform("none", None, None)
N = 30


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (N, 32, 32, 3), dtype=np.uint8), rng.permutation(N) % 3


def png(path: Path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def make_edm(root, images, labels):
    pairs = []
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        name = f"{i // 10:05d}/img{i:08d}.png"
        png(root / name, image)
        pairs.append([name, int(label)])
    (root / "dataset.json").write_text(json.dumps({"labels": pairs[::-1]}))
    return root


def make_zip(root, images, labels):
    folder = make_edm(root / "unpacked", images, labels)
    path = root / "data.zip"
    with zipfile.ZipFile(path, "w") as file:
        for item in sorted(folder.rglob("*")):
            if item.is_file():
                file.write(item, item.relative_to(folder).as_posix())
    return path


def make_imagefolder(root, images, labels):
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        png(root / f"n{label:04d}" / f"{i:04d}.PNG", image)
    return root


def make_cifar(root, images, labels):
    root.mkdir(parents=True)
    for part in range(3):
        rows = slice(10 * part, 10 * part + 10)
        data = images[rows].transpose(0, 3, 1, 2).reshape(10, -1)
        content = {"data": data, "labels": labels[rows].tolist(), "batch_label": "x"}
        (root / f"data_batch_{part + 1}").write_bytes(pickle.dumps(content, protocol=2))
    return root


def make_downsampled(root, images, labels):
    root.mkdir(parents=True)
    for part in range(2):
        rows = slice(15 * part, 15 * part + 15)
        data = images[rows].transpose(0, 3, 1, 2).reshape(15, -1)
        np.savez(root / f"train_data_batch_{part + 1}.npz", data=data, labels=labels[rows] + 1)
    np.savez(root / "val_data.npz", data=data, labels=labels[rows] + 1)  # not for training
    return root


def make_adm(root, images, labels):
    root.mkdir(parents=True)
    np.savez(root / "samples.npz", images, labels)
    return root / "samples.npz"


MAKERS = {
    "edm folder": make_edm,
    "edm zip": make_zip,
    "imagefolder": make_imagefolder,
    "cifar": make_cifar,
    "downsampled": make_downsampled,
    "adm": make_adm,
}


@pytest.mark.parametrize("maker", MAKERS)
def test_every_layout_gives_the_same_pixels_and_labels(maker, pictures, program, tmp_path):
    images, labels = pictures
    source = MAKERS[maker](tmp_path / "in", images, labels)
    done = program("cm-data", "convert", source, "--out", tmp_path / "store")
    assert done.code == 0, done.err
    store = ImageStore(tmp_path / "store")
    store.verify()
    expected, classes = images, labels
    if maker == "imagefolder":  # in the order of its folders
        order = np.argsort(labels, kind="stable")
        expected, classes = images[order], labels[order]
    if maker == "downsampled":  # kit fox, English setter and Siberian husky among the 1,000
        classes = np.array([278, 212, 250])[labels]
    assert np.array_equal(store.images, expected.transpose(0, 3, 1, 2))
    assert np.array_equal(store.labels, classes)
    assert store.num_classes == classes.max() + 1
    assert ("another distribution" in done.out) == (maker == "downsampled")


def test_idx_and_folders_without_labels(pictures, tmp_path):
    images, labels = pictures
    write_idx(tmp_path / "idx", images=images[..., 0], labels=labels)
    store = convert(open_images(tmp_path / "idx"), tmp_path / "a", NONE)
    assert np.array_equal(store.images[:, 0], images[..., 0])
    assert np.array_equal(store.labels, labels)
    for i, image in enumerate(images):
        png(tmp_path / "flat" / f"{i:03d}.png", image)
    store = convert(open_images(tmp_path / "flat"), tmp_path / "b", NONE)
    assert store.labels is None
    assert np.array_equal(store.images, images.transpose(0, 3, 1, 2))


def test_edm_without_labels(pictures, tmp_path):
    source = make_edm(tmp_path / "in", *pictures)
    (source / "dataset.json").write_text('{"labels": null}')
    assert open_images(source).labels is None


def test_workers_and_chunks_give_the_same_store(pictures, tmp_path, monkeypatch):
    source = make_imagefolder(tmp_path / "in", *pictures)
    one = convert(open_images(source), tmp_path / "one", NONE)
    monkeypatch.setattr(convert_module_of(), "CHUNK", 7)
    two = convert(open_images(source), tmp_path / "two", NONE, workers=2)
    assert one.fingerprint == two.fingerprint
    assert (tmp_path / "one" / "images.npy").read_bytes() == (
        tmp_path / "two" / "images.npy"
    ).read_bytes()


def convert_module_of():
    import importlib

    assert callable(convert_module)
    return importlib.import_module("cm_lightning.data.convert")


@pytest.mark.parametrize("transform", ["center-crop", "center-crop-dhariwal", "pad", "resize"])
def test_transforms(transform, tmp_path):
    rng = np.random.default_rng(1)
    shapes = (
        [(40, 60), (33, 32), (16, 20)] if transform == "pad" else [(40, 60), (90, 33), (64, 64)]
    )
    size = 64 if transform == "pad" else 16
    originals = []
    for i, (height, width) in enumerate(shapes):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))
        originals.append(smooth)
        png(tmp_path / "in" / f"{i}.png", smooth)
    store = convert(
        open_images(tmp_path / "in"), tmp_path / "out", Transform(transform, size, None)
    )
    assert store.image_shape == (3, size, size)
    for original, stored in zip(originals, store.images, strict=True):
        assert np.abs(by_hand(transform, original, size) - stored.transpose(1, 2, 0)).max() <= 1


def by_hand(transform, image, size):
    """The same in other words: torchvision's crops, PIL's filters by name."""
    from torchvision.transforms import functional

    picture = Image.fromarray(image)
    width, height = picture.size
    if transform == "resize":
        return np.asarray(picture.resize((size, size), Image.BICUBIC)).astype(int)
    if transform == "pad":
        canvas = Image.new("RGB", (size, size))
        canvas.paste(picture, ((size - width) // 2, (size - height) // 2))
        return np.asarray(canvas).astype(int)
    if transform == "center-crop":
        side = min(width, height)
        box = ((width - side) // 2, (height - side) // 2)
        square = picture.crop((*box, box[0] + side, box[1] + side))
        return np.asarray(square.resize((size, size), Image.LANCZOS)).astype(int)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.size[0] // 2, picture.size[1] // 2), Image.BOX)
    scale = size / min(picture.size)
    new = tuple(round(side * scale) for side in picture.size)
    picture = picture.resize(new, Image.BICUBIC)
    top, left = (new[1] - size) // 2, (new[0] - size) // 2
    return np.asarray(functional.crop(picture, top, left, size, size)).astype(int)


def test_other_preprocessing_has_another_fingerprint(pictures, tmp_path):
    source = make_edm(tmp_path / "in", *pictures)
    found = {
        convert(open_images(source), tmp_path / mode, Transform(mode, 16, None)).fingerprint
        for mode in ("center-crop", "center-crop-dhariwal", "resize")
    }
    assert len(found) == 3
    grey = convert(open_images(source), tmp_path / "grey", Transform("none", None, 1))
    assert grey.image_shape == (1, 32, 32)


def test_a_killed_conversion_continues_to_the_same_file(pictures, tmp_path, monkeypatch):
    module = convert_module_of()
    monkeypatch.setattr(module, "CHUNK", 4)
    source = make_imagefolder(tmp_path / "in", *pictures)
    whole = convert(open_images(source), tmp_path / "whole", NONE)
    real, count = module._work, []

    def dies(rows, *arguments):
        count.append(rows)
        if len(count) == 4:
            raise KeyboardInterrupt
        return real(rows, *arguments)

    monkeypatch.setattr(module, "_work", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(open_images(source), tmp_path / "parts", NONE)
    assert not (tmp_path / "parts").exists()
    (tmp_path / ".parts.partial/.images.0.npy").touch()  # half written when it was killed
    seen = []
    parts = convert(open_images(source), tmp_path / "parts", NONE, say=seen.append)
    assert seen == [f"Continuing at image 12 of {N}."]
    chunks = [rows.start for rows in count[3:] if len(rows) > 1]  # single ones are looked at again
    assert chunks == list(range(12, N, 4))[:1] + list(range(12, N, 4))
    assert parts.fingerprint == whole.fingerprint
    assert (tmp_path / "whole/images.npy").read_bytes() == (
        tmp_path / "parts/images.npy"
    ).read_bytes()
    assert not list(tmp_path.glob("**/.*"))


def test_the_beginning_of_another_conversion_is_not_mixed_in(pictures, tmp_path, monkeypatch):
    module = convert_module_of()
    monkeypatch.setattr(module, "CHUNK", 4)
    source = make_imagefolder(tmp_path / "in", *pictures)
    monkeypatch.setattr(module._Job, "finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(open_images(source), tmp_path / "out", NONE)
    with pytest.raises(InputError, match="beginning of another conversion"):
        convert(open_images(source), tmp_path / "out", Transform("resize", 8, None))
    with pytest.raises(InputError, match="beginning of another conversion"):  # of larger images
        convert(open_images(source), tmp_path / "out", Transform("resize", 64, None))


def test_other_images_of_the_same_names_are_not_mixed_in(pictures, tmp_path, monkeypatch):
    module = convert_module_of()
    monkeypatch.setattr(module, "CHUNK", 4)
    images, labels = pictures
    real, count = module._work, []

    def dies(*arguments):
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(module, "_work", dies)
    with pytest.raises(KeyboardInterrupt):
        convert(open_images(make_adm(tmp_path / "a", images, labels)), tmp_path / "out", NONE)
    other = make_adm(tmp_path / "b", 255 - images, labels)
    with pytest.raises(InputError, match="beginning of a conversion of other images"):
        convert(open_images(other), tmp_path / "out", NONE)
    store = convert(open_images(tmp_path / "a/samples.npz"), tmp_path / "out", NONE)
    assert np.array_equal(store.images, images.transpose(0, 3, 1, 2))


def test_repaired_images_are_read_again(pictures, program, tmp_path):
    images, labels = pictures
    source = make_imagefolder(tmp_path / "in", images, labels)
    path = min(path for path in source.rglob("*") if path.is_file())
    whole = path.read_bytes()
    path.write_bytes(whole[:60])
    words = ["cm-data", "convert", source, "--out", tmp_path / "out"]
    assert "1 of 30 images cannot be read" in program(*words).err
    path.write_bytes(whole)
    done = program(*words)
    assert done.code == 0, done.err
    store = ImageStore(tmp_path / "out")
    order = np.argsort(labels, kind="stable")
    assert np.array_equal(store.images, images[order].transpose(0, 3, 1, 2))


def test_names_of_classes_are_kept(pictures, program, tmp_path):
    source = make_imagefolder(tmp_path / "in", *pictures)
    names = sorted(folder.name for folder in source.iterdir())
    store = convert(open_images(source), tmp_path / "out", NONE)
    assert store.info["classes"] == names
    shown = ", ".join(f"{label} {name}" for label, name in enumerate(names))
    assert f"names        {shown}\n" in program("cm-data", "inspect", tmp_path / "out").out


def test_linked_folders_are_classes_too(pictures, tmp_path):
    source = make_imagefolder(tmp_path / "pool", *pictures)
    linked = tmp_path / "linked"
    linked.mkdir()
    for folder in source.iterdir():
        (linked / folder.name).symlink_to(folder)
    first = next(iter(sorted(source.iterdir())))
    (first / "back").symlink_to(source)  # leads back up: not followed
    found = open_images(linked)
    assert list(found.names) == list(open_images(source).names)
    assert len(found) == N


def test_pictures_of_sixteen_bits(tmp_path):
    from PIL import Image

    levels = np.arange(0, 65536, 1024, np.uint16).reshape(8, 8)
    (tmp_path / "deep").mkdir()
    Image.fromarray(levels).save(tmp_path / "deep" / "a.png")
    Image.fromarray(levels).save(tmp_path / "deep" / "b.tif")
    netpbm = b"P5 8 8 65535\n" + levels.astype(">u2").tobytes()
    (tmp_path / "deep" / "c.ppm").write_bytes(netpbm)
    store = convert(open_images(tmp_path / "deep"), tmp_path / "out", NONE)
    assert np.array_equal(store.images[:, 0], [levels >> 8] * 3)
    (tmp_path / "float").mkdir()
    Image.fromarray(levels.astype(np.float32) / 65536).save(tmp_path / "float" / "a.tif")
    with pytest.raises(InputError, match="None of the images can be read"):
        convert(open_images(tmp_path / "float"), tmp_path / "none", NONE)


def test_colour_after_a_grey_first_image_is_not_dropped(pictures, tmp_path):
    images, _ = pictures
    source = tmp_path / "in"
    png(source / "a.png", images[0, ..., 0])
    png(source / "b.png", images[1])
    message = r"b\.png has colour, and the first image, a\.png, is grey"
    with pytest.raises(InputError, match=message):
        convert(open_images(source), tmp_path / "out", NONE)
    for channels in (1, 3):
        transform = Transform("none", None, channels)
        store = convert(open_images(source), tmp_path / f"{channels}", transform)
        assert store.image_shape == (channels, 32, 32)
    (source / "a.png").rename(source / "c.png")  # grey among colour loses nothing
    store = convert(open_images(source), tmp_path / "again", NONE)
    assert store.image_shape == (3, 32, 32)
    assert np.array_equal(store.images[1], np.repeat(images[0, ..., 0][None], 3, 0))


def test_corrupt_files_are_named_and_left_out_on_request(pictures, program, tmp_path):
    images, labels = pictures
    source = make_edm(tmp_path / "in", images, labels)
    broken = ["00000/img00000003.png", "00002/img00000029.png"]
    (source / broken[0]).write_bytes(b"no picture")
    (source / broken[1]).write_bytes((source / broken[1]).read_bytes()[:60])
    words = ["cm-data", "convert", source, "--out", tmp_path / "out"]
    done = program(*words)
    assert done.code == 2
    assert f"2 of {N} images cannot be read" in done.err
    assert all(name in done.err for name in broken)
    assert not (tmp_path / "out").exists()
    done = program(*words, "--skip_corrupt")
    assert done.code == 0, done.err
    store = ImageStore(tmp_path / "out")
    kept = [i for i in range(N) if i not in (3, 29)]
    assert np.array_equal(store.images, images[kept].transpose(0, 3, 1, 2))
    assert np.array_equal(store.labels, labels[kept])
    store.verify()
    assert "left out     2 images" in program("cm-data", "inspect", tmp_path / "out").out


def test_a_full_disk_is_told_and_nothing_is_lost(pictures, program, tmp_path, monkeypatch):
    module = convert_module_of()
    monkeypatch.setattr(module, "CHUNK", 10)
    source = make_edm(tmp_path / "in", *pictures)
    real, calls = module._Job.add, []

    def full(self, rows, result):
        calls.append(rows)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, rows, result)

    monkeypatch.setattr(module._Job, "add", full)
    words = ["cm-data", "convert", source, "--out", tmp_path / "out"]
    done = program(*words)
    assert done.code == 2
    assert "is full after 10 of 30 images: make room and call again" in done.err
    assert not (tmp_path / "out").exists()
    assert program(*words).code == 0
    assert np.array_equal(ImageStore(tmp_path / "out").labels, pictures[1])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "does not exist"),
        (lambda root: root.mkdir(), "holds no images"),
        (lambda root: (root / "a").mkdir(parents=True), "holds no images"),
        (lambda root: root.write_text("x"), "neither a folder nor"),
        (lambda root: png(root / "x.png", np.zeros((4, 5, 3), np.uint8)), "is 4x5, not 4x4"),
        (
            lambda root: [png(root / f"{s}.png", np.zeros((s, s, 3), np.uint8)) for s in (4, 6)],
            "the images before it",
        ),
        (
            lambda root: [
                png(root / "a.png", np.zeros((4, 4, 3), np.uint8)),
                (root / "dataset.json").write_text('{"labels": [["b.png", 1]]}'),
            ],
            "no label for a.png",
        ),
        (
            lambda root: [
                png(root / "a.png", np.zeros((4, 4, 3), np.uint8)),
                (root / "dataset.json").write_text("{}"),
            ],
            "does not list pairs",
        ),
    ],
)
def test_bad_sources(make, message, program, tmp_path):
    make(tmp_path / "in")
    done = program("cm-data", "convert", tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "out").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("touch canary",)


def test_hostile_batches_are_refused(program, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "data_batch_1").write_bytes(pickle.dumps({"data": Evil(), "labels": [1]}))
    done = program("cm-data", "convert", tmp_path / "in", "--out", tmp_path / "out")
    assert done.code == 2
    assert "is no python batch of CIFAR" in done.err
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--transform", "pad"], "needs --resolution"),
        (["--resolution", "8"], "needs a --transform"),
        (["--resolution", "0", "--transform", "pad"], "--resolution: a whole number from 1"),
        (["--workers", "-1"], "--workers: a whole number from 0"),
        (["--transform", "pad", "--resolution", "16"], "cannot be padded"),
        (["--kind", "cifar"], "is not laid out as cifar"),
    ],
)
def test_bad_options(words, message, pictures, program, tmp_path):
    source = make_edm(tmp_path / "in", *pictures)
    done = program("cm-data", "convert", source, "--out", tmp_path / "out", *words)
    assert done.code == 2
    assert message in done.err
    assert program("cm-data", "convert", source, "--out", tmp_path).err.count("exists already") == 1


def test_inspect_and_stats(pictures, program, tmp_path):
    images, labels = pictures
    small = images[:, :8, :8, :1]
    source = make_adm(tmp_path / "in", small, labels)
    store = tmp_path / "store"
    assert program("cm-data", "convert", source, "--out", store).code == 0
    done = program("cm-data", "inspect", store, "--grid", tmp_path / "grid.png", "--verify")
    assert done.code == 0, done.err
    x = small / 127.5 - 1
    assert f"mean {x.mean():.4f}, standard deviation {x.std():.4f}" in done.out
    assert f"histogram    {', '.join(map(str, np.bincount(labels)))}" in done.out
    assert (tmp_path / "grid.png").is_file()
    out = tmp_path / "stats.npz"
    words = ["cm-data", "stats", store, "--features", "DigitsFeatures", "--out", out]
    assert program(*words).code == 0
    import torch

    from cm_lightning.evaluation import DigitsFeatures, load_statistics

    features = DigitsFeatures()(torch.from_numpy(ImageStore(store).images.copy())).double()
    mu, sigma = load_statistics(out)
    torch.testing.assert_close(mu, features.mean(0))
    torch.testing.assert_close(sigma, torch.cov(features.T))
    refused = program("cm-data", "stats", store, "--features", "os.system", "--out", out)
    assert "names the class 'os.system'" in refused.err


def test_training_on_a_store(pictures, program, tmp_path):
    from tests.cli.conftest import DIGITS, TINY

    images, labels = pictures
    source = make_adm(tmp_path / "in", images[:, :8, :8, :1], labels)
    store, run = tmp_path / "store", tmp_path / "run"
    words = ["--config", DIGITS, "--config", TINY, "--run_dir", run, "--model.total_kimg", 0.064]
    words += ["--data.source", "Store", "--data.source.path", store, "--fid.n", 6]
    words += ["--model.denoiser.backbone.label_dim", 3, "--data.global_batch", 16]
    words += ["--data.micro_batch", 16]
    missing = program("cm-fit", *words)
    assert missing.code == 2
    assert f"`cm-data convert SOURCE --out {store}` makes it" in missing.err
    assert program("cm-data", "convert", source, "--out", store).code == 0
    done = program("cm-fit", *words)
    assert done.code == 0, done.err
    record = json.loads((run / "run.json").read_text())
    assert record["data_fingerprint"] == ImageStore(store).fingerprint
    other = program("cm-fit", *words, "--data.resolution", 16, "--run_dir", tmp_path / "b")
    assert "has images of 8x8 and data.resolution is 16" in other.err
    config = run / "config.yaml"
    done = program("cm-data", "prefetch", "--config", config)
    assert "CM_OFFLINE is set" in done.err


def test_statistics_of_other_images_are_refused(pictures, program, tmp_path):
    from tests.cli.conftest import DIGITS, TINY

    images, labels = pictures
    source = make_adm(tmp_path / "in", images[:, :8, :8, :1], labels)
    store, stats = tmp_path / "store", tmp_path / "stats.npz"
    assert program("cm-data", "convert", source, "--out", store).code == 0
    words = ["cm-data", "stats", store, "--features", "DigitsFeatures", "--out", stats]
    assert program(*words).code == 0
    words = ["--config", DIGITS, "--config", TINY, "--model.total_kimg", 0.064]
    words += ["--fid.reference", stats, "--run_dir"]
    refused = program("cm-fit", *words, tmp_path / "a")
    assert refused.code == 2
    assert "was made from other images" in refused.err
    assert not (tmp_path / "a").exists()
    taken = program("cm-fit", *words, tmp_path / "b", "--fid.accept_reference", "true")
    assert taken.code == 0, taken.err
    own = ["--data.source", "Store", "--data.source.path", store, "--data.global_batch", 16]
    own += ["--model.denoiser.backbone.label_dim", 3, "--data.micro_batch", 16]
    done = program("cm-fit", *words, tmp_path / "c", *own)
    assert done.code == 0, done.err
    words = ["cm-eval", tmp_path / "b", "--n", 6, "--seeds", 0, "--sigmas", 80]
    assert "was made from other images" in program(*words).err
    assert program(*words, "--accept_reference").code == 0


def test_prefetch(pictures, program, tmp_path, monkeypatch):
    from tests.cli.conftest import DIGITS

    monkeypatch.delenv("CM_OFFLINE")
    done = program("cm-data", "prefetch", "--config", DIGITS)
    assert done.code == 0, done.err
    assert "features  digits" in done.out
    assert "1,797 images" in done.out


def test_a_zip_of_folders_is_unpacked_first(pictures, tmp_path):
    images, _ = pictures
    png(tmp_path / "in" / "cat" / "a.png", images[0])
    png(tmp_path / "in" / "dog" / "a.png", images[1])
    shutil.make_archive(str(tmp_path / "zipped"), "zip", tmp_path / "in")
    with pytest.raises(InputError, match=r"has folders and no dataset\.json, .*: unpack it"):
        open_images(tmp_path / "zipped.zip")
    with pytest.raises(InputError, match="is a file, and the layout imagefolder is a folder"):
        open_images(tmp_path / "zipped.zip", "imagefolder")
