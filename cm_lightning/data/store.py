"""One memory-mapped uint8 array of images with its labels and a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
import weakref
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cm_lightning.documents import check_form, read_mapping
from cm_lightning.types import InputError, check_word
from cm_lightning.version import __version__

__all__ = ["ImageStore", "Resize", "default_cache", "store_path", "to_float", "write_store"]

FORMAT = 1
LABELS = 1 << 20
"""Labels are below this."""
_FORM = {
    "format": int,
    "shape": [int],
    "num_classes": int,
    "fingerprint": str,
    "transform?": dict,
    "source?": dict,
    "left_out?": list,
    "classes?": [str],
}
_LARGE = 1 << 28
"""Bytes from which a store is asked for rows ahead; smaller ones stay in memory anyway."""
CHUNK = 1 << 24


def to_float(images: Tensor) -> Tensor:
    """Map grey levels 0 to 255 to [-1, 1]: ``v / 127.5 - 1``, fp32."""
    return images.to(torch.float32) / 127.5 - 1


def default_cache() -> Path:
    """Folder of everything that can be made again: ``$CM_HOME`` or ``~/.cache/cm_lightning``."""
    return Path(os.environ.get("CM_HOME") or Path.home() / ".cache" / "cm_lightning").expanduser()


@dataclass(frozen=True)
class Resize:
    """How images reach the wanted resolution.

    Args:
        resolution: Height and width, ``None`` to keep square images as they are.
        mode: ``"pad"`` centres the image on a canvas of grey level ``fill``; ``"resize"``
            interpolates (bicubic, antialiased).
        fill: Grey level of the canvas.

    Raises:
        InputError: If the resolution is not positive, or the mode or grey level does not exist.
    """

    resolution: int | None = None
    mode: Literal["pad", "resize"] = "pad"
    fill: int = 0

    def __post_init__(self) -> None:
        if self.resolution is not None and self.resolution < 1:
            raise InputError(f"data.resolution must be positive or null, got {self.resolution}.")
        check_word("data.resize", self.mode, ("pad", "resize"))
        if not 0 <= self.fill <= 255:
            raise InputError(f"The fill of Resize must lie in 0 to 255, got {self.fill}.")

    def __call__(self, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Apply to ``(N, H, W, C)``; returns ``(N, R, R, C)``.

        Raises:
            InputError: If the images are not square and no resolution is given, or too large.
        """
        _, height, width, _ = images.shape
        size = self.resolution
        if size is None:
            if height != width:
                raise InputError(
                    f"The images are {height}x{width}, not square: set data.resolution."
                )
            return images
        if (height, width) == (size, size):
            return images
        if self.mode == "resize":
            return _interpolate(images, size)
        if height > size or width > size:
            raise InputError(
                f"Images of {height}x{width} cannot be padded to data.resolution {size}: set "
                "data.resize to resize."
            )
        top, left = (size - height) // 2, (size - width) // 2
        below, right = size - height - top, size - width - left
        margins = ((0, 0), (top, below), (left, right), (0, 0))
        return np.pad(images, margins, constant_values=self.fill)


def _interpolate(images: npt.NDArray[np.uint8], size: int) -> npt.NDArray[np.uint8]:
    from PIL import Image

    out = np.empty((len(images), size, size, images.shape[3]), np.uint8)
    for row, image in enumerate(images):
        picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
        resized = np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC))
        out[row] = resized.reshape(size, size, -1)
    return out


