"""Damaged images in every layout, and damaged stores."""

from __future__ import annotations

import gzip
import io
import pickle
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.data.test_convert import (
    make_adm,
    make_cifar,
    make_downsampled,
    make_edm,
    make_imagefolder,
    make_zip,
    png,
)
from tests.data.test_readers import write_idx
from tests.fuzz.damage import HARM, MUTATIONS, Evil, files_below, harm, mutate_file, one_of
from tests.fuzz.harness import ends_well, examples, refused, workplace

LAYOUTS = ("edm", "zip", "imagefolder", "cifar", "downsampled", "adm", "idx", "idx.gz", "flat")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory) -> dict[str, Path]:
    """A few images in every layout."""
    root, rng = tmp_path_factory.mktemp("layouts"), np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)
    labels = rng.permutation(30) % 3
    few = images[:3], labels[:3]
    found = {
        "edm": make_edm(root / "edm", *few),
        "zip": shutil.move(make_zip(root / "zip", *few), root / "z.zip"),
        "imagefolder": make_imagefolder(root / "classes", *few),
        "cifar": make_cifar(root / "cifar", images, labels),
        "downsampled": make_downsampled(root / "down", images, labels),
        "adm": make_adm(root / "adm", *few),
        "idx": root / "idx",
        "idx.gz": root / "idxgz",
        "flat": root / "flat",
    }
    write_idx(found["idx"])
    write_idx(found["idx.gz"], zipped=True)
    for i, image in enumerate(few[0]):
        png(found["flat"] / f"{i}.png", image)
    return found


@examples(60)
@given(
    st.sampled_from(LAYOUTS),
    st.integers(0, 99),
    HARM,
    st.sampled_from(["", "none", "resize", "skip"]),
)
def test_convert_of_damaged_bytes(layouts, layout, number, damage, option):
    words = {
        "": [],
        "none": ["--kind", one_of(["edm", "adm", "idx", "cifar", "downsampled", "flat"], number)],
        "resize": ["--transform", "resize", "--resolution", 8, "--channels", 1],
        "skip": ["--skip_corrupt"],
    }[option]
    with workplace(layouts[layout]) as folder:
        source = folder / layouts[layout].name
        harm(one_of(files_below(source), number), damage)
        ends_well(folder, "cm-data", "convert", source.name, "--out", "out", *words)


@examples(24)
@given(st.integers(0, 99), st.one_of(HARM, MUTATIONS), st.sampled_from(["inspect", "stats", "fit"]))
def test_damaged_stores(store, run, number, damage, command):
    with workplace(store) as folder:
        place = one_of(files_below(folder / "store"), number)
        if isinstance(damage, tuple):
            harm(place, damage)
        else:
            mutate_file(folder / "store" / "store.json", damage)
        words = {
            "inspect": ["cm-data", "inspect", "store", "--verify", "--grid", "out/grid.png"],
            "stats": [
                "cm-data",
                "stats",
                "store",
                "--features",
                "DigitsFeatures",
                "--out",
                "out/x.npz",
            ],
            "fit": [
                *["cm-fit", "--config", run / "config.yaml", "--check", "--run_dir", "none"],
                *["--data.source", "Store", "--data.source.path", "store"],
            ],
        }[command]
        ends_well(folder, *words)


@examples(12)
@given(st.integers(0, 99), st.one_of(HARM, MUTATIONS))
@example(0, ("head", 1.0, 123))  # numpy lets an error of Python's tokenizer through
def test_damaged_beginnings_of_a_conversion(layouts, number, damage):
    with workplace(layouts["flat"]) as folder:
        (folder / "flat" / "1.png").write_bytes(b"no picture")
        words = ["cm-data", "convert", "flat", "--out", "out"]
        refused(folder, *words)
        begun = folder / ".out.partial"
        if isinstance(damage, tuple):
            harm(one_of(files_below(begun), number), damage)
        else:
            mutate_file(begun / "progress.json", damage)
        done = ends_well(folder, *words, "--skip_corrupt", outputs=("out", ".out.partial"))
        if not done.code:
            images = np.load(folder / "out" / "images.npy")
            assert images.shape == (2, 3, 32, 32)


def deflated(name: str, content: bytes) -> bytes:
    """A zip of one compressed member."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return file.getvalue()


def npz(**arrays: object) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return file.getvalue()


def bomb_png(side: int) -> bytes:
    """A picture of a few kilobytes that claims side x side pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


