"""Conversion of any number of images into a store, chunk by chunk, resumable after a kill."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import signal
from collections import deque
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from cm_lightning.data.layouts import ImageFiles
from cm_lightning.data.store import FORMAT, ImageStore, compute_fingerprint
from cm_lightning.documents import check_form, one_line, read_mapping
from cm_lightning.files import replacing, write_json
from cm_lightning.types import InputError
from cm_lightning.version import __version__

__all__ = ["TRANSFORMS", "Transform", "convert"]

CHUNK = 512
"""Images between two records of progress."""

TRANSFORMS = {
    "none": "images have their size already",
    "center-crop": "largest centred square, then Lanczos, as EDM's tool",
    "center-crop-dhariwal": "ADM's, of all ImageNet-64 results of EDM, EDM2, ECT and SCT",
    "pad": "centred on black",
    "resize": "squashed, bicubic",
}


class Transform(NamedTuple):
    """How an image gets its size.

    Attributes:
        mode: ``"none"``: it must have it already; ``"center-crop"``: largest centred square, then
            Lanczos (EDM's dataset_tool); ``"center-crop-dhariwal"``: halved by averaging while it
            is twice too large, then bicubic to the shorter side, then the centre (ADM, and all
            ImageNet-64 results of EDM, EDM2, ECT and SCT); ``"pad"``: centred on black;
            ``"resize"``: squashed, bicubic.
        resolution: Height and width, ``None`` for that of the images.
        channels: 1, 3, or ``None`` for those of the first image: grey ones among colour are
            repeated, colour after a grey first one is an error.
    """

    mode: Literal["none", "center-crop", "center-crop-dhariwal", "pad", "resize"]
    resolution: int | None
    channels: int | None

    def __call__(self, image: npt.NDArray[np.uint8], name: str) -> npt.NDArray[np.uint8]:
        """Apply to ``(H, W, C)``; returns ``(C, R, R)``.

        Raises:
            InputError: If the image does not fit.
        """
        if self.channels == 1 and image.shape[2] == 3:
            image = np.asarray(_picture(image).convert("L"))[..., None]
        elif self.channels == 3 and image.shape[2] == 1:
            image = image.repeat(3, 2)
        height, width, _ = image.shape
        size = self.resolution or height
        if self.mode == "center-crop":
            image = _center_crop(image, size)
        elif self.mode == "center-crop-dhariwal":
            image = _center_crop_dhariwal(image, size)
        elif self.mode == "resize":
            image = _scaled(image, size, size, "BICUBIC")
        elif self.mode == "pad":
            if max(height, width) > size:
                raise InputError(f"{name} is {height}x{width} and cannot be padded to {size}.")
            top, left = (size - height) // 2, (size - width) // 2
            margins = ((top, size - height - top), (left, size - width - left), (0, 0))
            image = np.pad(image, margins)
        if image.shape[:2] != (size, size):
            raise InputError(
                f"{name} is {height}x{width}, not {size}x{size}: give --transform and --resolution."
            )
        return np.ascontiguousarray(image.transpose(2, 0, 1))


def _picture(image: npt.NDArray[np.uint8]) -> Any:
    from PIL import Image

    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)


def _scaled(
    image: npt.NDArray[np.uint8], height: int, width: int, filter_name: str
) -> npt.NDArray[np.uint8]:
    from PIL import Image

    if image.shape[:2] == (height, width):
        return image
    scaled = _picture(image).resize((width, height), getattr(Image.Resampling, filter_name))
    return np.asarray(scaled).reshape(height, width, -1)


def _centre(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]


def _center_crop(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    return _scaled(_centre(image, min(image.shape[:2])), size, size, "LANCZOS")


def _center_crop_dhariwal(image: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    while min(image.shape[:2]) >= 2 * size:
        image = _scaled(image, image.shape[0] // 2, image.shape[1] // 2, "BOX")
    scale = size / min(image.shape[:2])
    height, width = round(image.shape[0] * scale), round(image.shape[1] * scale)
    return _centre(_scaled(image, height, width, "BICUBIC"), size)


class _Result(NamedTuple):
    """A chunk: its images, and what was wrong with those that are missing (zeros)."""

    images: npt.NDArray[np.uint8]
    broken: dict[int, str]


_files: ImageFiles | None = None
"""The source, in a worker process."""


def _start_worker(files: ImageFiles) -> None:
    global _files
    _files = files
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits


def _work(
    rows: range, transform: Transform, shape: tuple[int, int, int], files: ImageFiles | None = None
) -> _Result:
    files = files or _files
    assert files is not None
    images = np.zeros((len(rows), *shape), np.uint8)
    broken = {}
    for place, row in enumerate(rows):
        try:
            image = files.load(row)
        except Exception as error:  # readers of damaged files raise whatever they stumble over
            broken[row] = f"{files.names[row]} ({type(error).__name__}: {error})"
            continue
        if shape[0] == 1 and transform.channels is None and image.shape[2] == 3:
            raise InputError(
                f"{files.names[row]} has colour, and the first image, {files.names[0]}, is grey: "
                "give --channels 1 or 3."
            )
        result = transform(image, files.names[row])
        if result.shape != shape:
            raise InputError(
                f"{files.names[row]} gives {result.shape} (channels, height, width), the images "
                f"before it {shape}: give --transform, --resolution or --channels."
            )
        images[place] = result
    return _Result(images, broken)


def convert(
    files: ImageFiles,
    out: str | Path,
    transform: Transform,
    *,
    workers: int = 0,
    skip_corrupt: bool = False,
    say: Callable[[str], None] = print,
) -> ImageStore:
    """Convert images into a store; it appears under its name whole or not at all.

    Work under way lies beside it, in ``.NAME.partial``; a later call with the same source and
    transform continues there.

    Args:
        files: The source.
        out: Folder to make.
        transform: How images get their size.
        workers: Processes that decode, 0 for this one.
        skip_corrupt: Leave out images that cannot be read; otherwise they are an error.
        say: Where notices go.

    Raises:
        InputError: If the folder exists, images do not fit or cannot be read, or the disk is full.
    """
    out = Path(out)
    if out.exists():
        raise InputError(f"{out} exists already: choose another --out, or delete it.")
    number, first = _first_good(files)
    channels = transform.channels or first.shape[2]
    asked, transform = transform, transform._replace(channels=channels)
    shape = (channels, *transform(first, files.names[number]).shape[1:])
    job = _Job(out, files, transform, shape)
    try:
        _fill(job, files, asked if channels == 1 else transform, shape, workers, say)
        if job.broken and not skip_corrupt:
            listed = "; ".join(list(job.broken.values())[:20])
            raise InputError(
                f"{len(job.broken)} of {len(files)} images cannot be read: {listed}. Repair them, "
                "or leave them out with --skip_corrupt; the rest is kept."
            )
        return job.finish(files, say)
    except InputError:
        job.undo()
        raise
    except OSError as error:
        job.undo()
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise InputError(
                f"The disk of {out} is full after {job.done:,} of {len(files):,} images: make "
                "room and call again, it continues."
            ) from error
        raise InputError(f"{out} cannot be written: {error.strerror or error}.") from error


def _first_good(files: ImageFiles) -> tuple[int, npt.NDArray[np.uint8]]:
    """Number and pixels of the first image that can be read."""
    for number in range(len(files)):
        try:
            return number, files.load(number)
        except Exception:  # noqa: S112  (named when its turn comes)
            continue
    raise InputError("None of the images can be read.")


def _fill(
    job: _Job,
    files: ImageFiles,
    transform: Transform,
    shape: tuple[int, int, int],
    workers: int,
    say: Callable[[str], None],
) -> None:
    from tqdm import tqdm

    if job.done:
        say(f"Continuing at image {job.done:,} of {len(files):,}.")
        job.check(lambda rows: _work(rows, transform, shape, files))
    todo = [range(i, min(i + CHUNK, len(files))) for i in range(job.done, len(files), CHUNK)]
    bar = tqdm(total=len(files), initial=job.done, desc="converting", unit="img", delay=1.0)
    with bar:
        if not workers:
            for rows in todo:
                job.add(rows, _work(rows, transform, shape, files))
                bar.update(len(rows))
            return
        with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (files,)) as pool:
            ahead = 2 * workers
            waiting = deque(pool.submit(_work, rows, transform, shape) for rows in todo[:ahead])
            for number, rows in enumerate(todo):
                job.add(rows, waiting.popleft().result())
                if number + ahead < len(todo):
                    waiting.append(pool.submit(_work, todo[number + ahead], transform, shape))
                bar.update(len(rows))


class _Job:
    """A store under way: ``images.npy`` and ``progress.json`` in ``.NAME.partial``."""

    def __init__(
        self, out: Path, files: ImageFiles, transform: Transform, shape: tuple[int, int, int]
    ) -> None:
        self.out, self.shape, self.n = out, shape, len(files)
        self.folder = out.with_name(f".{out.name}.partial")
        self.identity = {
            "library": __version__,
            "source": {"kind": files.kind, "images": self.n, "sha256": _hash_source(files)},
            "transform": transform._asdict(),
        }
        self.done, self.broken = 0, dict[int, str]()
        self.fresh = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "images.npy"
        progress = self.folder / "progress.json"
        if progress.is_file():
            found = self._begun(progress)
            if found["identity"] != self.identity:
                raise InputError(
                    f"{self.folder} holds the beginning of another conversion: delete it, or "
                    "choose another --out."
                )
            self.done = found["done"]
            self.broken = {int(row): text for row, text in found["broken"].items()}
            for left in self.folder.glob(".*"):  # half written when it was stopped
                left.unlink()
            return
        self.fresh = True
        with self.path.open("wb") as file:
            _write_header(file, (self.n, *shape))

    @property
    def row_bytes(self) -> int:
        """Size of an image."""
        return int(np.prod(self.shape))

    def _begun(self, progress: Path) -> dict[str, Any]:
        """The record of what was done before, which must be whole."""
        try:
            found = read_mapping(progress)
            check_form(found, {"identity": dict, "done": int, "broken": {...: str}}, str(progress))
            if found["identity"] != self.identity:
                return found
            with self.path.open("rb") as file:
                start = _header_length(file)
            size = self.path.stat().st_size
            rows = {-1, found["done"] - 1, *map(int, found["broken"])}
            whole = size >= start + found["done"] * self.row_bytes
            if not whole or min(rows) < -1 or max(rows) >= self.n:
                raise ValueError("images.npy is shorter than it says")
        except (InputError, OSError, ValueError) as error:
            raise InputError(
                f"{self.folder} holds a damaged beginning of a conversion ({one_line(error)}): "
                "delete it, or choose another --out."
            ) from error
        return found

    def undo(self) -> None:
        """Leave nothing behind where nothing was achieved."""
        if self.fresh and not self.done:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, rows: range, result: _Result) -> None:
        """Write a chunk, then the record of it."""
        self._write(rows.start, result.images)
        self.done = rows.stop
        self.broken |= result.broken
        write_json(
            self.folder / "progress.json",
            {"identity": self.identity, "done": self.done, "broken": self.broken},
        )

    def check(self, work: Callable[[range], _Result]) -> None:
        """Read some of the images again that are done, and all that could not be read.

        Raises:
            InputError: If they are no longer the same.
        """
        for row in np.unique(np.linspace(0, self.done - 1, 16).astype(int)).tolist():
            result = work(range(row, row + 1))
            if row not in self.broken and result.images.tobytes() != self._read(row):
                raise InputError(
                    f"{self.folder} holds the beginning of a conversion of other images: delete "
                    "it, or choose another --out."
                )
        for row in list(self.broken):
            result = work(range(row, row + 1))
            if not result.broken:
                self._write(row, result.images)
                del self.broken[row]

    def _read(self, row: int) -> bytes:
        """An image that was written."""
        with self.path.open("rb") as file:
            file.seek(_header_length(file) + row * self.row_bytes)
            return file.read(self.row_bytes)

    def _write(self, row: int, images: npt.NDArray[np.uint8]) -> None:
        """Write images to the disk, from a row on."""
        with self.path.open("r+b") as file:
            start = _header_length(file)
            file.seek(start + row * self.row_bytes)
            file.write(images.tobytes())
            file.flush()
            os.fsync(file.fileno())

    def finish(self, files: ImageFiles, say: Callable[[str], None]) -> ImageStore:
        """Close the gaps of unreadable images, describe the store and give it its name."""
        kept = np.array([row for row in range(self.n) if row not in self.broken])
        images = self._compact(kept)
        labels = None if files.labels is None else files.labels[kept]
        if self.broken:
            say(f"Left out {len(self.broken)} images: " + "; ".join(self.broken.values()))
        info = {
            "format": FORMAT,
            **self.identity,
            "shape": [len(kept), *self.shape],
            "num_classes": 0 if labels is None else int(labels.max()) + 1,
            "histogram": [] if labels is None else np.bincount(labels).tolist(),
            "left_out": list(self.broken.values()),
            "fingerprint": compute_fingerprint(images, labels),
        }
        if files.classes is not None:
            info["classes"] = list(files.classes)
        del images
        if labels is not None:
            with (self.folder / "labels.npy").open("wb") as file:
                np.save(file, labels, allow_pickle=False)
        write_json(self.folder / "store.json", info)
        (self.folder / "progress.json").unlink()
        try:
            self.folder.rename(self.out)
        except OSError as error:
            raise InputError(f"{self.out} exists already: choose another --out.") from error
        return ImageStore(self.out)

    def _compact(self, kept: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """The images without gaps; they replace those with gaps at once."""
        images: npt.NDArray[np.uint8] = np.load(self.path, mmap_mode="r", allow_pickle=False)
        if len(images) > len(kept):
            with replacing(self.path) as partial, partial.open("wb") as file:
                _write_header(file, (len(kept), *self.shape))
                for start in range(0, len(kept), CHUNK):
                    file.write(np.ascontiguousarray(images[kept[start : start + CHUNK]]).tobytes())
            images = np.load(self.path, mmap_mode="r", allow_pickle=False)
        return images


def _hash_source(files: ImageFiles) -> str:
    """SHA-256 of kind, names and labels; pixels are covered by the fingerprint at the end."""
    digest = hashlib.sha256(files.kind.encode())
    for name in files.names:
        digest.update(name.encode() + b"\0")
    if files.labels is not None:
        digest.update(files.labels.astype("<i8").tobytes())
    return digest.hexdigest()


def _write_header(file: BinaryIO, shape: tuple[int, ...]) -> None:
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _header_length(file: BinaryIO) -> int:
    file.seek(0)
    try:
        np.lib.format.read_magic(file)
        np.lib.format.read_array_header_1_0(file)
    except Exception as error:  # numpy lets those of Python's parser through
        raise ValueError(f"images.npy begins with no header ({type(error).__name__})") from error
    return file.tell()
