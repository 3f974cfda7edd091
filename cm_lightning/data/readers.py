"""Sources of images: what users hold, read once into uint8 arrays."""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from cm_lightning.archives import read_gzip
from cm_lightning.data.store import ImageStore, Resize, store_path
from cm_lightning.files import hash_file, offline
from cm_lightning.types import InputError, check_word

__all__ = ["IDX", "Digits", "Source", "Store", "read_idx"]

Images = npt.NDArray[np.uint8]
Labels = npt.NDArray[np.int64]


class Source(ABC):
    """Where images come from."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Short name, part of the name of the cached store."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What identifies the source, options and file hashes included (JSON types only)."""

    def folder(self, cache: Path, transform: Resize) -> Path:
        """Folder of the store with these images, whether it exists or not."""
        return store_path(cache, self.name, self.identity(), transform)

    @abstractmethod
    def read(self) -> tuple[Images, Labels | None]:
        """Read everything.

        Returns:
            Images ``(N, H, W, C)`` uint8, and labels ``(N,)`` int64 or ``None``.

        Raises:
            InputError: If files are missing, damaged or do not belong together.
        """


@dataclass(frozen=True)
class Digits(Source):
    """scikit-learn's 1,797 handwritten digits, 8x8 grey levels 0 to 16, inside its wheel."""

    @property
    def name(self) -> str:
        """``digits``."""
        return "digits"

    def identity(self) -> dict[str, Any]:
        """The name alone: the data never change."""
        return {"source": "sklearn.datasets.load_digits", "levels": "round(v * 255 / 16)"}

    def read(self) -> tuple[Images, Labels | None]:
        """Images ``(1797, 8, 8, 1)`` and labels 0 to 9."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = np.round(digits.images * (255 / 16)).astype(np.uint8)[..., None]
        return images, digits.target.astype(np.int64)


@dataclass(frozen=True)
class Store(Source):
    """A store made by ``cm-data convert``, opened where it lies.

    Args:
        path: Its folder.
    """

    path: str

    @property
    def name(self) -> str:
        """Name of the folder."""
        return Path(self.path).name

    def identity(self) -> dict[str, Any]:
        """The path; the store has a fingerprint of its own."""
        return {"source": "store", "path": str(Path(self.path).expanduser())}

    def read(self) -> tuple[Images, Labels | None]:
        """Images ``(N, H, W, C)`` and labels."""
        store = ImageStore(Path(self.path).expanduser())
        return store.images.transpose(0, 2, 3, 1), store.labels

    def folder(self, cache: Path, transform: Resize) -> Path:
        """The store's own folder.

        Raises:
            InputError: If it is missing or its images have another size than asked for.
        """
        path = Path(self.path).expanduser()
        if not path.is_dir():
            raise InputError(
                f"There is no image store at {path}: `cm-data convert SOURCE --out {path}` makes "
                "it from your images."
            )
        size = ImageStore(path).image_shape[1]
        if transform.resolution not in (None, size):
            raise InputError(
                f"The store {path} has images of {size}x{size} and data.resolution is "
                f"{transform.resolution}: convert the images to that, or leave it out."
            )
        return path


@dataclass(frozen=True)
class IDX(Source):
    """A folder of the MNIST family: ``train-images-idx3-ubyte`` and its labels, gzipped or not.

    Fashion-MNIST for example: Debian's package ``dataset-fashion-mnist`` puts it into
    ``/usr/share/datasets/fashion-mnist``; ``download`` fetches it through torchvision.

    Args:
        root: The folder.
        split: ``"train"`` or ``"test"`` (files that begin with ``t10k``).
        download: Fetch Fashion-MNIST into ``root`` if its files are not there.

    Raises:
        InputError: If the split has another name.
    """

    root: str
    split: Literal["train", "test"] = "train"
    download: bool = False

    def __post_init__(self) -> None:
        check_word("data.source.split", self.split, ("train", "test"))

    @property
    def name(self) -> str:
        """Name of the folder and the split."""
        return f"{Path(self.root).expanduser().name or 'idx'}-{self.split}"

    def identity(self) -> dict[str, Any]:
        """Format, split and SHA-256 of both files."""
        images, labels = self._files()
        files = {path.name: hash_file(path) for path in (images, labels) if path is not None}
        return {"source": "idx", "split": self.split, "files": files}

    def read(self) -> tuple[Images, Labels | None]:
        """Images ``(N, H, W, 1)`` (or ``(N, H, W, C)`` from four-dimensional files), labels."""
        images_path, labels_path = self._files()
        images = _to_levels(read_idx(images_path), images_path)
        if images.ndim == 3:
            images = images[..., None]
        if images.ndim != 4:
            raise InputError(
                f"{images_path} must hold images (3 or 4 dimensions), not {images.ndim}."
            )
        if not images.size:
            raise InputError(f"{images_path} holds no images: its shape is {images.shape[:-1]}.")
        if labels_path is None:
            return images, None
        labels = read_idx(labels_path)
        if labels.dtype != np.uint8:
            raise InputError(
                f"{labels_path} must hold labels as bytes, not as {labels.dtype.name}."
            )
        if labels.shape != (len(images),):
            raise InputError(
                f"{labels_path} holds labels of shape {labels.shape} for the {len(images)} images "
                f"of {images_path}."
            )
        return images, labels.astype(np.int64)

    def _files(self) -> tuple[Path, Path | None]:
        root = Path(self.root).expanduser()
        prefix = "train" if self.split == "train" else "t10k"
        wanted = f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"
        if self.download and _find(root, wanted[0]) is None:
            root = _download_fashion_mnist(root, wanted[0])
        if not root.is_dir():
            raise InputError(f"data.source.root: there is no folder {root}.")
        images, labels = (_find(root, name) for name in wanted)
        if images is None:
            raise InputError(f"data.source.root: {root} has no {wanted[0]} or {wanted[0]}.gz.")
        return images, labels


def read_idx(path: Path) -> npt.NDArray[Any]:
    """Read an IDX file (uint8, float32 or float64; big-endian; gzipped if it ends in ``.gz``).

    Raises:
        InputError: If the file is not whole.
    """
    data = read_gzip(path, 4 + 4 * 255)
    kinds: dict[int, np.dtype[Any]] = {
        0x08: np.dtype("u1"),
        0x0D: np.dtype(">f4"),
        0x0E: np.dtype(">f8"),
    }
    if len(data) < 4 or data[:2] != b"\0\0" or data[2] not in kinds:
        raise InputError(f"{path} is not an IDX file of bytes or floats (wrong magic number).")
    kind, dims = kinds[data[2]], data[3]
    start = 4 + 4 * dims
    if dims == 0 or len(data) < start:
        raise InputError(f"{path} is truncated within its header.")
    if dims > 4:
        raise InputError(f"{path} has {dims} dimensions; images have 3 or 4, labels 1.")
    shape = struct.unpack(f">{dims}I", data[4:start])
    expected = start + kind.itemsize * int(np.prod(shape, dtype=object))
    data = read_gzip(path, expected + 1)
    if len(data) != expected:
        state = "truncated" if len(data) < expected else "too long"
        found = "more" if len(data) > expected else f"{len(data)}"
        raise InputError(
            f"{path} is {state}: its header promises {expected} bytes, it has {found}."
        )
    array: npt.NDArray[Any] = np.frombuffer(data, kind, offset=start).reshape(shape)
    return array


def _to_levels(array: npt.NDArray[Any], path: Path) -> Images:
    if array.dtype == np.uint8:
        return array
    bad = int((~np.isfinite(array)).sum())
    if bad:
        raise InputError(f"{path} holds {bad} values that are NaN or infinite.")
    if array.size and (array.min() < 0 or array.max() > 1):
        raise InputError(
            f"{path} holds floats from {array.min():g} to {array.max():g}; they must lie in [0, 1]."
        )
    return np.asarray(np.round(array * 255), dtype=np.uint8)


def _find(root: Path, name: str) -> Path | None:
    for candidate in (root / name, root / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    return None


def _download_fashion_mnist(root: Path, wanted: str) -> Path:
    folder = root / "FashionMNIST" / "raw"
    if _find(folder, wanted) is not None:
        return folder
    if offline():
        raise InputError(f"Fashion-MNIST is not in {root}, and CM_OFFLINE forbids downloading it.")
    from torchvision.datasets import FashionMNIST

    try:
        FashionMNIST(str(root), download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise InputError(f"Fashion-MNIST could not be downloaded to {root}: {reason}.") from error
    return folder