def npy_header(shape: str, descr: str = "|u1") -> bytes:
    """A header alone, of any claim."""
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (64 - (len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


U8, ZEROS = np.uint8, bytes(300 << 20)
HOSTILE = {
    "x.zip": {
        "bomb": lambda: deflated("dataset.json", ZEROS),
        "picture bomb": lambda: deflated("a.png", ZEROS),
        "upwards": lambda: deflated("../../canary.png", b"x"),
        "absolute": lambda: deflated("/canary.png", b"x"),
        "labels of a list": lambda: deflated("dataset.json", b"[1]"),
        "no pairs": lambda: deflated("dataset.json", b'{"labels": [[1, 2, 3]]}'),
        "endless label": lambda: deflated("dataset.json", b'{"labels": [["a.png", 1e999]]}'),
        "nested": lambda: deflated("dataset.json", b"[" * 100_000),
        "latin-1": lambda: deflated("dataset.json", b"\xff\xfe"),
        "empty": lambda: b"PK\x05\x06" + bytes(18),
    },
    "x.npz": {
        "objects": lambda: npz(arr_0=np.array([Evil()], dtype=object)),
        "floats": lambda: npz(arr_0=np.zeros((2, 4, 4, 3))),
        "no pixels": lambda: npz(arr_0=np.zeros((2, 0, 0, 3), U8)),
        "no images": lambda: npz(arr_0=np.zeros((0, 4, 4, 3), U8)),
        "oblong": lambda: npz(arr_0=np.zeros((2, 4, 5, 3), U8)),
        "fewer labels": lambda: npz(arr_0=np.zeros((2, 4, 4, 3), U8), arr_1=np.zeros(1, int)),
        "text labels": lambda: npz(arr_0=np.zeros((2, 4, 4, 3), U8), arr_1=np.array(["a", "b"])),
        "nan labels": lambda: npz(arr_0=np.zeros((2, 4, 4, 3), U8), arr_1=np.full(2, np.nan)),
        "huge labels": lambda: npz(arr_0=np.zeros((2, 4, 4, 3), U8), arr_1=np.full(2, 2**40)),
        "negative labels": lambda: npz(arr_0=np.zeros((2, 4, 4, 3), U8), arr_1=np.full(2, -1)),
        "other": lambda: npz(x=np.zeros(3)),
        "bomb": lambda: npz(arr_0=np.zeros((400, 512, 512, 3), U8)),
        "claims": lambda: deflated("arr_0.npy", npy_header("(9999999, 999, 999, 3)")),
        "negative": lambda: deflated("arr_0.npy", npy_header("(-1, 4, 4, 3)")),
        "header": lambda: deflated("arr_0.npy", b"\x93NUMPY\x03\x00\xff\xff\xff\xff"),
        "no array": lambda: deflated("arr_0.npy", b"hello"),
        "no labels": lambda: npz(data=np.zeros((2, 12), U8)),
        "not square": lambda: npz(data=np.zeros((2, 13), U8), labels=np.ones(2, int)),
    },
    "x/a.png": {
        "text": lambda: b"not a picture",
        "bomb": lambda: bomb_png(50_000),
        "large": lambda: bomb_png(12_000),
        "no size": lambda: bomb_png(0),
    },
    "x/train-images-idx3-ubyte": {
        "claims": lambda: b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2**31, 2**31),
        "dimensions": lambda: b"\0\0\x08\xff" + bytes(1020),
        "flat": lambda: b"\0\0\x08\x01" + struct.pack(">I", 4) + bytes(4),
    },
    "x/train-images-idx3-ubyte.gz": {
        "bomb": lambda: gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 1, 2, 2) + ZEROS),
        "claims": lambda: gzip.compress(b"\0\0\x08\x03" + struct.pack(">III", 2**31, 2, 2) + ZEROS),
    },
    "x/data_batch_1": {
        "evil": lambda: pickle.dumps({"data": Evil(), "labels": [1]}),
        "rows": lambda: pickle.dumps({"data": np.zeros((2, 4), U8), "labels": [1, 2]}),
        "labels": lambda: pickle.dumps({"data": np.zeros((2, 3072), U8), "labels": ["a", "b"]}),
        "fewer": lambda: pickle.dumps({"data": np.zeros((2, 3072), U8), "labels": [1]}),
        "number": lambda: pickle.dumps({"data": np.zeros((2, 3072), U8), "labels": 3}),
        "claims": lambda: b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\x7fB\xff\xff\xff\x7f",
    },
    "x/dataset.json": {
        "nothing": lambda: b"null",
        "list": lambda: b'{"labels": [1, 2]}',
        "texts": lambda: b'{"labels": [["a.png", "b"]]}',
        "huge": lambda: b'{"labels": [["a.png", 1e300]]}',
        "digits": lambda: b'{"labels": [["a.png", ' + b"9" * 5000 + b"]]}",
    },
}
CASES = [(name, case) for name, cases in HOSTILE.items() for case in cases]


@pytest.mark.parametrize(("name", "case"), CASES, ids=lambda value: value.split("/")[-1])
def test_hostile_files(name, case, layouts):
    with workplace() as folder:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(HOSTILE[name][case]())
        if name == "x/dataset.json":
            shutil.copyfile(next(layouts["flat"].iterdir()), folder / "x" / "a.png")
        refused(folder, "cm-data", "convert", name.split("/")[0], "--out", "out")