class ImageStore:
    """Images ``(N, C, H, W)`` on disk, shared by all processes through the page cache.

    Args:
        path: A folder written by :func:`write_store`.

    Raises:
        InputError: If the folder is missing, incomplete or damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.info = _read_info(self.path)
        self._images: npt.NDArray[np.uint8] | None = None
        self._file: int | None = None
        images = self.images
        if (
            list(images.shape) != self.info["shape"]
            or images.dtype != np.uint8
            or not images.size
            or images.shape[1] not in (1, 3)
        ):
            raise InputError(f"{self.path / 'images.npy'} is not what store.json describes.")
        self.labels: npt.NDArray[np.int64] | None = None
        if self.info["num_classes"]:
            self.labels = np.asarray(_load(self.path / "labels.npy"))
            fit = self.labels.shape == (len(images),) and self.labels.dtype == np.int64
            fit = fit and self.num_classes <= LABELS
            if not fit or not 0 <= self.labels.min() <= self.labels.max() < self.num_classes:
                raise InputError(f"{self.path / 'labels.npy'} is not what store.json describes.")

    @property
    def images(self) -> npt.NDArray[np.uint8]:
        """The memory-mapped images."""
        if self._images is None:
            self._images = _load(self.path / "images.npy", mmap=True)
        return self._images

    @property
    def fingerprint(self) -> str:
        """SHA-256 of shape, labels and every pixel."""
        return str(self.info["fingerprint"])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """``(C, H, W)``."""
        _, channels, height, width = self.info["shape"]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes, 0 without labels."""
        return int(self.info["num_classes"])

    def __len__(self) -> int:
        return int(self.info["shape"][0])

    def __getitem__(self, index: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """Images ``(B, C, H, W)`` uint8 and labels ``(B,)`` int64 at the given positions."""
        images = torch.from_numpy(self.read(index))
        return images, None if self.labels is None else torch.from_numpy(self.labels[index])

    def read(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """A copy of the images at the given positions, ``(B, C, H, W)``.

        From a large store the system is asked for all of them before the first is touched, so a
        cold disk serves many at once rather than one after the other.
        """
        images = self.images
        if images.nbytes >= _LARGE and hasattr(os, "posix_fadvise"):
            if self._file is None:
                self._file = os.open(self.path / "images.npy", os.O_RDONLY)
                weakref.finalize(self, os.close, self._file)
            size = images[0].nbytes
            start = os.fstat(self._file).st_size - images.nbytes
            for row in index.tolist():
                os.posix_fadvise(self._file, start + row * size, size, os.POSIX_FADV_WILLNEED)
        return np.ascontiguousarray(images[index])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_images": None, "_file": None}

    def verify(self) -> None:
        """Read everything and compare with the fingerprint.

        Raises:
            InputError: If a pixel or label has changed.
        """
        if compute_fingerprint(self.images, self.labels) != self.fingerprint:
            raise InputError(f"{self.path} is damaged: its content has another fingerprint.")


def write_store(
    path: Path,
    images: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64] | None,
    *,
    source: Mapping[str, Any],
    transform: Resize,
) -> ImageStore:
    """Write a store; it appears under its name complete or not at all.

    Args:
        path: Folder to make. If another process made it meanwhile, its store is returned.
        images: ``(N, H, W, C)`` uint8, N >= 1.
        labels: ``(N,)`` int64, >= 0, or ``None``.
        source: Identity of the source.
        transform: Applied to the images.

    Raises:
        InputError: If images or labels are of another form, or no folder can be made there.
    """
    form = f"{getattr(images, 'dtype', type(images).__name__)} {getattr(images, 'shape', '')}"
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        raise InputError(f"The data source must give images (N, H, W, C) of uint8, got {form}.")
    if not images.size:
        raise InputError("The data source holds no images.")
    if images.shape[3] not in (1, 3):
        raise InputError(f"The data source must give images of 1 or 3 channels, got {form}.")
    if labels is not None and (not isinstance(labels, np.ndarray) or labels.dtype != np.int64):
        found = getattr(labels, "dtype", type(labels).__name__)
        raise InputError(f"The data source must give labels (N,) of int64 or None, got {found}.")
    if labels is not None and (labels.shape != (len(images),) or labels.min() < 0):
        raise InputError(
            f"The data source has {len(images)} images but labels of shape {labels.shape} "
            f"(smallest {labels.min() if labels.size else 'none'}; 0 or more is allowed)."
        )
    images = np.ascontiguousarray(transform(images).transpose(0, 3, 1, 2))
    counts = [] if labels is None else np.bincount(labels).tolist()
    info = {
        "format": FORMAT,
        "library": __version__,
        "source": dict(source),
        "transform": asdict(transform),
        "shape": list(images.shape),
        "num_classes": len(counts),
        "histogram": counts,
        "fingerprint": compute_fingerprint(images, labels),
    }
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            f"No image store can be made in {path.parent} ({error.strerror}): set data.cache to a "
            "folder that can be written."
        ) from error
    try:
        arrays = {"images.npy": images} | ({} if labels is None else {"labels.npy": labels})
        for name, array in arrays.items():
            with (partial / name).open("wb") as file:
                np.save(file, array, allow_pickle=False)
                _flush(file)
        with (partial / "store.json").open("wb") as file:
            file.write(json.dumps(info, indent=2).encode() + b"\n")
            _flush(file)
        try:
            partial.rename(path)
        except OSError:
            store = ImageStore(path)  # another process was faster
            if store.fingerprint != info["fingerprint"]:
                raise InputError(f"{path} already holds other data.") from None
    except OSError as error:
        raise InputError(
            f"The image store {path} cannot be written ({error.strerror or error}): make room, or "
            "set data.cache to another folder."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return ImageStore(path)


def store_path(cache: Path, name: str, source: Mapping[str, Any], transform: Resize) -> Path:
    """Folder of the store of a source after a transform, unique to their identity."""
    identity = {"source": dict(source), "transform": asdict(transform), "format": FORMAT}
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return cache / "stores" / f"{name}-{digest[:16]}"


def compute_fingerprint(images: npt.NDArray[np.uint8], labels: npt.NDArray[np.int64] | None) -> str:
    """SHA-256 of format, shape, labels and pixels of images ``(N, C, H, W)``."""
    digest = hashlib.sha256(f"cm_lightning {FORMAT} {images.shape}".encode())
    digest.update(b"unlabeled" if labels is None else labels.astype("<i8").tobytes())
    rows = max(CHUNK // max(images[0].nbytes, 1), 1)
    for start in range(0, len(images), rows):
        digest.update(np.ascontiguousarray(images[start : start + rows]).tobytes())
    return digest.hexdigest()


def _flush(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_info(path: Path) -> dict[str, Any]:
    try:
        info = read_mapping(path / "store.json")
    except InputError as error:
        why = "store.json is damaged" if (path / "store.json").is_file() else "no store.json in it"
        raise InputError(
            f"{path} is no image store ({why}): cm-data convert makes one from a folder of "
            "images, an archive or a published data set."
        ) from error
    check_form(info, _FORM, str(path / "store.json"))
    if info["format"] != FORMAT or len(info["shape"]) != 4:
        raise InputError(f"{path / 'store.json'} is of another version or incomplete.")
    return info


def _load(path: Path, mmap: bool = False) -> npt.NDArray[Any]:
    try:
        with path.open("rb") as file:
            np.lib.format.read_magic(file)  # an archive would be opened as well
        return np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False)  # type: ignore[no-any-return]
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        raise InputError(
            f"{path} is missing or damaged: delete {path.parent} to rebuild."
        ) from error
