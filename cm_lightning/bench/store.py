"""How fast images come out of a store."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cm_lightning.bench.common import Benchmark, spread
from cm_lightning.cli.study_report import table
from cm_lightning.data import ImageStore
from cm_lightning.evaluation import save_png
from cm_lightning.types import InputError

__all__ = ["BENCHMARKS", "add_store", "make_store"]


def store(options: argparse.Namespace) -> str:
    """How fast random batches come out of a store, against torchvision's ImageFolder.

    A store of random images is made in ``folder`` (kept for the next call). Each turn opens it
    anew. ``cold`` is after the system was told to forget the file, ``warm`` after every page used
    was read before; the memory is that of the first opening. The folder of PNG files holds the
    first ``files`` of the images; reading is single-threaded on both sides.

    Args:
        options: ``images``, ``resolution``, ``classes``, ``batch``, ``batches``, ``files``,
            ``repeats``, ``folder``.

    Returns:
        A Markdown table: time to open, memory it took, images per second, as median
        (smallest-largest).
    """
    path = Path(options.folder)
    make_store(path, (options.images, 3, options.resolution, options.resolution), options.classes)
    rng = np.random.default_rng(0)
    index = rng.integers(0, options.images, (options.batches, options.batch))
    ours = [_turn(path, index) for _ in range(options.repeats)]
    seconds, grown, cold, warm = zip(*ours, strict=True)
    opened, folder = ImageStore(path), path / "pictures"
    _make_pictures(folder, opened, options.files)
    from torchvision.datasets import ImageFolder
    from torchvision.transforms.functional import pil_to_tensor

    pictures, theirs = ImageFolder(str(folder), transform=pil_to_tensor), []
    for _ in range(options.repeats + 1):
        start = time.perf_counter()
        rows = rng.integers(0, len(pictures), options.batch * 4)
        torch.stack([pictures[int(row)][0] for row in rows])
        theirs.append(len(rows) / (time.perf_counter() - start))
    size = opened.images.nbytes / 2**30
    head = ["store", "to open, ms", "memory", "cold, images/s", "warm, images/s"]
    row = [
        f"{len(opened):,} images {opened.image_shape}, {size:.1f} GiB",
        spread(seconds),
        f"{grown[0] / 2**20:.0f} MiB",
        *(_rates(paces) for paces in (cold, warm, theirs[1:])),
    ]
    title = f"Batches of {options.batch} random images, {options.repeats} turns."
    return f"{title}\n\n{table([*head, 'ImageFolder of PNG, warm, images/s'], [row])}"


def make_store(path: Path, shape: tuple[int, ...], classes: int) -> None:
    """Write a store of random images, unless one of that shape is there.

    Args:
        path: Its folder.
        shape: ``(N, C, H, W)``.
        classes: Number of classes.

    Raises:
        InputError: If a store of another shape is there, or the disk has too little room.
    """
    if path.is_dir():
        if list(ImageStore(path).info["shape"]) != list(shape):
            raise InputError(f"{path} is a store of another shape: choose another --folder.")
        return
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    size, free = math.prod(shape), shutil.disk_usage(path.parent).free
    if size > free:
        raise InputError(
            f"A store of {size / 2**30:.1f} GiB needs more than the {free / 2**30:.1f} GiB free at "
            f"{path}: give fewer --images or another --folder."
        )
    partial.mkdir(exist_ok=True)
    if size >= 2**30:
        print(f"Writing {size / 2**30:.1f} GiB of random images to {path}, once.", file=sys.stderr)
    rng = np.random.default_rng(0)
    images = np.lib.format.open_memmap(partial / "images.npy", "w+", np.uint8, shape)
    for start in range(0, len(images), 4096):
        part = images[start : start + 4096]
        part[:] = np.frombuffer(rng.bytes(part.nbytes), np.uint8).reshape(part.shape)
    del images
    labels = rng.integers(0, classes, shape[0])
    np.save(partial / "labels.npy", labels)
    info = {"format": 1, "shape": shape, "num_classes": classes, "fingerprint": "random"}
    (partial / "store.json").write_text(json.dumps(info), encoding="utf-8")
    partial.rename(path)


def _make_pictures(folder: Path, images: ImageStore, count: int) -> None:
    if folder.is_dir():
        return
    for number in range(min(count, len(images))):
        picture = images.images[number].transpose(1, 2, 0)
        save_png(folder / f"class{number % 10}" / f"{number}.png", np.ascontiguousarray(picture))


def _turn(path: Path, index: npt.NDArray[np.int64]) -> tuple[float, float, float, float]:
    """Seconds to open a store, bytes of memory it took, images per second cold and warm."""
    _forget(path / "images.npy")  # which spares pages of a store that is open
    before, start = _resident(), time.perf_counter()
    opened = ImageStore(path)
    seconds, grown = time.perf_counter() - start, _resident() - before
    return seconds, grown, _pace(opened, index), _pace(opened, index)


def _rates(paces: Sequence[float]) -> str:
    """Images per second as median (smallest-largest)."""
    return f"{median(paces):,.0f} ({min(paces):,.0f}-{max(paces):,.0f})"


def _pace(images: ImageStore, index: npt.NDArray[np.int64]) -> float:
    start = time.perf_counter()
    for rows in index:
        images.read(rows)
    return index.size / (time.perf_counter() - start)


def _forget(path: Path) -> None:
    """Ask the system to drop a file from its page cache (Linux)."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _resident() -> float:
    """Resident memory of this process in bytes (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def add_store(add: Callable[..., Any]) -> None:
    """Add the options of :func:`make_store`.

    Args:
        add: The parser's ``add_argument``.
    """
    add("--images", type=int, default=1_281_167, help="[ImageNet's number, 15.7 GB at 64x64]")
    add("--resolution", type=int, default=64)
    add("--classes", type=int, default=1000)
    add("--folder", required=True, help="where the store is made, and kept")


def _store_options(add: Callable[..., Any]) -> None:
    add_store(add)
    add("--batch", type=int, default=256)
    add("--batches", type=int, default=50)
    add("--files", type=int, default=2000, help="PNG files for the comparison")
    add("--repeats", type=int, default=3, help="measured turns [3]")


BENCHMARKS = [Benchmark("store", "random batches from a store", _store_options, store)]
